"""`QwenWorker`: trains one expert on private data, one sync interval at a time; no network access."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.packing import BlockSampler, collate
from fedmoe.lora.adapter import FloatVector, ShapeError
from fedmoe.lora.manifest import Manifest
from fedmoe.models.data_hashes import (
    DIGEST,
    DataChange,
    SampleHashes,
    check_data_change,
    digest_of,
    remove_other_hashes,
    sample_hashes,
    write_hashes,
)
from fedmoe.models.held_out import HeldOutPlan, HeldOutState
from fedmoe.models.worker_state import WorkerCheckpointError, WorkerState, has_state, load_state, save_state
from fedmoe.qwen_finetune import QwenLoRAExpert, StepRecord

__all__ = [
    "CheckpointExtras",
    "EvaluationRecord",
    "IntervalResult",
    "QwenWorker",
    "StepRecord",
    "WorkerCheckpointError",
]

_OPTIMIZER = "optimizer."
_VECTOR = "vector."


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """The held-out loss after a step (0: before the first): nats per token over `tokens` tokens of all ranks.

    `first` and `best` are the first and the lowest loss on these data, `worse` the measurements in a row without
    improvement.
    """

    step: int
    loss: float
    tokens: int
    seconds: float
    first: float
    best: float
    worse: int


@dataclass(frozen=True, slots=True)
class IntervalResult:
    """An interval: steps and labelled tokens done, loss per token over all of them (NaN without steps), seconds."""

    steps: int
    tokens: int
    mean_loss: float
    seconds: float


@dataclass(frozen=True)
class CheckpointExtras:
    """What a caller keeps beside the worker in the same atomic checkpoint: short texts and float32 vectors."""

    texts: Mapping[str, str] = field(default_factory=dict)
    vectors: Mapping[str, FloatVector] = field(default_factory=dict)


class QwenWorker:
    """Owns a `QwenLoRAExpert` and the sampler of this rank's blocks; `hashes` are those of all their samples, if known.

    With several ranks all make the same calls; rank 0's clock, weights and `should_stop` count. `weights`, `rebase`,
    `save` and `restore` may be called between steps only, from the thread that trains.
    """

    def __init__(
        self,
        expert: QwenLoRAExpert,
        sampler: BlockSampler,
        clock: Callable[[], float] = time.monotonic,
        held_out: HeldOutPlan | None = None,
        hashes: SampleHashes | None = None,
    ) -> None:
        self.expert = expert
        self.sampler = sampler
        self.held_out = held_out
        self.measured = HeldOutState(held_out.digest if held_out else "")
        #: How the data differ from those of the checkpoint that `restore` took; None where they do not, or unknown.
        self.data_change: DataChange | None = None
        #: Whether `restore` began a new epoch, since data or their order were others.
        self.new_order = False
        #: Whether the held-out data are others than those of the checkpoint, so that its losses do not count.
        self.measured_anew = False
        self._clock = clock
        self._group = expert.group
        self._hashes = sample_hashes(sampler.blocks) if hashes is None else hashes

    @property
    def step(self) -> int:
        """Optimizer steps done, over all restarts."""
        return self.expert.step

    @property
    def finished(self) -> bool:
        """Whether the schedule is at its end and its result measured, or the held-out loss no longer falls."""
        return self._ended and not self._evaluation_due

    @property
    def _ended(self) -> bool:
        return self.expert.finished or self.stopped_early

    @property
    def _evaluation_due(self) -> bool:
        plan = self.held_out
        return plan is not None and plan.due(self.measured, self.step, self._ended)

    @property
    def stopped_early(self) -> bool:
        """Whether the patience of the held-out plan is over."""
        return self.held_out is not None and self.held_out.exhausted(self.measured)

    @property
    def manifest(self) -> Manifest:
        """The base model and the adapter's shape, which this worker's updates must fit."""
        return self.expert.manifest

    def train_for(
        self,
        seconds: float,
        should_stop: Callable[[], bool],
        on_step: Callable[[StepRecord], None],
        max_steps: int | None = None,
        on_evaluation: Callable[[EvaluationRecord], None] = lambda _: None,
        on_held_out: Callable[[int, int], None] = lambda done, total: None,
    ) -> IntervalResult:
        """Train until `seconds` are over, `should_stop` says so, `max_steps` are done or the schedule ends.

        Whether to go on is asked before each step, so a step is never cut short. `on_step` is called on every rank,
        and so is `on_evaluation` where a held-out plan asks for a measurement; `on_held_out` gets how many blocks
        of it are done, and of how many.
        NonFiniteError passes through: that batch is used up, weights are unchanged, and training may be resumed.
        """
        started, training = self._clock(), self.expert.training
        steps, tokens, nats, size = 0, 0, 0.0, training.per_device_train_batch_size
        while True:
            self._evaluate_if_due(should_stop, on_evaluation, on_held_out)
            over = self._ended or (max_steps is not None and steps >= max_steps)
            if self._group.flag(over or should_stop() or self._clock() >= started + seconds):
                break
            batches = [collate(self.sampler.next(size)) for _ in range(training.gradient_accumulation_steps)]
            result = self.expert.train_step(batches)
            steps, tokens, nats = steps + 1, tokens + result.tokens, nats + result.loss * result.tokens
            on_step(result)
        return IntervalResult(steps, tokens, nats / tokens if tokens else float("nan"), self._clock() - started)

    def weights(self) -> FloatVector:
        """A copy of the local weights, float32 (size,), in the order of the manifest's layout."""
        return self.expert.weights()

    def rebase(self, new_base: FloatVector | None, sent_local: FloatVector | None) -> None:
        """Move onto a new base and keep what was learned since: `local := new_base + (local - sent_local)`, float32.

        `sent_local` is what `weights` gave when the update was made. All ranks call it; what ranks above 0 pass does
        not count and may be None. Raises ShapeError, with nothing changed, for vectors that do not fit.
        """
        if self._group.rank == 0:
            if new_base is None or sent_local is None:
                raise ValueError("rank 0 must pass the new base and the weights that were sent")
            local = self.weights()
            for name, vector in (("new_base", new_base), ("sent_local", sent_local)):
                if vector.dtype != np.float32 or vector.shape != local.shape:
                    raise ShapeError(
                        f"{name}: expected {local.size} float32 numbers, got {vector.dtype} of shape {vector.shape}"
                    )
            local -= sent_local
            local += new_base
            self.expert.load_weights(local)
        self._group.broadcast_(self.expert.attached.parameter.data)

    def load(self, weights: FloatVector | None) -> None:
        """Replace the local weights by rank 0's `weights`, dropping what was learned; all ranks call it."""
        if self._group.rank == 0:
            if weights is None:
                raise ValueError("rank 0 must pass the weights")
            self.expert.load_weights(weights)
        self._group.broadcast_(self.expert.attached.parameter.data)

    def save(self, folder: Path, extras: CheckpointExtras | None = None) -> Path:
        """Write weights, optimizer, step counter and sampler cursor, atomically; returns this rank's file.

        A crash at any moment leaves the previous checkpoint or the new one.
        """
        extras, digest = extras or CheckpointExtras(), digest_of(self._hashes)
        if self._group.rank == 0:
            write_hashes(folder, self._hashes)
        arrays = {"weights": self.weights()}
        arrays |= {_VECTOR + name: vector for name, vector in extras.vectors.items()}
        state = WorkerState(
            arrays | {_OPTIMIZER + name: array for name, array in self.expert.optimizer_state().items()},
            {
                "manifest": self.manifest.to_json(),
                "sampler": self.sampler.state(),
                "data": {DIGEST: digest},
                "held_out": self.measured.to_json(),
                "texts": dict(extras.texts),
            },
        )
        file = save_state(folder, state, self._group)
        if self._group.rank == 0:
            remove_other_hashes(folder, digest)
        return file

    def restore(self, folder: Path, allow_changed_data: bool = False) -> CheckpointExtras | None:
        """Go on from the newest checkpoint in `folder`, or return None when there is none yet.

        Weights, optimizer and step are always taken over. On the same data in the same order so is the place in them;
        on data that grew, or in another order, a new epoch begins, which `new_order` and `data_change` tell.
        Raises WorkerCheckpointError for one that is damaged or was saved by another number of processes or with another
        manifest, and DataError where samples are gone or changed, unless `allow_changed_data`.
        """
        if not self._group.flag(has_state(folder)):
            return None
        state = load_state(folder, self._group)
        saved = Manifest.from_json(dict(state.values["manifest"]))
        differences = saved.differences(self.manifest)
        if differences:
            raise WorkerCheckpointError(f"{folder} was saved by another expert: " + "; ".join(differences[:5]))
        self._restore_place(folder, state, allow_changed_data)
        if self.held_out is not None:
            saved_losses = state.values.get("held_out", {})
            self.measured = HeldOutState.of(saved_losses, self.held_out.digest)
            self.measured_anew = self.measured.step is None and saved_losses.get("step") is not None
        self.expert.load_weights(np.asarray(state.arrays["weights"], np.float32))
        self.expert.load_optimizer_state(_with_prefix(state, _OPTIMIZER))
        vectors = {name: np.asarray(array, np.float32) for name, array in _with_prefix(state, _VECTOR).items()}
        return CheckpointExtras({name: str(text) for name, text in state.values["texts"].items()}, vectors)

    def _restore_place(self, folder: Path, state: WorkerState, allow_changed: bool) -> None:
        """Restore the place in the data or begin a new epoch; if one rank's data changed, all ranks begin anew."""
        saved = {name: int(str(value)) for name, value in state.values["sampler"].items()}
        self.new_order = self._group.any_flag(not self.sampler.fits(saved))
        if not self.new_order:
            self.sampler.restore(saved)
            return
        problem: DataError | None = None
        try:
            self.data_change = check_data_change(folder, state.values.get("data", {}), self._hashes, allow_changed)
        except DataError as error:
            problem = error
        if self._group.any_flag(problem is not None):
            raise problem or DataError("another process of this group found other data; its message says more")
        self.sampler.start_anew(saved)

    def _evaluate_if_due(
        self,
        should_stop: Callable[[], bool],
        on_evaluation: Callable[[EvaluationRecord], None],
        on_held_out: Callable[[int, int], None],
    ) -> None:
        plan = self.held_out
        if plan is None or not self._group.flag(self._evaluation_due and not should_stop()):
            return
        started = self._clock()
        mine = plan.blocks[self._group.rank :: self._group.world_size]
        result = self.expert.evaluate_ranks(mine, self.expert.training.per_device_train_batch_size, on_held_out)
        self.measured = state = self.measured.after(self.step, result.loss, plan.threshold)
        seconds, history = self._clock() - started, (state.first, state.best, state.worse)
        on_evaluation(EvaluationRecord(self.step, result.loss, result.tokens, seconds, *history))


def _with_prefix(state: WorkerState, prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): array for name, array in state.arrays.items() if name.startswith(prefix)}
