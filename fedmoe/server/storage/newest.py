"""Checks that a journal holds all acknowledged events; if not, says what is missing and what to restore."""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe.server.storage.acknowledged import Head, behind
from fedmoe.server.storage.incarnation import INCARNATIONS_BEFORE, of_text
from fedmoe.server.storage.journal import SqlJournal

OLDER = "An older journal.sqlite was put there, or its journal.sqlite-wal is gone. Put the right one back"


@dataclass(frozen=True, slots=True)
class JournalGap:
    """What a journal lacks of what was acknowledged, in words, and how it came to that and what to put back."""

    reason: str
    advice: str = OLDER


def lack_of(journal: SqlJournal, noted: Head | None) -> JournalGap | None:
    """What a journal lacks of what was noted; None where it has all of it, or nothing is known."""
    if noted is None:
        return None
    head = journal.head
    reason = behind(noted, head, journal.chain_at(noted.events))
    if not _left_behind(journal, noted):
        return JournalGap(reason) if reason else None
    return JournalGap(
        f"it is of the incarnation {head.incarnation}, and the one in use last was {noted.incarnation}, with "
        f"{noted.events} events" + (f" ({reason})" if reason else ""),
        "That other one began when this one was left, with --accept-older-journal or 'fedmoe state restore', and what "
        "was acknowledged since is in its journal only. Put that one back",
    )


def _left_behind(journal: SqlJournal, noted: Head) -> bool:
    """Whether the journal is of an incarnation that another one has taken the place of; an empty one is of none."""
    head = journal.head
    if not (head.events and head.incarnation and noted.incarnation):
        return False
    before = {ended.incarnation for ended in of_text(journal.meta(INCARNATIONS_BEFORE))}
    return noted.incarnation not in {head.incarnation, *before}
