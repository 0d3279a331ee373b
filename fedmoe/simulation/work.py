"""What workers do between two syncs, as the schemes see it: local weights that steps change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.manifest import Manifest
from fedmoe.simulation.fleet import WorkerProfile


@dataclass(frozen=True, slots=True)
class Learned:
    """Steps and labelled tokens done, and the sum of the loss over those tokens in nats; no tokens, no loss."""

    steps: int = 0
    tokens: int = 0
    nats: float = 0.0

    def __add__(self, other: Learned) -> Learned:
        return Learned(self.steps + other.steps, self.tokens + other.tokens, self.nats + other.nats)

    @property
    def info(self) -> dict[str, float]:
        """What an update tells beside its numbers."""
        facts = {"steps": float(self.steps), "tokens": float(self.tokens)}
        return facts | ({"loss": self.nats / self.tokens} if self.tokens else {})


class LocalWorker(Protocol):
    """Local weights, float32 (size,); the calls of `fedmoe.qwen_worker.QwenWorker` that a sync is made of."""

    def train(self, steps: int) -> Learned:
        """Do so many steps, one at least."""
        ...

    def weights(self) -> FloatVector:
        """A copy of the local weights."""
        ...

    def load(self, weights: FloatVector) -> None:
        """Replace the local weights."""
        ...

    def rebase(self, new_base: FloatVector, sent_local: FloatVector) -> None:
        """`local := new_base + (local - sent_local)`."""
        ...


class FleetWork(Protocol):
    """The work of a whole fleet; the same for every scheme."""

    @property
    def manifest(self) -> Manifest:
        """What all experts share."""
        ...

    def worker(self, profile: WorkerProfile) -> LocalWorker:
        """A worker as it is before its first step."""
        ...

    def loss(self, expert: int, weights: FloatVector) -> float | None:
        """The held-out loss of an expert in nats per token; None where nothing is trained."""
        ...
