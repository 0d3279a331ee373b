"""A row of the journal becomes the event that was written, or a refusal that says why; nothing in between (73)."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import accepted, registered

from fedmoe.federation.events import ExpertRebased, ExpertRolledBack, GatewayMerged, WorkerRetracted
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.event_rows import event_of, row_of

EVENTS = [
    registered(),
    accepted(3),
    ExpertRolledBack("python", 1, 2, "worse", 5.0),
    WorkerRetracted("python", "w1", 2, 7, "", 6.0),
    GatewayMerged(1, 4, "a" * 64, {"python": 3}, {"python": 0}, {"python": 0.5}, 0.0, 1.0, ("one",), 7.0),
    ExpertRebased("python", 1, "a" * 64, 0, 4, 8.0),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_every_event_comes_back_as_it_was_written(event: object) -> None:
    row = row_of(event)  # type: ignore[arg-type]
    assert event_of(str(row["kind"]), str(row["payload"])) == event


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
@given(data=st.data())
def test_a_row_with_another_value_is_an_event_or_refused(event: object, data: st.DataObject) -> None:
    row = row_of(event)  # type: ignore[arg-type]
    payload = json.loads(str(row["payload"]))
    payload[data.draw(st.sampled_from(sorted(payload)))] = data.draw(values)
    try:
        found = event_of(str(row["kind"]), json.dumps(payload))
    except StorageFailedError:
        return
    assert row_of(found)["kind"] == row["kind"]


@pytest.mark.parametrize(
    ("kind", "payload", "says"),
    [
        ("promote", "{}", "does not know"),
        ("update", "", "Expecting value"),
        ("update", "[]", "no JSON object"),
        ("update", "{}", "it lacks"),
        ("rollback", '{"expert":"a","to_version":1,"version":2,"reason":"","at":NaN}', "NaN"),
        ("rollback", '{"expert":"a","to_version":1,"version":2,"reason":"","at":1e999}', "its at is inf"),
        ("rollback", '{"expert":"a","to_version":-1,"version":2,"reason":"","at":1}', "its to_version is -1"),
        ("rollback", '{"expert":"a","to_version":1,"version":2,"reason":"","at":1,"by":"me"}', "'by'"),
        ("register", '{"expert":"a","worker":"w","manifest":3,"seed":1,"at":1}', "its manifest is none"),
        ("update", "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_row_that_no_journal_wrote_is_refused_with_the_reason(kind: str, payload: str, says: str) -> None:
    with pytest.raises(StorageFailedError, match=says):
        event_of(kind, payload)
