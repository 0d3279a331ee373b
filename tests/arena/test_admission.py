from __future__ import annotations

import json
from collections import deque
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.arena.learning.admission import Admission, AdmissionError

laws = settings(deadline=None, max_examples=100)


class Run:
    """A trainer in small: starts rollouts as admitted, and learns from a full batch as soon as there is one."""

    def __init__(self, admission: Admission, in_order: bool) -> None:
        self.admission = admission
        self.in_order = in_order
        self.version = 0
        self.running: list[int] = []
        self.ready: list[int] = []
        self.started: dict[int, int] = {}
        self.ages: list[int] = []
        self.discarded = 0

    def start(self) -> bool:
        if self.admission.capacity(self.version) < 1:
            return False
        self.admission = self.admission.enqueue().submit(self.version)
        rollout = len(self.started)
        self.started[rollout] = self.version
        self.running.append(rollout)
        return True

    def end(self, which: int, accepted: bool) -> None:
        rollout = self.running.pop(which % len(self.running))
        self.admission = self.admission.accept() if accepted else self.admission.reject()
        self.ready += [rollout] if accepted else []
        self.learn()

    def learn(self) -> None:
        while len(self.available()) >= self.admission.batch:
            for rollout in self.available()[: self.admission.batch]:
                self.ready.remove(rollout)
                self.ages.append(self.version - self.started[rollout])
            self.version += 1
            if not self.in_order:
                self.drop_stale()

    def available(self) -> list[int]:
        """What may be learned from next: in order of the start only up to the first one still running."""
        ready = sorted(self.ready) if self.in_order else list(self.ready)
        oldest = min(self.running, default=len(self.started))
        return [rollout for rollout in ready if rollout < oldest or not self.in_order]

    def drop_stale(self) -> None:
        stale = [r for r in self.ready if not self.admission.is_fresh(self.started[r], self.version)]
        self.ready = [rollout for rollout in self.ready if rollout not in stale]
        self.discarded += len(stale)
        if stale:
            self.admission = self.admission.discard(len(stale))


admissions = st.builds(Admission, st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))
# Per event: start (None), or which of the running rollouts ends and whether it is accepted.
event_lists = st.lists(st.none() | st.tuples(st.integers(0, 11), st.booleans()), max_size=120)


@laws
@given(admissions, event_lists)
def test_learning_in_the_order_of_the_start_bounds_the_age_of_every_rollout(
    admission: Admission, events: list[tuple[int, bool] | None]
) -> None:
    run = Run(admission, in_order=True)
    for event in events:
        if event is None:
            run.start()
        elif run.running:
            run.end(*event)
    assert all(0 <= age <= admission.max_staleness for age in run.ages)
    assert run.admission.running == len(run.running) <= admission.max_concurrent


@laws
@given(admissions, event_lists)
def test_learning_as_they_end_bounds_the_age_where_stragglers_are_discarded(
    admission: Admission, events: list[tuple[int, bool] | None]
) -> None:
    run = Run(admission, in_order=False)
    for event in events:
        if event is None:
            run.start()
        elif run.running:
            which = event[0] % len(run.running)
            fresh = run.admission.is_fresh(run.started[run.running[which]], run.version)
            run.end(which, event[1] and fresh)
    assert all(0 <= age <= admission.max_staleness for age in run.ages)
    assert run.admission.rejected >= run.discarded


@laws
@given(admissions, event_lists, st.booleans())
def test_training_never_waits_for_rollouts_that_may_not_start(
    admission: Admission, events: list[tuple[int, bool] | None], in_order: bool
) -> None:
    run = Run(admission, in_order)
    for event in events:
        if event is None:
            run.start()
        elif run.running:
            run.end(*event)
    while run.running:
        run.end(0, False)
    assert run.admission.capacity(run.version) >= 1


