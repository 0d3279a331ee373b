"""Progress not yet sent: steps, tokens and loss since the last update, and the sync state in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from fedmoe.lora.adapter import FloatVector
from fedmoe.qwen_worker import CheckpointExtras, StepRecord

_REFERENCE = "reference"


@dataclass(frozen=True, slots=True)
class Progress:
    """Optimizer steps, the labelled tokens in them, and their summed loss in nats, for an update's header."""

    steps: int = 0
    tokens: int = 0
    nats: float = 0.0

    @property
    def mean_loss(self) -> float | None:
        """Nats per token; None without tokens."""
        return self.nats / self.tokens if self.tokens else None

    def after(self, record: StepRecord) -> Progress:
        """With one more step."""
        return self + Progress(1, record.tokens, record.loss * record.tokens)

    def __add__(self, other: Progress) -> Progress:
        return Progress(self.steps + other.steps, self.tokens + other.tokens, self.nats + other.nats)


@dataclass(frozen=True)
class WorkerSyncPoint:
    """Where the sync stands in a checkpoint: what no update has carried is the local weights minus `reference`.

    That holds while the next update's number is `next_sequence`; a later update carried it. `absorbed` is the number
    of a refused update whose content is part of the local weights again. `incarnation` names the history that
    `reference` is of; None in a checkpoint of an older program.
    """

    reference: FloatVector
    next_sequence: int
    progress: Progress
    absorbed: int | None = None
    incarnation: str | None = None

    def companion(self) -> CheckpointExtras:
        """As a checkpoint keeps it."""
        progress = self.progress
        texts = {
            "next_sequence": str(self.next_sequence),
            "steps": str(progress.steps),
            "tokens": str(progress.tokens),
            "nats": progress.nats.hex(),
        }
        if self.absorbed is not None:
            texts["absorbed"] = str(self.absorbed)
        if self.incarnation is not None:
            texts["incarnation"] = self.incarnation
        return CheckpointExtras(texts, {_REFERENCE: self.reference})

    @classmethod
    def of(cls, companion: CheckpointExtras | None) -> Self | None:
        """What a checkpoint kept; None without one, or for a process that does not talk to the coordinator."""
        if companion is None or _REFERENCE not in companion.vectors:
            return None
        texts = companion.texts
        progress = Progress(int(texts["steps"]), int(texts["tokens"]), float.fromhex(texts["nats"]))
        absorbed = int(texts["absorbed"]) if "absorbed" in texts else None
        incarnation = texts.get("incarnation")
        return cls(companion.vectors[_REFERENCE], int(texts["next_sequence"]), progress, absorbed, incarnation)
