"""How much of every expert's own gain one merged adapter keeps: SmolLM2-135M, held-out text.

    python benchmarks/bench_merge_quality.py --work FOLDER [--domains demo|unseen|ten] [--seeds 0 1 2]

For each seed experts (rank 16, all linear layers, 40 steps of 2 x 256 tokens, the same first A) are trained on the
domains of `lib/merge_domains.py`, their input moments are taken on the base model over about 6,000 training tokens,
and every merge is scored on the same held-out blocks. Held-out rows are split by file: scale and weights of `regmean`
are chosen on the validation half, by the highest share that the worst domain keeps, and what is reported is of the test
half. Data, experts, moments and losses stay in `--work` and are used again.

`kept` is (base - x) / (base - own expert) with 95 % intervals from a paired bootstrap over blocks, which know nothing
of other seeds. `routed` gives each block to an expert or to the chosen regmean by its first 32 tokens, as the server
would (`fedmoe.gateway.evaluate.routed_to`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
from lib.merge_domains import DEMO, FURTHER, UNSEEN  # noqa: E402
from lib.trained_experts import Work  # noqa: E402

from fedmoe.datasets.tokens.packing import collate  # noqa: E402
from fedmoe.gateway.evaluate import routed_to  # noqa: E402
from fedmoe.gateway.evaluation_report import report_json  # noqa: E402
from fedmoe.gateway.losses import BASE, LossMatrix  # noqa: E402
from fedmoe.gateway.retained_gain import RetainedGains, retained_gains  # noqa: E402
from fedmoe.gateway.routers import SequenceRouter  # noqa: E402
from fedmoe.lora.adapter import Adapter  # noqa: E402
from fedmoe.lora.merge import merge  # noqa: E402
from fedmoe.lora.moments import InputMoments  # noqa: E402
from fedmoe.lora.regmean import regmean  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.models.packed import count_targets  # noqa: E402
from fedmoe.runtime.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.worker.statistics import StatisticsBudget, prompt_statistics, sample_prompts  # noqa: E402

#: Name -> domains, and the highest rank of a merged adapter.
SETS = {"demo": (DEMO, 64), "unseen": (UNSEEN, 64), "ten": ((*DEMO, *FURTHER), 128)}
SCALES = (1.1, 1.2, 1.3, 1.4)
#: How much the worst domain's weight is raised at a time, and how often at most.
HEAVIER, ROUNDS = 1.3, 4
TOKENS = 6_000
#: Training blocks that prompt statistics are taken of: as many tokens as a worker looks at.
BLOCKS = 250
OWN, MERGED = "own expert", "merged"

Weights = Mapping[str, float]


@dataclass(frozen=True)
class Bench:
    """The experts of one seed, their moments, and the held-out blocks to score on: `blocks[half]` of each domain."""

    work: Work
    experts: Mapping[str, Adapter]
    moments: Mapping[str, InputMoments]
    blocks: Mapping[str, int]
    rank: int

    def regmean(self, weights: Weights, rank: int | None = None) -> Adapter:
        """At scale 1; uncut where the rank allows it."""
        limit = min(rank or self.rank, sum(expert.rank for expert in self.experts.values()))
        return regmean(self.experts, self.moments, 1.0, weights=weights, rank=limit).adapter

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

    def shares(self, adapter: Adapter, half: str) -> dict[str, float]:
        """The share that the adapter keeps on each domain."""
        found = kept(self.matrix({"x": adapter}, half))
        return {one.domain: round(one.retained["x"].value, 4) for one in found.domains}


def kept(matrix: LossMatrix) -> RetainedGains:
    names = [name for name in matrix.models if name not in (BASE, OWN)]
    return retained_gains(matrix, dict.fromkeys(matrix.domains, OWN), names)


def times(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with its product multiplied; regmean's scale is nothing else."""
    return Adapter(adapter.layout, adapter.alpha * factor, adapter.flat)


def routes(bench: Bench, merged: Adapter) -> dict[str, list[str]]:
    """Who gets each test block by its first 32 tokens: an expert, or `MERGED`."""
    work, budget = bench.work, StatisticsBudget().prompt_tokens
    known = {
        domain: prompt_statistics(work.base, sample_prompts(work.base, work.training_blocks(domain, BLOCKS), budget))
        for domain in bench.experts
    }
    held_out = {domain: work.held_out("test", domain, bench.blocks["test"]) for domain in bench.experts}
    return routed_to(work.base, SequenceRouter.fit(known), {**bench.experts, MERGED: merged}, held_out, MERGED)


