"""How many tokens must a worker's input moments rest on? What `regmean` keeps, SmolLM2-135M, held-out text.

    python benchmarks/bench_statistics_budget.py --work FOLDER [--domains demo|unseen] [--seeds 0 1 2] [--samples 1]

The experts of `bench_merge_quality.py`, merged at the default scale with equal weights; nothing is chosen on held-out
text. `all` rows: every expert's moments rest on so many tokens. `one` rows: on each domain those of its own expert rest
on so many, those of the others on the most that is measured, which is what a busy machine did to a worker. `filled up`:
with the mean of all experts', to so many tokens (`fedmoe.lora.moments.pad_thin_grams`); in all other rows moments are
taken as they are. `--samples` repeats the `one` rows with moments of other training blocks.

`kept` is (base - merged) / (base - own expert) with 95 % intervals from a paired bootstrap over blocks, which know
nothing of other seeds or samples. Data, experts, moments and losses stay in `--work` and are used again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

from bench_merge_quality import OWN, SETS, kept  # noqa: E402  # threads are pinned first
from lib.trained_experts import LENGTH, Work  # noqa: E402

from fedmoe.datasets.tokens.packing import collate  # noqa: E402
from fedmoe.gateway.evaluation_report import report_json  # noqa: E402
from fedmoe.gateway.losses import BASE, LossMatrix  # noqa: E402
from fedmoe.lora import moments as moments_module  # noqa: E402
from fedmoe.lora.adapter import Adapter  # noqa: E402
from fedmoe.lora.moments import InputMoments  # noqa: E402
from fedmoe.lora.regmean import regmean  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.models.input_moments import MomentsCollector  # noqa: E402
from fedmoe.models.packed import count_targets  # noqa: E402
from fedmoe.runtime.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.runtime.files import write_atomic  # noqa: E402

COLUMNS = 64
#: Domain -> how many tokens the moments of its expert rest on.
Tokens = Mapping[str, int]


@dataclass(frozen=True)
class Bench:
    """The experts of one seed with their moments by sample and number of tokens, and where losses are measured."""

    work: Work
    experts: Mapping[str, Adapter]
    moments: Mapping[tuple[str, int, int], InputMoments]
    blocks: int

    def merged(self, tokens: Tokens, sample: int) -> Adapter:
        most = max(count for _, _, count in self.moments)
        chosen = {name: self.moments[name, sample if count < most else 0, count] for name, count in tokens.items()}
        return regmean(self.experts, chosen).adapter

    def losses(self, adapter: Adapter, domain: str) -> list[float]:
        return self.work.block_losses(adapter, "test", domain, self.blocks)

    def all_row(self, tokens: int) -> dict[str, list[float]]:
        """Losses on every domain of the merge in which all experts' moments rest on so many tokens."""
        merged = self.merged(dict.fromkeys(self.experts, tokens), 0)
        return {domain: self.losses(merged, domain) for domain in self.experts}

    def one_row(self, tokens: int, sample: int) -> dict[str, list[float]]:
        """Losses on every domain of the merge in which only that domain's own expert has so few."""
        most = dict.fromkeys(self.experts, max(count for _, _, count in self.moments))
        return {domain: self.losses(self.merged({**most, domain: tokens}, sample), domain) for domain in self.experts}


def gathered(work: Work, domain: str, budgets: Sequence[int], sample: int) -> dict[int, InputMoments]:
    """Moments of each number of tokens, all out of one pass over the training blocks.

    Sample 0 begins with the first block, as a worker does; each further one begins with later blocks.
    """
    files = {count: _file(work, domain, count, sample) for count in budgets}
    if not all(file.exists() for file in files.values()):
        targets = tuple(module.name for module in work.expert(domain).layout.modules)
        length = max(budgets) // LENGTH
        blocks = work.training_blocks(domain, (sample + 1) * length)[sample * length :]
        with MomentsCollector(work.base, targets, COLUMNS) as collector:
            for done, block in enumerate(blocks, 1):
                collector.add(collate([block]))
                if done * LENGTH in files:
                    write_atomic(files[done * LENGTH], collector.moments().to_bytes(), 0o644)
    return {count: InputMoments.from_bytes(file.read_bytes()) for count, file in files.items()}


