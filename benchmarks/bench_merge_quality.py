"""How much of every expert's own gain one merged adapter keeps: SmolLM2-135M, three domains, held-out text.

    python benchmarks/bench_merge_quality.py --work FOLDER [--seeds 0] [--validation-blocks 8] [--test-blocks 12]

For each seed three experts (rank 16, all linear layers, 40 steps of 2 x 256 tokens, the same first A) are trained on
the demonstration's domains, their input moments are taken on the base model over about 6,000 of the training tokens,
and every merge is scored on the same held-out blocks. Held-out rows are split by file: the scale of `regmean` is chosen
on the validation half, by the highest share that the worst domain keeps, and what is reported is of the test half.
Data, experts, moments and losses stay in `--work` and are used again.

`kept` is (base - x) / (base - own expert) with 95 % intervals from a paired bootstrap over blocks, which know nothing
of other seeds. `peft ties` is PEFT's `add_weighted_adapter`, density 0.5, weights 1. `routed` gives each block to the
model that `SequenceRouter` chooses by the first 32 tokens, the chosen regmean where it is not sure. With `--explore`
only the settings of regmean that it names (see `variants`) are tried, one by one, on the validation half.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
from merge_quality_work import Work  # noqa: E402
from peft import PeftModel  # noqa: E402

from fedmoe.datasets.domains import DOMAINS  # noqa: E402
from fedmoe.datasets.packing import collate  # noqa: E402
from fedmoe.gateway.losses import BASE, LossMatrix  # noqa: E402
from fedmoe.gateway.report import report_json  # noqa: E402
from fedmoe.gateway.retained import Retained, retained  # noqa: E402
from fedmoe.gateway.route import SequenceRouter  # noqa: E402
from fedmoe.lora import regmean as regmean_module  # noqa: E402
from fedmoe.lora.adapter import Adapter  # noqa: E402
from fedmoe.lora.formats import PEFT_CONFIG, PEFT_WEIGHTS, read_peft  # noqa: E402
from fedmoe.lora.merge import merge  # noqa: E402
from fedmoe.lora.moments import Gram, InputMoments  # noqa: E402
from fedmoe.lora.regmean import Matrix64, regmean  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.models.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.models.packed import count_targets  # noqa: E402
from fedmoe.models.prompt_features import prompt_features  # noqa: E402
from fedmoe.worker.statistics import prompt_statistics  # noqa: E402

SCALES = (1.0, 1.1, 1.2)
COLUMNS, TOKENS = 32, 6_000
PROMPT = 32
OWN = "own expert"


@dataclass(frozen=True)
class Bench:
    """The experts of one seed, and the held-out blocks to score on: `blocks[half]` of each domain."""

    work: Work
    experts: Mapping[str, Adapter]
    blocks: Mapping[str, int]

    def moments(self, columns: int = COLUMNS, tokens: int = TOKENS, on_expert: bool = False) -> dict[str, InputMoments]:
        return {domain: self.work.moments(domain, columns, tokens, on_expert) for domain in self.experts}

    def row(self, adapter: Adapter, half: str) -> dict[str, list[float]]:
        """An adapter's block losses on every domain."""
        return {domain: self.work.block_losses(adapter, half, domain, self.blocks[half]) for domain in self.experts}

    def matrix(self, adapters: Mapping[str, Adapter], half: str) -> LossMatrix:
        """The base model, each domain's own expert and the adapters on one half of the held-out rows."""
        first = next(iter(self.experts.values()))
        own = {
            name: self.work.block_losses(found, half, name, self.blocks[half]) for name, found in self.experts.items()
        }
        rows = {BASE: self.row(Adapter.zeros(first.layout, first.alpha), half), OWN: own}
        for name, adapter in adapters.items():
            rows[name] = self.row(adapter, half)
            print(
                half,
                name,
                {domain: round(float(np.mean(losses)), 4) for domain, losses in rows[name].items()},
                flush=True,
            )
        held_out = {domain: self.work.held_out(half, domain, self.blocks[half]) for domain in self.experts}
        tokens = {domain: [count_targets(collate([block])) for block in blocks] for domain, blocks in held_out.items()}
        return LossMatrix.of_blocks(rows, tokens)

    def shares(self, adapters: Mapping[str, Adapter], half: str) -> dict[str, dict[str, float]]:
        """Adapter -> the share kept on each domain, the worst and the mean."""
        found = kept(self.matrix(adapters, half))
        return {
            name: {
                **{one.domain: round(one.kept[name].value, 4) for one in found.domains},
                "worst": round(found.summaries[name].worst.value, 4),
                "mean": round(found.summaries[name].mean.value, 4),
            }
            for name in adapters
        }


