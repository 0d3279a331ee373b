"""Which updates are held, decided on values, and what the quarantine makes of events."""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import reduce

from hypothesis import given
from hypothesis import strategies as st
from support import accepted, make_submission, registered

from fedmoe.coordinator import Aggregation, Transaction
from fedmoe.federation.events import HeldUpdateRejected, UpdateAccepted, UpdateHeld
from fedmoe.federation.online_gateway import count_steps, step_counters
from fedmoe.federation.quarantine import Quarantine
from fedmoe.lora.update_rules import USUAL_LEAST, USUAL_WINDOW

NORMS = st.floats(1e-3, 1e3)


def draft_with(norms: list[float], aggregation: Aggregation) -> Transaction:
    """One expert on which updates of these norms landed."""
    transaction = Transaction(aggregation, {}, None, 0)
    transaction.apply(registered())
    transaction.experts["python"] = replace(transaction.experts["python"], norms=tuple(norms[-USUAL_WINDOW:]))
    return transaction


@given(st.lists(NORMS, max_size=40), st.floats(0, 1e9), st.floats(2, 1e6), st.none() | st.floats(1, 1e6))
def test_held_is_what_would_land_with_more_than_the_factor_times_the_usual_norm_37(
    norms: list[float], norm: float, factor: float, clip: float | None
) -> None:
    transaction = draft_with(norms, Aggregation(clip_norm=clip, hold_norm=factor))
    update = transaction.admit(replace(make_submission(), norm=norm), 0.0)
    held = transaction.hold(update, 1, "")
    recent = norms[-USUAL_WINDOW:]
    if len(recent) < USUAL_LEAST:
        assert held is None
        return
    usual = statistics.median(recent)
    lands = norm if clip is None else min(norm, clip * usual)
    if abs(lands / usual - factor) > 1e-6 * factor:
        assert (held is not None) == (lands / usual > factor)
    if clip is not None and clip <= factor * (1 - 1e-6):
        assert held is None
    if norm == 0 or norm * factor < usual * (1 - 1e-6):
        assert update.landed_norm is None


@given(st.lists(NORMS, max_size=40), st.floats(0, 1e9))
def test_a_factor_of_0_holds_nothing_37(norms: list[float], norm: float) -> None:
    transaction = draft_with(norms, Aggregation(hold_norm=0.0))
    assert transaction.hold(transaction.admit(replace(make_submission(), norm=norm), 0.0), 1, "") is None


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["hold", "land", "reject"])), max_size=40))
def test_every_identity_is_held_released_or_rejected_and_never_two_of_them_37(steps: list[tuple[int, str]]) -> None:
    events: list[UpdateHeld | UpdateAccepted | HeldUpdateRejected] = []
    found = Quarantine()
    for sequence, word in steps:
        update = accepted(len(events) + 1, sequence=sequence)
        if word == "hold" and not found.knows(update.identity):
            named = (update.expert, update.worker, update.epoch, sequence, 0, update.digest, 1, 0, 0, "huge", "", 0.0)
            events.append(UpdateHeld(found.number + 1, *named))
        elif word == "land" and update.identity in found.held:
            events.append(replace(update, info={"held": 1.0}))
        elif word == "reject" and update.identity in found.held:
            held = found.held[update.identity]
            named_held = (held.number, held.expert, held.worker, held.epoch, sequence, held.digest, "no", 0.0)
            events.append(HeldUpdateRejected(found.number + 1, *named_held))
        else:
            continue
        before, found = found, found.after(events[-1])
        assert found.number >= before.number
    places = [set(found.held), set(found.released), set(found.rejected)]
    assert sum(map(len, places)) == len(set.union(*places))
    assert reduce(Quarantine.after, events, Quarantine()) == found


def test_the_steps_of_a_released_update_are_told_by_the_next_one_of_its_worker() -> None:
    """With experts that go on from the gateway, steps say when one is merged: none may count twice."""
    told = [10.0, 30.0, 20.0, 40.0]
    updates = [replace(accepted(n + 1), info={"steps": steps}) for n, steps in enumerate(told)]
    updates[2] = replace(updates[2], info={"steps": 20.0, "held": 1.0})
    assert [one.steps for one in count_steps(updates, updates)] == [10, 20, 1, 10]
    assert step_counters(updates) == {"w1": 40}
