"""Start options recorded in a journal of any schema; a start with incompatible ones is refused."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fedmoe.federation.aggregation import Aggregation
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.sqlite import connect

#: The key in `meta` of the update rule that every expert's past was made with.
UPDATE_RULE = "update_rule"


@dataclass(frozen=True, slots=True)
class StoredChoices:
    """The update rule, and the number of the last merge into the gateway; None where there is none."""

    update_rule: str | None = None
    last_fold: int | None = None


def read_choices(journal: Path) -> StoredChoices:
    """What a journal's file says of them; nothing where it cannot be read, which whoever opens it will say."""
    try:
        with closing(connect(journal, "ro")) as connection:
            rule = connection.execute("SELECT value FROM meta WHERE key = ?", [UPDATE_RULE]).fetchone()
            fold = connection.execute("SELECT max(version) FROM events WHERE kind = 'fold'").fetchone()
    except sqlite3.Error:
        return StoredChoices()
    return StoredChoices(rule[0] if rule else None, fold[0])


def check_choices(aggregation: Aggregation, stored: StoredChoices) -> None:
    """Refuse options that would rebuild other weights than the ones there were, or count a gateway twice."""
    chosen, rule = aggregation.rule.name, stored.update_rule
    if rule is not None and rule != chosen:
        # An expert's past was made with one rule; another one would rebuild other weights.
        raise RefusedError(
            "rule_mismatch",
            f"this state directory was made with the update rule {rule!r}, started with {chosen!r}.",
            f"Start with --server-optimizer {rule.partition(',')[0]} and its --buffer-size (1 if none is named), "
            "or choose another --state-dir.",
        )
    if stored.last_fold is not None and aggregation.merge_after is None:
        # Merged anew, experts that went on from one gateway would count it once each.
        raise RefusedError(
            "start_mismatch",
            f"the experts of this state directory went on from their gateway, last after fold {stored.last_fold}.",
            "Start with --start-from gateway, or choose another --state-dir.",
        )
