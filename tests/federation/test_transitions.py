from __future__ import annotations

import gc
from typing import get_args

from hypothesis import given, settings
from hypothesis import strategies as st
from support import accepted, registered

from fedmoe.federation.events import (
    Event,
    ExpertRegistered,
    ExpertRolledBack,
    RollEvent,
    UpdateAccepted,
    VersionEvent,
    WorkerRetracted,
)
from fedmoe.federation.lineage import Lineage, length, without_worker
from fedmoe.federation.transitions import TRANSITIONS, lineages

WORKERS = ["w1", "w2", "w3"]


def rolled_back(to_version: int, version: int) -> ExpertRolledBack:
    return ExpertRolledBack("python", to_version, version, "", 0.0)


def retracted(worker: str, version: int) -> WorkerRetracted:
    return WorkerRetracted("python", worker, 1, version, "", 0.0)


def numbers(chain: Lineage | None) -> list[int]:
    return [update.version for update in Lineage.updates(chain)]


@st.composite
def histories(draw: st.DrawFn) -> list[Event]:
    events: list[Event] = [registered()]
    for version in range(1, draw(st.integers(0, 12)) + 1):
        kind = draw(st.sampled_from(["update", "update", "update", "rollback", "retract"]))
        if kind == "update":
            events.append(accepted(version, draw(st.sampled_from(WORKERS))))
        elif kind == "rollback":
            events.append(rolled_back(draw(st.integers(0, version - 1)), version))
        else:
            events.append(retracted(draw(st.sampled_from(WORKERS)), version))
    return events


def naive(events: list[Event]) -> dict[int, list[UpdateAccepted]]:
    """Version -> its updates, as plain lists."""
    found: dict[int, list[UpdateAccepted]] = {0: []}
    newest: list[UpdateAccepted] = []
    for event in events:
        if isinstance(event, UpdateAccepted):
            newest = [*newest, event]
        elif isinstance(event, ExpertRolledBack):
            newest = found[event.to_version]
        elif isinstance(event, WorkerRetracted):
            newest = [update for update in newest if update.worker != event.worker]
        else:
            continue
        found[event.version] = newest
    return found


@settings(deadline=None)
@given(histories())
def test_a_lineage_holds_the_updates_its_version_is_made_of_in_order(events: list[Event]) -> None:
    chains = lineages(events)
    assert {version: Lineage.updates(chain) for version, chain in chains.items()} == naive(events)
    assert {version: length(chain) for version, chain in chains.items()} == {
        v: len(u) for v, u in naive(events).items()
    }


@settings(deadline=None)
@given(histories(), st.sampled_from(WORKERS))
def test_without_a_worker_the_others_stay_in_order_and_the_beginning_is_shared(
    events: list[Event], worker: str
) -> None:
    chain = lineages(events)[max(lineages(events))]
    kept = without_worker(chain, worker)
    updates = Lineage.updates(chain)
    assert Lineage.updates(kept) == [update for update in updates if update.worker != worker]
    if worker not in {update.worker for update in updates}:
        assert kept is chain


def test_a_worker_is_retracted_from_the_version_there_is_after_a_rollback() -> None:
    events: list[Event] = [
        registered(),
        accepted(1, "w1"),
        accepted(2, "w2"),
        accepted(3, "w1"),
        rolled_back(2, 4),
        retracted("w1", 5),
        accepted(6, "w1"),
    ]
    chains = lineages(events)
    assert {version: numbers(chain) for version, chain in chains.items()} == {
        0: [],
        1: [1],
        2: [1, 2],
        3: [1, 2, 3],
        4: [1, 2],
        5: [2],
        6: [2, 6],
    }
    assert chains[4] is chains[2]


def test_a_hundred_thousand_updates_are_no_deep_recursion() -> None:
    """A retraction at the far end of a long chain, and the end of the chain's life, stay within the stack."""
    events: list[Event] = [registered(), *(accepted(v, WORKERS[v % 2], digest="d") for v in range(1, 100_001))]
    chains = lineages([*events, retracted("w1", 100_001)])
    assert length(chains[100_001]) == 50_000
    assert Lineage.updates(chains[100_000])[-10:] == events[-10:]
    del chains
    gc.collect()


def test_the_table_of_transitions_has_every_event_and_a_lineage_for_each_that_makes_a_version() -> None:
    assert TRANSITIONS.keys() == set(get_args(Event))
    assert {event for event, change in TRANSITIONS.items() if change.lineage} == set(get_args(VersionEvent))
    assert all(TRANSITIONS[event].expert for event in (ExpertRegistered, *get_args(VersionEvent), *get_args(RollEvent)))
