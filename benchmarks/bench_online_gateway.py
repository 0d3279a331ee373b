"""The online gateway against one LoRA on the pooled data: SmolLM2-135M, three workers of speeds 1, 2 and 4.

    python benchmarks/bench_online_gateway.py --work FOLDER [--seeds 0] [--horizon 30] [--blocks 12]

On a virtual clock the workers train an expert of rank 16 on the demonstration's three domains, 1, 2 and 4 steps of
2 x 256 tokens per unit of time. Whoever has done `--merge-after` steps is merged into the gateway and rebased onto it;
nobody waits. The pooled LoRA gets the same blocks, shuffled, with the same optimizer and learning rate (constant after
a warm-up of 5 steps). Both start from the same A.

Compared at equal time (pooled on a machine of each speed, and of the mean speed 7/3) and at equal total steps, on
held-out test blocks of files that no choice was made on (`--half validation` is for choosing). A gain is base - x in
nats per token; intervals are 95 % of a paired bootstrap over blocks and know nothing of other seeds. Data, legs of
training, merges and losses stay in `--work`: a run that was stopped goes on when it is started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lib.harness import RESULTS, pin_threads, write_result

pin_threads(1)

from lib.online_gateway import Kept, Moment, Rules, Trainer, live, mixed, pooled  # noqa: E402
from lib.online_gateway_chart import MACHINES, Gains, chart  # noqa: E402  # threads are pinned first
from lib.trained_experts import BATCH, Work  # noqa: E402

from fedmoe.datasets.demo.domains import DOMAINS  # noqa: E402
from fedmoe.datasets.tokens.packing import Block, collate  # noqa: E402
from fedmoe.gateway.losses import BASE, LossMatrix  # noqa: E402
from fedmoe.gateway.retained_gain import BootstrapInterval, retained_gains  # noqa: E402
from fedmoe.lora.adapter import Adapter  # noqa: E402
from fedmoe.lora.moments import InputMoments  # noqa: E402
from fedmoe.lora.online_merge import ExpertDelta, merge_into_gateway  # noqa: E402
from fedmoe.lora.update_rules import STALENESS  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.models.packed import count_targets  # noqa: E402
from fedmoe.runtime.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.runtime.files import write_atomic  # noqa: E402

SPEEDS = dict(zip(DOMAINS, (1, 2, 4), strict=True))
TOKENS = 6_000

Rows = dict[str, dict[str, list[float]]]


@dataclass(frozen=True)
class Run:
    """One seed: the training blocks of each domain, and which blocks to score on."""

    work: Work
    half: str
    blocks: int
    horizon: int
    columns: int

    def streams(self) -> dict[str, list[Block]]:
        """What each worker trains on until the horizon, in order."""
        return {name: self.work.training_blocks(name, BATCH * speed * self.horizon) for name, speed in SPEEDS.items()}

    def moments(self) -> dict[str, InputMoments]:
        return {domain: self.work.moments(domain, self.columns, TOKENS) for domain in DOMAINS}

    def row(self, adapter: Adapter) -> dict[str, list[float]]:
        """An adapter's block losses on every domain."""
        return {domain: self.work.block_losses(adapter, self.half, domain, self.blocks) for domain in DOMAINS}

    def matrix(self, rows: Mapping[str, Mapping[str, list[float]]]) -> LossMatrix:
        held_out = {domain: self.work.held_out(self.half, domain, self.blocks) for domain in DOMAINS}
        tokens = {domain: [count_targets(collate([block])) for block in blocks] for domain, blocks in held_out.items()}
        return LossMatrix.of_blocks(rows, tokens)


