"""Losses of a federation over time, read from its journal, in use or not; nothing is changed."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from fedmoe.federation.events import ExpertRenamed, UpdateAccepted
from fedmoe.runtime.records import Record
from fedmoe.server.statistics.contributors import held_out_of
from fedmoe.server.storage.backup import JOURNAL
from fedmoe.server.storage.event_rows import event_of
from fedmoe.server.storage.migration import schema_of
from fedmoe.server.storage.records import Statistic
from fedmoe.server.storage.sqlite import connect, unusable
from fedmoe.wire.contract.messages import HELD_OUT

_EVENTS = "SELECT kind, payload FROM events WHERE kind IN ('update', 'rename') ORDER BY id"
_STATISTICS = "SELECT expert, worker, kind, payload, at FROM statistics WHERE kind = ? ORDER BY id"


def loss_records(state: Path) -> list[Record]:
    """Records as workers write them, by time: `step` with the training loss of an update, `held_out` as reported.

    Experts have their present names. Raises StorageFailedError for a journal that cannot be read.
    """
    try:
        with closing(connect(state / JOURNAL, "ro")) as journal:
            if schema_of(journal, str(state / JOURNAL)) is None:
                return []
            rows, facts = journal.execute(_EVENTS).fetchall(), journal.execute(_STATISTICS, [HELD_OUT]).fetchall()
    except sqlite3.Error as error:
        raise unusable(str(state / JOURNAL), str(error)) from error
    events = [event_of(kind, payload) for kind, payload in rows]
    names = {event.expert: event.name for event in events if isinstance(event, ExpertRenamed)}
    records = [_update_record(event) for event in events if isinstance(event, UpdateAccepted) and "loss" in event.info]
    for expert, worker, kind, payload, at in facts:
        # Journals are read by whoever may read the file: what is no held-out loss is left out, as at a start.
        held_out = held_out_of(Statistic(expert, worker, kind, json.loads(payload), at))
        if held_out is not None:
            numbers = {"step": held_out.step, "loss": held_out.loss}
            records.append({"at": at, "kind": "held_out", "expert": expert, "worker": worker, **numbers})
    renamed = ({**record, "expert": names.get(str(record["expert"]), record["expert"])} for record in records)
    return sorted(renamed, key=lambda record: float(str(record["at"])))


def _update_record(event: UpdateAccepted) -> Record:
    numbers = {"version": event.version, "loss": event.info["loss"]}
    return {"at": event.at, "kind": "step", "expert": event.expert, "worker": event.worker, **numbers}
