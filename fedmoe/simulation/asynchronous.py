"""Workers of the asynchronous scheme: pull, train, push, and rebase onto the newest version, as `DistributedWorker`.

A worker acts between two steps only. It cuts an update every `sync_interval` seconds if none is under way, trains on
while one is, and rebases at the end of the step in which the answer comes. A worker that is off does none of it.
"""

from __future__ import annotations

import math

from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.codec import decode, encode
from fedmoe.simulation.clock import Action, VirtualClock
from fedmoe.simulation.config import AsynchronousScheme
from fedmoe.simulation.fleet import WorkerProfile
from fedmoe.simulation.simulated_coordinator import PulledWeights, PushAnswer, SentUpdate, SimulatedCoordinator
from fedmoe.simulation.work import Learned, LocalWorker

# A step that ends this share of a step after a moment ends at it: sums of floats are no exact multiples.
_ROUNDING = 1e-9


class AsynchronousWorker:
    """One worker; `start` plans all it does."""

    def __init__(
        self,
        profile: WorkerProfile,
        local: LocalWorker,
        scheme: AsynchronousScheme,
        coordinator: SimulatedCoordinator,
        clock: VirtualClock,
    ) -> None:
        self._profile, self._local, self._scheme = profile, local, scheme
        self._coordinator, self._clock = coordinator, clock
        self._step_end = self._cut_at = 0.0
        self._sequence = 0
        self._learned = self._under_way = Learned()
        self._base: PulledWeights | None = None
        self._reference: FloatVector | None = None

    def start(self) -> None:
        """Plan the first pull, for when the worker comes."""
        asked = self._profile.presence.transfer(0.0, self._profile.link.latency)
        self._clock.at(asked.end, self._ask)

    def _ask(self) -> None:
        newest = self._coordinator.pull(self._profile.expert, self._scheme.wire_dtype)
        self._clock.at(self._download(newest), lambda: self._begin(newest))

    def _download(self, newest: PulledWeights) -> float:
        return self._profile.presence.transfer(self._clock.now, self._profile.link.down_seconds(newest.size)).end

    def _begin(self, newest: PulledWeights) -> None:
        self._coordinator.tally.bytes_down += newest.size
        self._local.load(newest.weights)
        self._base, self._reference = newest, newest.weights
        self._step_end = self._cut_at = self._clock.now
        self._train_to_cut()

    def _train_to_cut(self) -> None:
        self._train_until(self._cut_at + self._scheme.sync_interval, 0 if self._learned.steps else 1, self._cut)

    def _train_until(self, moment: float, least: int, then: Action) -> None:
        """Plan `then` for the end of the first step at or after `moment`, with all steps before it done."""
        presence, seconds = self._profile.presence, self._profile.step_seconds
        worked = presence.worked(self._step_end, moment)
        steps = max(least, math.ceil(worked / seconds - _ROUNDING))
        self._clock.at(presence.after(self._step_end, steps * seconds), lambda: self._trained(steps, then))

    def _trained(self, steps: int, then: Action) -> None:
        if steps:
            self._learned += self._local.train(steps)
            self._coordinator.tally.steps += steps
        self._step_end = self._clock.now
        then()

    def _cut(self) -> None:
        """Encode what was learned since the base, and send it."""
        assert self._base is not None, "the first thing is a pull"
        layout, dtype = self._coordinator.manifest.layout, self._scheme.wire_dtype
        local = self._local.weights()
        body = encode(layout, local - self._base.weights, dtype)
        delta = decode(body, layout).flat
        self._reference = local if dtype == "fp32" else self._base.weights + delta
        sent = SentUpdate(self._profile, body, delta, self._sequence, self._base.version, self._learned)
        self._sequence += 1
        self._under_way, self._learned = self._learned, Learned()
        self._cut_at = self._clock.now
        upload = self._profile.presence.transfer(self._clock.now, self._profile.link.up_seconds(len(body)))
        self._coordinator.tally.cut_off += upload.cut_off
        self._clock.at(upload.end, lambda: self._arrived(sent))

    def _arrived(self, sent: SentUpdate) -> None:
        self._coordinator.tally.arrived(self._clock.now, len(sent.body))
        self._coordinator.queue(lambda: self._decided(sent))

    def _decided(self, sent: SentUpdate) -> None:
        answer = self._coordinator.push(sent)
        if answer.staleness is not None:
            self._coordinator.tally.landed(self._profile.number, answer.staleness)
        self._clock.at(self._download(answer.newest), lambda: self._answered(answer))

    def _answered(self, answer: PushAnswer) -> None:
        self._coordinator.tally.bytes_down += answer.newest.size
        self._train_until(self._clock.now, 0, lambda: self._absorb(answer))

    def _absorb(self, answer: PushAnswer) -> None:
        """Rebase onto the newest weights; what a refused update brought stays local progress."""
        assert self._base is not None, "there was an update"
        assert self._reference is not None, "there was an update"
        reference = self._base.weights if answer.returned else self._reference
        self._local.rebase(answer.newest.weights, reference)
        self._base, self._reference = answer.newest, answer.newest.weights
        if answer.returned:
            self._learned += self._under_way
        self._train_to_cut()