def marks_of(horizon: int) -> tuple[list[int], list[int]]:
    """When the gateway is scored, and when it is compared: six times, and half way and at the end."""
    return [horizon * part // 6 for part in range(1, 7)], [horizon // 2, horizon]


def steps_of(machine: str, time: int) -> int:
    return round(MACHINES[machine] * time)


def online_rows(run: Run, trainer: Trainer, rules: Rules, scale: float, rows: Rows) -> list[dict[str, object]]:
    """Adds the gateway at every mark to `rows`; returns every merge."""
    moments = run.moments()

    def merge_in(gateway: Adapter, ready: Mapping[str, ExpertDelta]) -> Adapter:
        return merge_into_gateway(gateway, ready, moments, scale=scale).adapter

    waiting, _ = marks_of(run.horizon)
    merges: list[dict[str, object]] = []
    newest: Moment | None = None
    for moment in live(trainer, run.streams(), SPEEDS, rules, merge_in, run.horizon):
        waiting = score_until(run, trainer, waiting, moment.time, newest, rows)
        newest = moment
        merges.append({"time": moment.time, "expert": moment.expert, "tau": moment.tau, "steps": moment.steps})
    score_until(run, trainer, waiting, run.horizon + 1, newest, rows)
    return merges


def score_until(
    run: Run, trainer: Trainer, waiting: list[int], time: float, newest: Moment | None, rows: Rows
) -> list[int]:
    """Scores the newest gateway for all marks before `time`; gives the marks that are left."""
    for mark in (mark for mark in waiting if mark < time - 1e-9):
        if newest is None:
            break
        trainer.close()
        rows[online_name(mark)] = run.row(newest.gateway)
        report(run, rows, online_name(mark))
    return [mark for mark in waiting if mark >= time - 1e-9]


def pooled_rows(run: Run, trainer: Trainer, rows: Rows) -> None:
    """Adds the pooled LoRA after all steps that anything is compared with."""
    _, compared = marks_of(run.horizon)
    marks = sorted({steps_of(machine, time) for machine in MACHINES for time in compared})
    for steps, adapter in pooled(trainer, mixed(run.streams(), run.work.seed), marks):
        trainer.close()
        rows[pooled_name(steps)] = run.row(adapter)
        report(run, rows, pooled_name(steps))


def online_name(time: int) -> str:
    return f"online, time {time}"


def pooled_name(steps: int) -> str:
    return f"pooled, {steps} steps"


def report(run: Run, rows: Rows, name: str) -> None:
    found = gains(run.matrix({BASE: rows[BASE], name: rows[name]}), name)
    print(name, {domain: round(gain, 4) for domain, gain in found.items()}, flush=True)


def gains(matrix: LossMatrix, model: str) -> dict[str, float]:
    """Base less model in nats per token on every domain, and the mean."""
    found = {domain: matrix.losses[BASE][domain] - matrix.losses[model][domain] for domain in matrix.domains}
    return {**found, "mean": sum(found.values()) / len(found)}


def compared(matrix: LossMatrix, time: int, machine: str) -> dict[str, object]:
    """The gateway's gain as a share of the pooled one's, with intervals; the mean is of gains, not of shares.

    No share is given where the pooled gain may be none.
    """
    ours, theirs = online_name(time), pooled_name(steps_of(machine, time))
    found = retained_gains(matrix, dict.fromkeys(DOMAINS, theirs), [ours])
    shares = {one.domain: None if one.warning else rounded(one.retained[ours]) for one in found.domains}
    mean = gains(matrix, ours)["mean"] / gains(matrix, theirs)["mean"]
    return {"pooled_steps": steps_of(machine, time), "share": shares, "share_of_mean_gain": round(mean, 4)}


def rounded(found: BootstrapInterval) -> list[float]:
    return [round(part, 4) for part in (found.value, found.low, found.high)]


def trained(run: Run, rules: Rules, scale: float) -> tuple[Rows, list[dict[str, object]]]:
    """One seed: the block losses of all that is compared, and every merge."""
    trainer = Trainer(run.work, Kept(run.work.folder / "living"))
    first = trainer.first()
    trainer.close()
    rows: Rows = {BASE: run.row(Adapter.zeros(first.layout, first.alpha))}
    merges = online_rows(run, trainer, rules, scale, rows)
    pooled_rows(run, trainer, rows)
    return rows, merges


def summary(run: Run, matrix: LossMatrix) -> dict[str, object]:
    """Gains, comparisons, and the block losses they come from."""
    _, times = marks_of(run.horizon)
    found = {name: gains(matrix, name) for name in matrix.models}
    return {
        "gains": {name: {domain: round(gain, 4) for domain, gain in row.items()} for name, row in found.items()},
        "compared": {
            f"time {time}": {machine: compared(matrix, time, machine) for machine in MACHINES} for time in times
        },
        "block_losses": {
            name: {domain: [round(loss, 5) for loss in losses] for domain, losses in row.items()}
            for name, row in matrix.block_losses.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data, training, moments and losses")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--horizon", type=int, default=30, help="units of virtual time, a multiple of 6")
    parser.add_argument("--merge-after", type=int, default=10, help="steps from one merge of an expert to the next")
    parser.add_argument("--scale", type=float, default=1.0, help="what the deltas are multiplied with")
    parser.add_argument("--columns", type=int, default=32, help="of the sketch of the input moments")
    parser.add_argument("--staleness", choices=sorted(STALENESS), default="constant")
    parser.add_argument("--fresh-optimizer", action="store_true", help="a new optimizer and warm-up after every merge")
    parser.add_argument("--half", choices=("validation", "test"), default="test")
    parser.add_argument("--blocks", type=int, default=12, help="held-out blocks of each domain")
    parser.add_argument("--name", default="online_gateway", help="of the result's file and chart")
    chosen = parser.parse_args()
    pin_torch(1)
    base = load_base("smollm2", "cpu")
    rules = Rules(dict.fromkeys(DOMAINS, chosen.merge_after), not chosen.fresh_optimizer, STALENESS[chosen.staleness])
    by_seed: dict[str, object] = {}
    gains_by_seed: list[Gains] = []
    for seed in chosen.seeds:
        work = Work(chosen.work, base, seed)
        work.build()
        run = Run(work, chosen.half, chosen.blocks, chosen.horizon, chosen.columns)
        rows, merges = trained(run, rules, chosen.scale)
        matrix = run.matrix(rows)
        gains_by_seed.append({name: gains(matrix, name) for name in rows})
        by_seed[str(seed)] = {**summary(run, matrix), "merges": merges}
        arguments = {name: str(value) for name, value in vars(chosen).items() if name != "work"}
        arguments |= {"speeds": str(SPEEDS), "dtype": str(base.dtype)}
        print(write_result(chosen.name, by_seed, arguments, chosen.seeds), flush=True)
    write_atomic(RESULTS / f"{chosen.name}.png", chart(gains_by_seed, MACHINES, chosen.horizon), 0o644)


if __name__ == "__main__":
    main()