def _file(work: Work, domain: str, count: int, sample: int) -> Path:
    other = "" if sample == 0 else f"-sample-{sample}"
    return work.folder / f"experts-{work.seed}" / f"{domain}-q{COLUMNS}-{count}-weighted{other}.safetensors"


@contextmanager
def filling_up_to(tokens: int) -> Iterator[None]:
    """Merges inside fill moments of fewer tokens up."""
    least = moments_module.LEAST_TOKENS
    moments_module.LEAST_TOKENS = tokens
    try:
        yield
    finally:
        moments_module.LEAST_TOKENS = least


def measured(bench: Bench, budgets: Sequence[int], fill: Sequence[int], samples: int) -> Iterator[dict[str, object]]:
    """Every row of one seed, as far as they are there: after each sample and at the end."""
    first = next(iter(bench.experts.values()))
    base = Adapter.zeros(first.layout, first.alpha)
    rows = {
        BASE: {domain: bench.losses(base, domain) for domain in bench.experts},
        OWN: {domain: bench.losses(expert, domain) for domain, expert in bench.experts.items()},
    }
    most = max(budgets)
    with filling_up_to(1):
        rows[f"all {most}"] = bench.all_row(most)
    for sample in range(samples):
        named = "" if sample == 0 else f", sample {sample}"
        for count, limit in ((count, limit) for limit in (1, *fill) for count in budgets if count < most):
            if limit == 1 or count < limit:
                with filling_up_to(limit):
                    rows[f"one {count}{_filled(limit)}{named}"] = bench.one_row(count, sample)
        yield _results(bench, rows)
    for count in (count for count in budgets if max(fill) // 2 <= count < most):
        with filling_up_to(1):
            rows[f"all {count}"] = bench.all_row(count)
    yield _results(bench, rows)


def _filled(limit: int) -> str:
    return "" if limit == 1 else f" filled up to {limit}"


def _results(bench: Bench, rows: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, object]:
    held_out = {domain: bench.work.held_out("test", domain, bench.blocks) for domain in bench.experts}
    tokens = {domain: [count_targets(collate([block])) for block in blocks] for domain, blocks in held_out.items()}
    matrix = LossMatrix.of_blocks(rows, tokens)
    for name in (one for one in matrix.models if one not in (BASE, OWN)):
        shares = {one.domain: round(100 * one.retained[name].value, 1) for one in kept(matrix).domains}
        print(f"seed {bench.work.seed} {name:28} {shares}", flush=True)
    return {"test": report_json(matrix, kept(matrix))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of bench_merge_quality.py")
    parser.add_argument("--domains", choices=["demo", "unseen"], default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=1, help="how often thin moments are drawn from other blocks")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1_024, 2_048, 4_096])
    parser.add_argument(
        "--fill", type=int, nargs="+", default=[1_024, 2_048], help="tokens that thin ones are filled up to"
    )
    parser.add_argument("--test-blocks", type=int, default=12)
    asked = parser.parse_args()
    pin_torch(1)
    base = load_base("smollm2", "cpu")
    domains, _ = SETS[asked.domains]
    budgets = sorted({-(-count // LENGTH) * LENGTH for count in asked.tokens})
    arguments = {name: str(value) for name, value in vars(asked).items() if name != "work"}
    by_seed: dict[str, object] = {}
    for seed in asked.seeds:
        work = Work(asked.work, base, seed)
        work.build(domains)
        experts = {domain: work.expert(domain) for domain in domains}
        moments = {
            (domain, sample, count): found
            for domain in domains
            for sample in range(asked.samples)
            for count, found in gathered(work, domain, budgets if sample == 0 else budgets[:-1], sample).items()
        }
        bench = Bench(work, experts, moments, asked.test_blocks)
        for found in measured(bench, budgets, asked.fill, asked.samples):
            by_seed[str(seed)] = found
            name = f"statistics_budget_{asked.domains}"
            print(write_result(name, by_seed, {**arguments, "dtype": str(base.dtype)}, asked.seeds), flush=True)


if __name__ == "__main__":
    main()