def kept(matrix: LossMatrix) -> Retained:
    names = [name for name in matrix.models if name not in (BASE, OWN)]
    return retained(matrix, dict.fromkeys(DOMAINS, OWN), names)


def times(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with its product multiplied; regmean's scale is nothing else."""
    return Adapter(adapter.layout, adapter.alpha * factor, adapter.flat)


def peft_ties(work: Work) -> Adapter:
    """PEFT's own merge of the experts' folders, on a model of its own."""
    first, *others = DOMAINS
    model = PeftModel.from_pretrained(load_base("smollm2", "cpu").model, work.adapter_folder(first), adapter_name=first)
    for domain in others:
        model.load_adapter(work.adapter_folder(domain), adapter_name=domain)
    model.add_weighted_adapter(list(DOMAINS), [1.0] * len(DOMAINS), "ties", combination_type="ties", density=0.5)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, selected_adapters=["ties"])
        return read_peft({name: (Path(scratch) / "ties" / name).read_bytes() for name in (PEFT_CONFIG, PEFT_WEIGHTS)})


def regmean_name(scale: float, cut: str = "uncut") -> str:
    return f"regmean x{scale:g}, {cut}"


def merges(bench: Bench, scale: float) -> dict[str, Adapter]:
    """Every merge that is tested, by name; regmean at the scale chosen is cut too, at the other scales it is not."""
    experts, known = bench.experts, bench.moments()

    def regular(rank: int | None = None, energy: float | None = None) -> Adapter:
        return merge(experts, "regmean", rank=rank, energy=energy, scale=1.0, moments=known).adapter

    uncut = regular()
    return {
        regmean_name(scale): times(uncut, scale),
        **{name: merge(experts, name).adapter for name in ("weighted_average", "sum", "scaled")},
        "peft ties": peft_ties(bench.work),
        regmean_name(scale, "energy 0.99"): times(regular(64, 0.99), scale),
        regmean_name(scale, "rank 32"): times(regular(32), scale),
        regmean_name(scale, "rank 16"): times(regular(16), scale),
        **{regmean_name(other): times(uncut, other) for other in SCALES if other != scale},
    }


def routes(bench: Bench, half: str) -> dict[str, tuple[str | None, ...]]:
    """For every block the expert for its first 32 tokens, None where the router is not sure."""
    work = bench.work
    known = {domain: prompt_statistics(work.base, work.training_blocks(domain), TOKENS) for domain in DOMAINS}
    router = SequenceRouter.fit(known)
    choices = {}
    for domain in DOMAINS:
        blocks = work.held_out(half, domain, bench.blocks[half])
        prompts = [block.input_ids[block.segment_ids == 0][:PROMPT] for block in blocks]
        choices[domain] = router.route(prompt_features(work.base, prompts)).names
    return choices


def routed_row(
    bench: Bench, matrix: LossMatrix, choices: Mapping[str, Sequence[str | None]], otherwise: str
) -> dict[str, list[float]]:
    """The block losses of whom each block was given to; a foreign expert is scored only where it was chosen."""
    row: dict[str, list[float]] = {}
    for domain, names in choices.items():
        foreign = {
            name: bench.work.block_losses(bench.experts[name], "test", domain, bench.blocks["test"])
            for name in set(names) - {None, domain}
            if name is not None
        }
        known = {**foreign, domain: matrix.block_losses[OWN][domain], None: matrix.block_losses[otherwise][domain]}
        row[domain] = [known[name][place] for place, name in enumerate(names)]
    return row


