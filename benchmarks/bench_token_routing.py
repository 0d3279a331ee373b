"""Experts chosen a prompt or a token at a time: what each way keeps of every expert's own gain.

    python benchmarks/bench_token_routing.py --work FOLDER [--blocks 8]

`--work` is the folder of `bench_merge_quality.py`, with its three experts (trained first where it has none). On held-out
blocks, the share (base - x) / (base - own expert) for

- `sequence`: each block to one expert, by its first 32 tokens and the workers' prompt statistics;
- `spectral, sequence`: the same from the adapters alone (`SpectralRouter`), the likeliest expert however unsure;
- `spectral, token, top K`: in every module each token to the K experts that answer it loudest (`SpectralWeights`);
- `equal`: every token to all experts with equal weights, which is the plain average.

`right` is how often a block goes to its own expert, or how much of a token's weight does; seconds are of the processor.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
import torch  # noqa: E402
from merge_quality_work import Work  # noqa: E402

from fedmoe.datasets.domains import DOMAINS  # noqa: E402
from fedmoe.datasets.packing import Block, collate  # noqa: E402
from fedmoe.gateway.evaluate import ROUTED_BY  # noqa: E402
from fedmoe.gateway.route import SequenceRouter, SpectralRouter  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.models.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.models.multilora import MultiLora, TokenWeights  # noqa: E402
from fedmoe.models.packed import token_losses  # noqa: E402
from fedmoe.models.prompt_features import prompt_features, row_energies  # noqa: E402
from fedmoe.models.token_routing import SpectralWeights  # noqa: E402
from fedmoe.worker.statistics import StatisticsBudget, prompt_statistics  # noqa: E402

BATCH = 4


def loss(
    base: object, multi: MultiLora, blocks: Sequence[Block], way: Callable[[int], AbstractContextManager[None]]
) -> float:
    """Mean loss in nats a token; `way` makes the rows of a batch of so many blocks."""
    total, count = 0.0, 0
    for start in range(0, len(blocks), BATCH):
        some = blocks[start : start + BATCH]
        with torch.no_grad(), way(len(some)):
            losses, _ = token_losses(multi.model, collate(some), multi.device)
        total, count = total + float(losses.double().sum()), count + len(losses)
    return total / count


class Counted:
    """Token weights that remember how much of them each expert got."""

    def __init__(self, weights: TokenWeights, experts: int) -> None:
        self.weights = weights
        self.given = np.zeros(experts)

    def __call__(self, module: str, x: torch.Tensor) -> torch.Tensor:
        found = self.weights(module, x)
        self.given += found.sum(dim=(0, 1)).double().numpy()
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=8, help="held-out blocks of each domain")
    parser.add_argument("--name", default="token_routing", help="of the result's file")
    chosen = parser.parse_args()
    pin_torch(1)
    base = load_base("smollm2", "cpu")
    work = Work(chosen.work, base)
    work.build()
    experts = {domain: work.expert(domain) for domain in DOMAINS}
    names = tuple(sorted(experts))
    held_out = {domain: work.held_out("test", domain, chosen.blocks) for domain in DOMAINS}
    prompts = {
        domain: [block.input_ids[:ROUTED_BY].tolist() for block in blocks] for domain, blocks in held_out.items()
    }
    budget = StatisticsBudget().prompt_tokens
    told = {domain: prompt_statistics(base, work.training_blocks(domain), budget) for domain in DOMAINS}
    sequence, spectral = SequenceRouter.fit(told, threshold=0.0), SpectralRouter.of(experts, threshold=0.0)
    routes: Mapping[str, Callable[[str], Sequence[str | None]]] = {
        "sequence": lambda domain: sequence.route(prompt_features(base, prompts[domain])).names,
        "spectral, sequence": lambda domain: (
            spectral.route(row_energies(base, prompts[domain], spectral.projections)).names
        ),
    }
    routed = {label: {domain: route(domain) for domain in DOMAINS} for label, route in routes.items()}
    multi = MultiLora(base.model, [module.name for module in experts[names[0]].layout.modules])
    for name in names:
        multi.add(name, experts[name])
    results: dict[str, dict[str, object]] = defaultdict(dict)
    for domain, blocks in held_out.items():
        bare = loss(base, multi, blocks, lambda rows: multi.rows([None] * rows))
        own = loss(base, multi, blocks, lambda rows, mine=domain: multi.rows([mine] * rows))

        def note(label: str, found: float, right: float, started: float, domain: str = domain) -> None:
            kept = round((bare - found) / (bare - own), 4)
            seconds = round(time.process_time() - started, 2)
            results[label][domain] = {"kept": kept, "right": round(right, 4), "seconds": seconds}
            print(domain, label, results[label][domain], flush=True)

        for label, choices in routed.items():
            started = time.process_time()
            ordered = sorted(zip(choices[domain], blocks, strict=True), key=lambda pair: str(pair[0]))
            parts = [
                (len(own_part), loss(base, multi, own_part, lambda rows, name=name: multi.rows([name] * rows)))
                for name in names
                if (own_part := [block for one, block in ordered if one == name])
            ]
            found = sum(count * part for count, part in parts) / len(blocks)
            note(label, found, sum(one == domain for one in choices[domain]) / len(blocks), started)
        ways: dict[str, TokenWeights] = {
            f"spectral, token, top {top}": SpectralWeights(spectral.projections, spectral.starts, top, multi.device)
            for top in (1, 2, 3)
        }
        ways["equal"] = lambda module, x: torch.full((*x.shape[:2], len(names)), 1 / len(names))
        for label, weights in ways.items():
            started, counted = time.process_time(), Counted(weights, len(names))
            found = loss(base, multi, blocks, lambda rows, counted=counted: multi.mixed(names, counted, rows))
            note(label, found, counted.given[names.index(domain)] / counted.given.sum(), started)
    print(write_result(chosen.name, dict(results), {key: str(value) for key, value in vars(chosen).items()}))


if __name__ == "__main__":
    main()
