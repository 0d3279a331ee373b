"""What a gateway keeps after all experts trained on from it and were merged again: SmolLM2-135M, held-out text.

    python benchmarks/bench_repeated_merges.py --work FOLDER [--domains demo|unseen|ten] [--laps 1] [--steps 20]

The experts of `bench_merge_quality.py` (40 steps each) are merged into a gateway of their rank
(`fedmoe.lora.online_merge`). Each is rebased onto it and trains for `--steps` steps of 2 x 256 tokens of its own
further text with a new optimizer; what they learned is merged again, `--laps` times. `kept` is (base - gateway) /
(base - the expert of 40 steps), on the same test blocks as there; 1 means as good as every expert on its own domain,
at once, for so many more steps of each.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

from bench_merge_quality import OWN, SETS, TOKENS  # noqa: E402  # threads are pinned first
from lib.trained_experts import BATCH, RANK, STEPS, TRAINING, Work  # noqa: E402

from fedmoe.datasets.tokens.packing import collate  # noqa: E402
from fedmoe.gateway.evaluation_report import report_json  # noqa: E402
from fedmoe.gateway.losses import BASE, LossMatrix  # noqa: E402
from fedmoe.gateway.retained_gain import retained_gains  # noqa: E402
from fedmoe.lora.adapter import Adapter  # noqa: E402
from fedmoe.lora.online_merge import ExpertDelta, merge_into_gateway  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.models.packed import count_targets  # noqa: E402
from fedmoe.qwen_finetune import QwenLoRAExpert  # noqa: E402
from fedmoe.runtime.device import pin_threads as pin_torch  # noqa: E402

#: What the gateway is called after each merge.
MERGES = ("first", "second", "third", "fourth")


def first_adapter(work: Work) -> Adapter:
    """Where the experts of this seed began: B = 0."""
    model = QwenLoRAExpert(work.base, work.lora)
    try:
        return Adapter(model.attached.layout, float(model.attached.alpha), model.weights())
    finally:
        model.attached.detach()


def continued(work: Work, domain: str, gateway: Adapter, done: int, steps: int) -> Adapter:
    """An expert that trains on from the gateway, on the blocks that come after those of its `done` steps."""
    blocks = work.training_blocks(domain, (done + steps) * BATCH)[done * BATCH :]
    model = QwenLoRAExpert(work.base, work.lora, replace(TRAINING, max_steps=steps))
    try:
        model.load_adapter(gateway)
        for step in range(steps):
            report = model.train_step([collate(blocks[step * BATCH : (step + 1) * BATCH])])
            print(f"{domain} step {done + step + 1} loss {report.loss:.3f} {report.seconds:.1f} s", flush=True)
        return Adapter(model.attached.layout, float(model.attached.alpha), model.weights())
    finally:
        model.attached.detach()


def gateways(work: Work, experts: Mapping[str, Adapter], steps: int, laps: int) -> dict[str, Adapter]:
    """The gateway after the first merge, and after every lap."""
    moments = {domain: work.moments(domain, 64, TOKENS) for domain in experts}
    gateway = start = first_adapter(work)
    found: dict[str, Adapter] = {}
    for lap in range(laps + 1):
        done = STEPS + (lap - 1) * steps
        now = {domain: continued(work, domain, gateway, done, steps) for domain in experts} if lap else experts
        gateway = merge_into_gateway(
            gateway, {domain: ExpertDelta(gateway, expert) for domain, expert in now.items()}, moments
        ).adapter
        found[MERGES[lap]] = gateway
    return {BASE: Adapter.zeros(start.layout, start.alpha), **found}


def measured(work: Work, domains: tuple[str, ...], steps: int, laps: int, count: int) -> dict[str, object]:
    """One seed: what the gateway keeps after every merge."""
    work.build(domains)
    experts = {domain: work.expert(domain) for domain in domains}
    found = gateways(work, experts, steps, laps)
    rows = {
        name: {domain: work.block_losses(adapter, "test", domain, count) for domain in domains}
        for name, adapter in found.items()
    }
    rows[OWN] = {domain: work.block_losses(experts[domain], "test", domain, count) for domain in domains}
    blocks = {domain: work.held_out("test", domain, count) for domain in domains}
    tokens = {domain: [count_targets(collate([block])) for block in found] for domain, found in blocks.items()}
    matrix = LossMatrix.of_blocks(rows, tokens)
    return {"test": report_json(matrix, retained_gains(matrix, dict.fromkeys(domains, OWN), MERGES[: laps + 1]))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of bench_merge_quality.py")
    parser.add_argument("--domains", choices=["demo", "unseen", "ten"], default="demo")
    parser.add_argument("--laps", type=int, choices=range(1, len(MERGES)), default=1)
    parser.add_argument("--steps", type=int, default=20, help="of every expert in a lap")
    parser.add_argument("--rank", type=int, default=RANK, help="of the experts and the gateway")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--test-blocks", type=int, default=12)
    asked = parser.parse_args()
    pin_torch(1)
    base = load_base("smollm2", "cpu")
    domains = tuple(SETS[asked.domains][0])
    result = f"repeated_merges_{asked.domains}" + ("" if asked.rank == RANK else f"_rank{asked.rank}")
    by_seed = {}
    for seed in asked.seeds:
        work = Work(asked.work, base, seed, asked.rank)
        by_seed[str(seed)] = measured(work, domains, asked.steps, asked.laps, asked.test_blocks)
        arguments = {name: str(value) for name, value in vars(asked).items() if name != "work"}
        print(write_result(result, by_seed, arguments, asked.seeds), flush=True)


if __name__ == "__main__":
    main()