def variants(bench: Bench, scale: float, worst: str) -> dict[str, Callable[[], Adapter]]:
    """Regmean with one thing changed at a time, to be multiplied by `scale`; `worst` is the domain that keeps least."""
    experts, known = bench.experts, bench.moments

    def loudness(power: float) -> Adapter:
        seen = regmean_module._seen

        def changed(a: Matrix64, b: Matrix64, gram: Gram) -> tuple[Matrix64, float]:
            image, root = seen(a, b, gram)
            return image, root**power

        with patch.object(regmean_module, "_seen", changed):
            return regmean(experts, known(), 1.0).adapter

    heavier = {domain: 1.5 if domain == worst else 1.0 for domain in experts}
    return {
        "scale +0.1": lambda: regmean(experts, known(), 1.0 + 0.1 / scale).adapter,
        "scale +0.2": lambda: regmean(experts, known(), 1.0 + 0.2 / scale).adapter,
        "64 columns": lambda: regmean(experts, known(columns=64), 1.0).adapter,
        "96 columns": lambda: regmean(experts, known(columns=96), 1.0).adapter,
        "g = tr^-1": lambda: loudness(2.0),
        "g = 1": lambda: loudness(0.0),
        "ridge 0.001": lambda: regmean(experts, known(), 1.0, 0.001).adapter,
        "ridge 0.1": lambda: regmean(experts, known(), 1.0, 0.1).adapter,
        "worst domain's weight 1.5": lambda: regmean(experts, known(), 1.0, weights=heavier).adapter,
        "moments on the experts": lambda: regmean(experts, known(on_expert=True), 1.0).adapter,
        "12,000 tokens": lambda: regmean(experts, known(tokens=12_000), 1.0).adapter,
    }


def measured(bench: Bench, explore: Sequence[str]) -> dict[str, object]:
    """Everything of one seed, or with `explore` what these variants keep on the validation half."""
    uncut = merge(bench.experts, "regmean", moments=bench.moments(), scale=1.0).adapter
    validation = bench.shares({regmean_name(scale): times(uncut, scale) for scale in SCALES}, "validation")
    scale = max(SCALES, key=lambda scale: validation[regmean_name(scale)]["worst"])
    print("validation", validation, "chosen", scale, flush=True)
    result = {"scale_chosen_on_validation": scale, "validation": validation}
    if explore:
        shares = validation[regmean_name(scale)]
        made = variants(bench, scale, min(DOMAINS, key=lambda domain: shares[domain]))
        for name in explore:
            validation |= bench.shares({name: times(made[name](), scale)}, "validation")
        return result
    return result | tested(bench, scale)


def tested(bench: Bench, scale: float) -> dict[str, object]:
    """Every merge and the router on the test half."""
    merged = merges(bench, scale)
    matrix = bench.matrix(merged, "test")
    choices = routes(bench, "test")
    matrix = matrix.with_rows({"routed": routed_row(bench, matrix, choices, regmean_name(scale))})
    return {
        "ranks": {name: adapter.rank for name, adapter in merged.items()},
        "routed_to": {domain: [name or "merged" for name in names] for domain, names in choices.items()},
        "test": report_json(matrix, kept(matrix)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, experts, moments and losses")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--validation-blocks", type=int, default=8)
    parser.add_argument("--test-blocks", type=int, default=12)
    parser.add_argument("--explore", nargs="*", default=[], help="names in `variants` to try on the validation blocks")
    parser.add_argument("--name", default="merge_quality", help="of the result's file")
    chosen = parser.parse_args()
    pin_torch(1)
    base = load_base("smollm2", "cpu")
    blocks = {"validation": chosen.validation_blocks, "test": chosen.test_blocks}
    by_seed: dict[str, object] = {}
    for seed in chosen.seeds:
        work = Work(chosen.work, base, seed)
        work.build()
        bench = Bench(work, {domain: work.expert(domain) for domain in DOMAINS}, blocks)
        by_seed[str(seed)] = measured(bench, chosen.explore)
        arguments = {name: str(value) for name, value in vars(chosen).items() if name != "work"}
        print(write_result(chosen.name, by_seed, {**arguments, "dtype": str(base.dtype)}, chosen.seeds), flush=True)


if __name__ == "__main__":
    main()
