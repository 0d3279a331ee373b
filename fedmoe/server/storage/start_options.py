"""Options that a journal was first started with; a start with incompatible ones is refused."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from fedmoe.federation.aggregation import Aggregation
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.sqlite import connect
from fedmoe.server.storage.tables import UPDATE_RULE


def check_file(aggregation: Aggregation, journal: Path) -> None:
    """`check_options` for a journal's file; one that cannot be read is left for whoever opens it to refuse."""
    try:
        with closing(connect(journal, "ro")) as connection:
            rule = connection.execute("SELECT value FROM meta WHERE key = ?", [UPDATE_RULE]).fetchone()
            last_merge = connection.execute("SELECT max(version) FROM events WHERE kind = 'fold'").fetchone()[0]
    except sqlite3.Error:
        return
    check_options(aggregation, rule[0] if rule else None, last_merge)


def check_options(aggregation: Aggregation, update_rule: str | None, last_merge: int | None) -> None:
    """Refuse options that would rebuild other weights than the ones there were, or count a gateway twice.

    `update_rule` is the rule that every expert's past was made with, `last_merge` the number of the last merge into the
    gateway; None where there is none.
    """
    chosen = aggregation.rule.name
    if update_rule is not None and update_rule != chosen:
        # An expert's past was made with one rule; another one would rebuild other weights.
        raise RefusedError(
            "rule_mismatch",
            f"this state directory was made with the update rule {update_rule!r}, started with {chosen!r}.",
            f"Start with --server-optimizer {update_rule.partition(',')[0]} and its --buffer-size (1 if none is "
            "named), or choose another --state-dir.",
        )
    if last_merge is not None and aggregation.merge_after is None:
        # Merged anew, experts that were rebased onto one gateway would count it once each.
        raise RefusedError(
            "start_mismatch",
            f"the experts of this state directory were rebased onto their gateway, last after merge {last_merge}.",
            "Start with --start-from gateway, or choose another --state-dir.",
        )
