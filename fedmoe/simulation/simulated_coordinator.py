"""The coordinator of a simulation: the real one with the real codec, one update after another, counted."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fedmoe.coordinator import CentralCoordinator, Submission
from fedmoe.experts import ExpertModel
from fedmoe.federation.aggregation import Aggregation
from fedmoe.federation.events import UpdateHeld
from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.codec import WireDtype, decode, encode
from fedmoe.lora.manifest import Manifest
from fedmoe.runtime.errors import RefusedError
from fedmoe.simulation.clock import VirtualClock
from fedmoe.simulation.fleet import WorkerProfile, expert_name
from fedmoe.simulation.tally import FleetTally
from fedmoe.simulation.work import Learned


@dataclass(frozen=True, slots=True)
class PulledWeights:
    """An expert's weights as they arrive: decoded, read-only, of a version, and how many bytes they were."""

    weights: FloatVector
    version: int
    size: int


@dataclass(frozen=True, slots=True)
class SentUpdate:
    """An update under way: its bytes, what they decode to, its number among its worker's, its base, what it tells.

    Both ends decode the same bytes, so it is done once.
    """

    worker: WorkerProfile
    body: bytes
    delta: FloatVector
    sequence: int
    base_version: int
    learned: Learned


@dataclass(frozen=True, slots=True)
class PushAnswer:
    """The newest weights, and the update as it landed: `staleness` None where it was held, or refused.

    What a refused one brought is `returned`: local progress again.
    """

    newest: PulledWeights
    staleness: int | None
    returned: bool


class SimulatedCoordinator:
    """A `CentralCoordinator` that takes updates from a queue, at most `updates_per_second` of them.

    The deltas of the first `record` updates that landed are kept in `recorded`.
    """

    def __init__(
        self,
        clock: VirtualClock,
        aggregation: Aggregation,
        manifest: Manifest,
        experts: int,
        updates_per_second: float | None = None,
        record: int = 0,
    ) -> None:
        self.central = CentralCoordinator(aggregation)
        self.manifest = manifest
        self.tally = FleetTally()
        self.recorded: list[FloatVector] = []
        self._record = record
        self._clock = clock
        self._names = [expert_name(number) for number in range(experts)]
        self._seconds_each = 1.0 / updates_per_second if updates_per_second else 0.0
        self._free = 0.0
        self._pulled: dict[tuple[int, WireDtype], PulledWeights] = {}
        for name in self._names:
            self.central.register_expert(name, manifest)

    def expert(self, number: int) -> ExpertModel:
        """An expert by its number."""
        return self.central.experts[self._names[number]]

    def pull(self, expert: int, dtype: WireDtype) -> PulledWeights:
        """The newest weights of an expert as they travel in this precision."""
        model = self.expert(expert)
        pulled = self._pulled.get((expert, dtype))
        if pulled is None or pulled.version != model.version:
            layout, weights = self.manifest.layout, model.state.weights
            body = encode(layout, weights, dtype)
            # float32 travels without loss: many workers share the coordinator's own memory.
            arrived = weights if dtype == "fp32" else decode(body, layout).flat
            pulled = self._pulled[expert, dtype] = PulledWeights(arrived, model.version, len(body))
        return pulled

    def queue(self, decide: Callable[[], None]) -> None:
        """Let a decision wait for its turn."""
        now = self._clock.now
        self._free = max(self._free, now) + self._seconds_each
        self.tally.longest_queue_seconds = max(self.tally.longest_queue_seconds, self._free - now)
        self._clock.at(self._free, decide)

    def push(self, sent: SentUpdate) -> PushAnswer:
        """Let the coordinator decide on an update, as its committer does."""
        tally, worker, delta = self.tally, sent.worker, sent.delta
        identity = (self._names[worker.expert], worker.name, "simulated", sent.sequence, sent.base_version)
        norm = math.sqrt(float(np.square(delta, dtype=np.float64).sum()))
        submission = Submission(*identity, hashlib.sha256(sent.body).hexdigest(), sent.learned.info, norm)
        try:
            update = self.central.push_update(submission, delta, self._clock.now)
        except RefusedError as refused:
            tally.refused[refused.code] += 1
            return PushAnswer(self.pull(worker.expert, "fp32"), None, returned=True)
        tally.stored += 1
        tally.stored_bytes += len(sent.body)
        if isinstance(update, UpdateHeld):
            tally.held += 1
            return PushAnswer(self.pull(worker.expert, "fp32"), None, returned=False)
        if len(self.recorded) < self._record:
            self.recorded.append(delta)
        return PushAnswer(self.pull(worker.expert, "fp32"), update.staleness, returned=False)
