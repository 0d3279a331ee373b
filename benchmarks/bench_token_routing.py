"""Experts chosen a prompt or a token at a time: what each way keeps of every expert's own gain.

    python benchmarks/bench_token_routing.py --work FOLDER [--blocks 8]

`--work` is the folder of `bench_merge_quality.py`, with its three experts (trained first where it has none). On
held-out blocks, the share (base - x) / (base - own expert) for

- `sequence`: each block to one expert, by its first 32 tokens and the workers' prompt statistics;
- `spectral, sequence`: the same from the adapters alone (`SpectralRouter`), the likeliest expert however unsure;
- `spectral, token, top K`: in every module each token to the K experts that answer it loudest (`SpectralWeights`);
- `equal`: every token to all experts with equal weights, which is the plain average.

`right` is how often a block goes to its own expert, or how much of a token's weight does; seconds are of the processor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
import torch  # noqa: E402
from lib.routing_baselines import SpectralRouter, SpectralWeights, likeliest  # noqa: E402
from lib.trained_experts import Work  # noqa: E402

from fedmoe.datasets.demo.domains import DOMAINS  # noqa: E402
from fedmoe.datasets.tokens.packing import Block, collate  # noqa: E402
from fedmoe.gateway.evaluate import ROUTED_BY  # noqa: E402
from fedmoe.gateway.routers import SequenceRouter  # noqa: E402
from fedmoe.lora.adapter import FloatMatrix  # noqa: E402
from fedmoe.models.base import LoadedBase, load_base  # noqa: E402
from fedmoe.models.multilora import MultiLora, TokenWeights  # noqa: E402
from fedmoe.models.packed import token_losses  # noqa: E402
from fedmoe.models.prompt_features import prompt_features  # noqa: E402
from fedmoe.runtime.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.worker.statistics import StatisticsBudget, prompt_statistics, sample_prompts  # noqa: E402

BATCH = 4
Way = Callable[[int], AbstractContextManager[None]]


def loss(multi: MultiLora, blocks: Sequence[Block], way: Way) -> float:
    """Mean loss in nats a token."""
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


@dataclass(frozen=True)
class Measured:
    """The experts on one base model and the held-out blocks of one domain."""

    multi: MultiLora
    domain: str
    blocks: Sequence[Block]

    def alone(self, name: str | None, blocks: Sequence[Block]) -> float:
        return loss(self.multi, blocks, lambda rows: self.multi.rows([name] * rows))

    def by_block(self, choices: Sequence[str | None]) -> tuple[float, float]:
        """Loss where block i goes to `choices[i]`, and the share of blocks that go to their own expert."""
        total = 0.0
        for name in set(choices):
            mine = [block for one, block in zip(choices, self.blocks, strict=True) if one == name]
            total += len(mine) * self.alone(name, mine)
        return total / len(self.blocks), sum(one == self.domain for one in choices) / len(self.blocks)

    def by_token(self, names: Sequence[str], weights: TokenWeights) -> tuple[float, float]:
        """Loss where every token is mixed by `weights`, and the share of them that its own expert gets."""
        counted = Counted(weights, len(names))
        found = loss(self.multi, self.blocks, lambda rows: self.multi.mixed(names, counted, rows))
        return found, float(counted.given[names.index(self.domain)] / counted.given.sum())


def row_energies(base: LoadedBase, prompts: Sequence[Sequence[int]], rows: Mapping[str, FloatMatrix]) -> FloatMatrix:
    """How strongly each row p of `rows[module]` (R, n) responds to a prompt, float32 (prompts, R).

    The mean over modules and positions (but position 0) of n (p'x)^2 / ||x||^2 for the module's inputs x (n,) on the
    bare base model; 1 for a unit row and inputs without any direction of their own.
    """
    energies: list[torch.Tensor] = []

    def hear(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...], matrix: torch.Tensor) -> None:
        x = arguments[0][0, 1:] if arguments[0].shape[1] > 1 else arguments[0][0]
        loud = (x @ matrix.T).square() * x.shape[-1] / x.square().sum(dim=-1, keepdim=True).clamp_min(1e-30)
        energies.append(loud.mean(dim=0))

    with ExitStack() as hooks, torch.inference_mode():
        for name, matrix in rows.items():
            hook = partial(hear, matrix=torch.from_numpy(matrix))
            hooks.callback(base.model.get_submodule(name).register_forward_pre_hook(hook).remove)
        for prompt in prompts:
            base.model.base_model(input_ids=torch.tensor([list(prompt)]), use_cache=False)
    means = torch.stack(energies).view(len(prompts), len(rows), -1).mean(dim=1)
    return np.asarray(means.numpy(), np.float32)


def choices_by_block(
    base: LoadedBase, work: Work, spectral: SpectralRouter, held_out: Mapping[str, Sequence[Block]]
) -> dict[str, dict[str, Sequence[str | None]]]:
    """Way -> domain -> the expert of each block."""
    budget = StatisticsBudget().prompt_tokens
    told = {
        domain: prompt_statistics(base, sample_prompts(base, work.training_blocks(domain), budget))
        for domain in held_out
    }
    sequence = SequenceRouter.fit(told)
    found: dict[str, dict[str, Sequence[str | None]]] = {"sequence": {}, "spectral, sequence": {}}
    for domain, blocks in held_out.items():
        prompts = [block.input_ids[:ROUTED_BY].tolist() for block in blocks]
        found["sequence"][domain] = likeliest(sequence, prompt_features(base, prompts))
        energies = row_energies(base, prompts, spectral.projections)
        found["spectral, sequence"][domain] = likeliest(spectral, energies)
    return found


def ways_by_token(spectral: SpectralRouter) -> dict[str, TokenWeights]:
    count = len(spectral.names)
    ways: dict[str, TokenWeights] = {
        f"spectral, token, top {top}": SpectralWeights(spectral.projections, spectral.starts, top, torch.device("cpu"))
        for top in range(1, count + 1)
    }
    ways["equal"] = lambda module, x: torch.full((*x.shape[:2], count), 1 / count)
    return ways


def measure(
    measured: Measured, chosen: Mapping[str, Mapping[str, Sequence[str | None]]], spectral: SpectralRouter
) -> dict[str, dict[str, float]]:
    """Way -> the numbers of one domain."""
    bare = measured.alone(None, measured.blocks)
    own = measured.alone(measured.domain, measured.blocks)
    runs: dict[str, Callable[[], tuple[float, float]]] = {
        label: partial(measured.by_block, choices[measured.domain]) for label, choices in chosen.items()
    }
    runs |= {
        label: partial(measured.by_token, spectral.names, weights) for label, weights in ways_by_token(spectral).items()
    }
    found = {}
    for label, run in runs.items():
        started = time.process_time()
        lost, right = run()
        kept = (bare - lost) / (bare - own)
        seconds = time.process_time() - started
        found[label] = {"kept": round(kept, 4), "right": round(right, 4), "seconds": round(seconds, 2)}
        print(measured.domain, label, found[label], flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--blocks", type=int, default=8, help="held-out blocks of each domain")
    parser.add_argument("--name", default="token_routing", help="of the result's file")
    asked = parser.parse_args()
    pin_torch(1)
    base = load_base("smollm2", "cpu")
    work = Work(asked.work, base)
    work.build()
    experts = {domain: work.expert(domain) for domain in DOMAINS}
    held_out = {domain: work.held_out("test", domain, asked.blocks) for domain in DOMAINS}
    spectral = SpectralRouter.of(experts)
    chosen = choices_by_block(base, work, spectral, held_out)
    multi = MultiLora(base.model, [module.name for module in experts[DOMAINS[0]].layout.modules])
    for name, expert in experts.items():
        multi.add(name, expert)
    results = {
        domain: measure(Measured(multi, domain, blocks), chosen, spectral) for domain, blocks in held_out.items()
    }
    print(write_result(asked.name, results, {key: str(value) for key, value in vars(asked).items()}))


if __name__ == "__main__":
    main()