def routed_row(
    bench: Bench, matrix: LossMatrix, choices: Mapping[str, Sequence[str]], otherwise: str
) -> dict[str, list[float]]:
    """The block losses of whom each block was given to; a foreign expert is scored only where it was chosen."""
    row: dict[str, list[float]] = {}
    for domain, names in choices.items():
        foreign = {
            name: bench.work.block_losses(bench.experts[name], "test", domain, bench.blocks["test"])
            for name in set(names) - {MERGED, domain}
        }
        known = {**foreign, domain: matrix.block_losses[OWN][domain], MERGED: matrix.block_losses[otherwise][domain]}
        row[domain] = [known[name][place] for place, name in enumerate(names)]
    return row


@dataclass(frozen=True)
class Chosen:
    """Scale and weights of regmean, the shares they keep on the validation half, and all that was tried."""

    scale: float
    weights: Weights
    tried: list[dict[str, object]]


def choose(bench: Bench) -> Chosen:
    """First the scale, then again and again more weight for the domain that keeps least, while that helps it."""
    tried: list[dict[str, object]] = []

    def best_of(weights: Weights, scales: Sequence[float]) -> tuple[float, dict[str, float]]:
        adapter = bench.regmean(weights)
        found = {scale: bench.shares(times(adapter, scale), "validation") for scale in scales}
        tried.extend({"scale": scale, "weights": dict(weights), "kept": shares} for scale, shares in found.items())
        scale = max(found, key=lambda scale: min(found[scale].values()))
        return scale, found[scale]

    weights = dict.fromkeys(bench.experts, 1.0)
    scale, shares = best_of(weights, SCALES)
    for _ in range(ROUNDS):
        worst = min(shares, key=lambda domain: shares[domain])
        heavier = weights | {worst: weights[worst] * HEAVIER}
        next_scale, next_shares = best_of(heavier, (scale,))
        if min(next_shares.values()) <= min(shares.values()):
            break
        weights, scale, shares = heavier, next_scale, next_shares
    return Chosen(scale, weights, tried)


def merges(bench: Bench, chosen: Chosen) -> dict[str, Adapter]:
    """Every merge that is tested, by name."""
    equal = dict.fromkeys(bench.experts, 1.0)
    made: dict[str, Callable[[], Adapter]] = {
        "regmean, chosen": lambda: times(bench.regmean(chosen.weights), chosen.scale),
        "regmean, equal weights": lambda: times(bench.regmean(equal), chosen.scale),
        "regmean, chosen, rank 32": lambda: times(bench.regmean(chosen.weights, 32), chosen.scale),
        "regmean, chosen, rank 16": lambda: times(bench.regmean(chosen.weights, 16), chosen.scale),
        **{name: lambda name=name: merge(bench.experts, name).adapter for name in ("weighted_average", "scaled")},  # type: ignore[misc]
    }
    return {name: make() for name, make in made.items()}


def measured(bench: Bench) -> dict[str, object]:
    """Everything of one seed."""
    chosen = choose(bench)
    print("chosen", chosen.scale, chosen.weights, flush=True)
    merged = merges(bench, chosen)
    matrix = bench.matrix(merged, "test")
    choices = routes(bench, merged["regmean, chosen"])
    matrix = matrix.with_rows({"routed": routed_row(bench, matrix, choices, "regmean, chosen")})
    found = kept(matrix)
    for name, summary in found.summaries.items():
        print(name, "worst", round(summary.worst.value, 3), "mean", round(summary.mean.value, 3), flush=True)
    return {
        "scale": chosen.scale,
        "weights": dict(chosen.weights),
        "validation": chosen.tried,
        "ranks": {name: adapter.rank for name, adapter in merged.items()},
        "routed_to": choices,
        "test": report_json(matrix, found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, experts, moments and losses")
    parser.add_argument("--domains", choices=SETS, default="demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--columns", type=int, default=64, help="of the sketches of input moments")
    parser.add_argument("--validation-blocks", type=int, default=8)
    parser.add_argument("--test-blocks", type=int, default=12)
    asked = parser.parse_args()
    pin_torch(1)
    base = load_base("smollm2", "cpu")
    domains, rank = SETS[asked.domains]
    blocks = {"validation": asked.validation_blocks, "test": asked.test_blocks}
    by_seed: dict[str, object] = {}
    for seed in asked.seeds:
        work = Work(asked.work, base, seed)
        work.build(domains)
        experts = {domain: work.expert(domain) for domain in domains}
        moments = {domain: work.moments(domain, asked.columns, TOKENS) for domain in domains}
        by_seed[str(seed)] = measured(Bench(work, experts, moments, blocks, rank))
        arguments = {name: str(value) for name, value in vars(asked).items() if name != "work"}
        result = write_result(
            f"merge_quality_{asked.domains}", by_seed, {**arguments, "dtype": str(base.dtype)}, asked.seeds
        )
        print(result, flush=True)


if __name__ == "__main__":
    main()