def test_a_straggler_that_others_overtake_is_told_by_its_age() -> None:
    run = Run(Admission(max_concurrent=4, batch=1, max_staleness=1), in_order=False)
    run.start()
    for _ in range(5):
        assert run.start()
        run.end(1, True)
    assert run.version == 5
    assert max(run.ages) <= 1
    assert not run.admission.is_fresh(run.started[0], run.version)


@pytest.mark.parametrize(("version", "fresh"), [(4, False), (5, True), (7, True), (8, False)])
def test_a_rollout_is_fresh_up_to_the_bound_and_not_before_it_was_made(version: int, fresh: bool) -> None:
    assert Admission(1, 1, 2).is_fresh(5, version) is fresh


def test_the_numbers_are_areals() -> None:
    assert Admission(64, 8, 2).capacity(0) == 24
    one = Admission(8, 4, 1)
    assert one.capacity(0) == 8
    running = one.enqueue(8).submit(0, 8)
    assert running.capacity(0) == 0
    done = running.accept(8)
    assert done.capacity(0) == 0
    assert done.capacity(1) == 4


def test_concurrency_bounds_what_staleness_would_allow() -> None:
    assert Admission(3, 8, 2).capacity(0) == 3
    assert Admission(3, 8, 2).pending_limit == 24
    assert Admission(3, 8, 2).enqueue(2).submit(0, 2).capacity(0) == 1


def test_rejected_and_discarded_rollouts_give_their_place_back() -> None:
    full = Admission(8, 4, 0).enqueue(4).submit(0, 4)
    assert full.capacity(0) == 0
    assert full.reject(3).capacity(0) == 3
    assert full.accept(4).capacity(0) == 0
    assert full.accept(4).discard(2).capacity(0) == 2


def test_a_resumed_policy_starts_no_more_than_a_fresh_one() -> None:
    """Without the accepted count the formula would admit a burst of (version + 1) batches: AReaL #1388."""
    fresh = Admission(1000, 8, 2)
    assert fresh.resumed(100).capacity(100) == fresh.capacity(0) == 24
    assert fresh.capacity(100) == 824
    busy = replace(fresh, enqueued=5, running=7, accepted=803)
    assert busy.resumed(100, buffered=3).capacity(100) == 21
    assert (busy.resumed(100).running, busy.resumed(100).enqueued) == (0, 0)


@laws
@given(admissions, event_lists)
def test_a_state_survives_json(admission: Admission, events: list[tuple[int, bool] | None]) -> None:
    run = Run(admission, in_order=True)
    waiting = deque(events)
    while waiting:
        event = waiting.popleft()
        if event is None:
            run.start()
        elif run.running:
            run.end(*event)
    assert Admission.from_state(json.loads(json.dumps(run.admission.state()))) == run.admission


def test_events_that_cannot_happen_are_refused() -> None:
    idle = Admission(2, 2, 0)
    with pytest.raises(AdmissionError, match="capacity is 2"):
        idle.enqueue(3).submit(0, 3)
    with pytest.raises(AdmissionError, match="enqueued would be -1"):
        idle.submit(0)
    for event in (idle.accept, idle.reject):
        with pytest.raises(AdmissionError, match="running would be -1"):
            event()
    with pytest.raises(AdmissionError, match="accepted would be -1"):
        idle.discard()
    with pytest.raises(AdmissionError, match="starts at 1"):
        idle.enqueue(0)


@pytest.mark.parametrize(("concurrent", "batch", "staleness"), [(0, 1, 0), (1, 0, 0), (1, 1, -1)])
def test_settings_that_admit_nothing_are_refused(concurrent: int, batch: int, staleness: int) -> None:
    with pytest.raises(AdmissionError):
        Admission(concurrent, batch, staleness)


@pytest.mark.parametrize("change", [{"running": "1"}, {"running": 1.5}, {"running": True}, {"more": 1}, {"batch": 0}])
def test_a_state_of_something_else_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(AdmissionError):
        Admission.from_state(Admission(1, 1, 0).state() | change)
