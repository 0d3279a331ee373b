"""What `bench_online_gateway.py` runs: workers of different speeds on a virtual clock, and one LoRA on pooled data.

Everything is a function of its inputs, so each leg of training is kept under the hash of what went in,
and a run that was stopped goes on by being started again.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from fedmoe.datasets.tokens.packing import Block, collate
from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.online_merge import ExpertDelta
from fedmoe.models.training_config import TrainingConfig
from fedmoe.qwen_finetune import OptimizerArrays, QwenLoRAExpert
from fedmoe.runtime.files import write_atomic
from lib.trained_experts import BATCH, Work

Arrays = dict[str, NDArray[np.generic]]
Merge = Callable[[Adapter, Mapping[str, ExpertDelta]], Adapter]

#: The same for the workers and for the pooled data: constant after a warm-up that is done once.
TRAINING = TrainingConfig(learning_rate=1e-3, warmup_steps=5, per_device_train_batch_size=BATCH)


@dataclass(frozen=True)
class Kept:
    """Arrays under the hash of what they were made from."""

    folder: Path

    def get(self, made_from: object, arrays: Sequence[NDArray[np.generic]], make: Callable[[], Arrays]) -> Arrays:
        key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode())
        for array in arrays:
            key.update(np.ascontiguousarray(array).data)
        file = self.folder / f"{key.hexdigest()[:32]}.safetensors"
        if not file.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(file, save(make()), 0o644)
        return load(file.read_bytes())


@dataclass
class Trainer:
    """One model that trains whoever's turn it is."""

    work: Work
    kept: Kept
    _model: QwenLoRAExpert | None = field(default=None, repr=False)

    def first(self) -> Adapter:
        """Where all start: A drawn from the seed, B zero."""
        model = self._attached()
        model.load_weights(self._zero)
        return Adapter(model.attached.layout, float(model.attached.alpha), self._zero)

    def leg(
        self, name: str, blocks: Sequence[Block], start: FloatVector, state: OptimizerArrays | None
    ) -> tuple[FloatVector, OptimizerArrays]:
        """Weights and optimizer after a step for every BATCH of `blocks`; without a state the optimizer is new."""

        def make() -> Arrays:
            model = self._attached()
            model.load_weights(start)
            model.load_optimizer_state(state or self._fresh)
            for place in range(0, len(blocks), BATCH):
                done = model.train_step([collate(blocks[place : place + BATCH])])
            print(f"  {name} step {model.step} loss {done.loss:.3f} {done.seconds:.1f} s", flush=True)
            return {"weights": model.weights(), **model.optimizer_state()}

        inputs: list[NDArray[np.generic]] = [start, *(block.input_ids for block in blocks)]
        inputs += [state[key] for key in sorted(state)] if state else []
        found = self.kept.get(["leg", self.work.seed, TRAINING.learning_rate, state is None], inputs, make)
        weights = np.asarray(found.pop("weights"), np.float32)
        return weights, found

    def close(self) -> None:
        if self._model is not None:
            self._model.attached.detach()
            self._model = None

    def _attached(self) -> QwenLoRAExpert:
        if self._model is None:
            self._model = QwenLoRAExpert(self.work.base, self.work.lora, TRAINING)
            self._zero = self._model.weights()
            self._fresh = self._model.optimizer_state()
        return self._model


@dataclass(frozen=True)
class Rules:
    """How experts are rebased onto the gateway: steps from one merge to the next, and what of the optimizer is kept."""

    merge_after: Mapping[str, int]
    carry: bool = True
    staleness: Callable[[int], float] = lambda tau: 1.0


@dataclass(frozen=True, slots=True)
class Moment:
    """The gateway after a merge: virtual time, steps of all experts that went into it, staleness of what was merged."""

    time: float
    steps: int
    expert: str
    tau: int
    gateway: Adapter


@dataclass
class _Worker:
    start: Adapter
    version: int = 0
    done: int = 0
    state: OptimizerArrays | None = None


def live(
    trainer: Trainer,
    streams: Mapping[str, Sequence[Block]],
    speeds: Mapping[str, float],
    rules: Rules,
    merge: Merge,
    horizon: float,
) -> Iterator[Moment]:
    """The gateway after every merge until `horizon`; `speeds` are steps per unit of virtual time. Nobody waits."""
    gateway = trainer.first()
    workers = {name: _Worker(gateway) for name in sorted(streams)}
    queue = [(rules.merge_after[name] / speeds[name], name) for name in workers]
    heapq.heapify(queue)
    version = steps = 0
    while queue and queue[0][0] <= horizon + 1e-9:
        time, name = heapq.heappop(queue)
        worker, count = workers[name], rules.merge_after[name]
        blocks = streams[name][worker.done * BATCH : (worker.done + count) * BATCH]
        weights, state = trainer.leg(name, blocks, worker.start.flat, worker.state)
        tau = version - worker.version
        now = Adapter(gateway.layout, gateway.alpha, weights)
        gateway = merge(gateway, {name: ExpertDelta(worker.start, now, rules.staleness(tau))})
        version, steps = version + 1, steps + count
        workers[name] = _Worker(gateway, version, worker.done + count, state if rules.carry else None)
        heapq.heappush(queue, (time + count / speeds[name], name))
        yield Moment(time, steps, name, tau, gateway)


def pooled(trainer: Trainer, blocks: Sequence[Block], marks: Sequence[int]) -> Iterator[tuple[int, Adapter]]:
    """One LoRA on `blocks`, reported after each number of steps in `marks`, rising."""
    first = trainer.first()
    weights, state, done = first.flat, None, 0
    for mark in marks:
        weights, state = trainer.leg("pooled", blocks[done * BATCH : mark * BATCH], weights, state)
        done = mark
        yield mark, Adapter(first.layout, first.alpha, weights)


def mixed(streams: Mapping[str, Sequence[Block]], seed: int) -> list[Block]:
    """All blocks of all streams in one random order."""
    everything = [block for name in sorted(streams) for block in streams[name]]
    order = np.random.default_rng(seed).permutation(len(everything))
    return [everything[place] for place in order]
