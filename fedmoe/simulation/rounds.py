"""Synchronous rounds on the same clock: a cohort pulls, trains and pushes, and is waited for before it is averaged.

Each expert has rounds of its own. A worker that is off is waited for; one that leaves for good is not, and one that
comes takes part from the next round on. With a deadline a round ends then, and whoever is late begins anew in the next
one. The mean lands as one fresh update of the real coordinator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.codec import decode, encode
from fedmoe.simulation.clock import VirtualClock
from fedmoe.simulation.config import RoundScheme
from fedmoe.simulation.fleet import Link, WorkerProfile
from fedmoe.simulation.presence import Presence
from fedmoe.simulation.simulated_coordinator import PulledWeights, SentUpdate, SimulatedCoordinator
from fedmoe.simulation.work import Learned, LocalWorker

Member = tuple[WorkerProfile, LocalWorker]


@dataclass
class _Round:
    """A round: what its members start from, until when it waits for whom, and what has come, by their numbers."""

    number: int
    newest: PulledWeights
    deadline: float
    waiting: set[int]
    deltas: dict[int, FloatVector] = field(default_factory=dict)
    learned: Learned = Learned()


class ExpertRounds:
    """The rounds of one expert; `start` plans all of them."""

    def __init__(
        self,
        members: list[Member],
        scheme: RoundScheme,
        coordinator: SimulatedCoordinator,
        clock: VirtualClock,
        seed: int,
    ) -> None:
        self._members, self._scheme = members, scheme
        self._coordinator, self._clock = coordinator, clock
        self._expert = members[0][0].expert
        self._server = WorkerProfile(-1 - self._expert, self._expert, 1.0, Link(1.0, 1.0, 0.0), Presence())
        self._random = np.random.default_rng([seed, self._expert, 3])
        self._count = 0

    def start(self, moment: float) -> None:
        """Plan the first round, for a moment or for when the first worker comes after it."""
        self._clock.at(moment, self._begin)

    def _begin(self) -> None:
        now = self._clock.now
        present = [member for member in self._members if member[0].presence.joins <= now < member[0].presence.leaves]
        if not present:
            later = [joins for profile, _ in self._members if (joins := profile.presence.joins) > now]
            self._clock.at(min(later, default=math.inf), self._begin)
            return
        size = max(1, round(self._scheme.cohort * len(present)))
        chosen = sorted(self._random.choice(len(present), size, replace=False).tolist())
        newest = self._coordinator.pull(self._expert, self._scheme.wire_dtype)
        deadline = now + self._scheme.deadline if self._scheme.deadline is not None else math.inf
        round_ = _Round(self._count, newest, deadline, {present[place][0].number for place in chosen})
        self._clock.at(deadline, lambda: self._end_if_over(round_))
        for place in chosen:
            self._send_out(present[place], round_)

    def _send_out(self, member: Member, round_: _Round) -> None:
        """Plan a member's round: what it downloads, trains and uploads, or its leaving before that is done."""
        profile, _ = member
        self._clock.at(profile.presence.leaves, lambda: self._finished(profile, round_))
        seconds = profile.link.down_seconds(round_.newest.size)
        downloaded = profile.presence.transfer(self._clock.now, seconds).end
        self._clock.at(downloaded, lambda: self._downloaded(member, round_))

    def _downloaded(self, member: Member, round_: _Round) -> None:
        profile, _ = member
        if profile.number not in round_.waiting:
            return
        self._coordinator.tally.bytes_down += round_.newest.size
        trained = profile.presence.after(self._clock.now, self._scheme.local_steps * profile.step_seconds)
        self._clock.at(trained, lambda: self._trained(member, round_))

    def _trained(self, member: Member, round_: _Round) -> None:
        profile, local = member
        if profile.number not in round_.waiting:
            return
        local.load(round_.newest.weights)
        learned = local.train(self._scheme.local_steps)
        self._coordinator.tally.steps += learned.steps
        layout = self._coordinator.manifest.layout
        body = encode(layout, local.weights() - round_.newest.weights, self._scheme.wire_dtype)
        upload = profile.presence.transfer(self._clock.now, profile.link.up_seconds(len(body)))
        self._coordinator.tally.cut_off += upload.cut_off
        self._clock.at(upload.end, lambda: self._arrived(profile, round_, body, learned))

    def _arrived(self, profile: WorkerProfile, round_: _Round, body: bytes, learned: Learned) -> None:
        self._coordinator.tally.arrived(self._clock.now, len(body))
        round_.deltas[profile.number] = decode(body, self._coordinator.manifest.layout).flat
        round_.learned += learned
        self._coordinator.queue(lambda: self._finished(profile, round_))

    def _finished(self, profile: WorkerProfile, round_: _Round) -> None:
        """A round no longer waits for this member."""
        if profile.number in round_.waiting:
            round_.waiting.discard(profile.number)
            self._end_if_over(round_)

    def _end_if_over(self, round_: _Round) -> None:
        """End a round that waits for nobody, or whose deadline is over once it has something to average."""
        in_time = self._clock.now < round_.deadline or not round_.deltas
        if round_.number != self._count or (round_.waiting and in_time):
            return
        round_.waiting.clear()
        if round_.deltas:
            self._average(round_)
        self._count += 1
        self._begin()

    def _average(self, round_: _Round) -> None:
        """Land the mean of what came, in the order of the workers' numbers."""
        layout, numbers = self._coordinator.manifest.layout, sorted(round_.deltas)
        total = np.zeros(layout.size)
        for number in numbers:
            total += round_.deltas[number]
        body = encode(layout, (total / len(numbers)).astype(np.float32))
        delta = decode(body, layout).flat
        self._coordinator.push(
            SentUpdate(self._server, body, delta, round_.number, round_.newest.version, round_.learned)
        )
        self._coordinator.tally.rounds += 1
        for number in numbers:
            self._coordinator.tally.landed(number, 0)
