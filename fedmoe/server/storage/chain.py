"""The hash chain of the journal's rows: each hash covers a row and the hash before it.

So a row that was changed, moved, taken out or put in does not fit what follows. It guards against damage and mistakes;
whoever means harm and may write the file can compute every hash anew.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

#: What stands before the first row.
GENESIS = "0" * 64
#: The columns of a row that are hashed, in this order.
COLUMNS = ("id", "kind", "expert", "version", "worker", "epoch", "sequence", "digest", "payload", "version_digest")
_canonical = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


def link(before: str, row: Sequence[object]) -> str:
    """The chain's value after a row of `COLUMNS`: sha256 over the value before and the row as a JSON array, as hex.

    Raises ValueError for a row that no journal wrote (bytes, infinities).
    """
    try:
        content = _canonical(list(row))
    except TypeError as error:
        raise ValueError(str(error)) from error
    return hashlib.sha256(f"{before}{content}".encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class ChainEnd:
    """The end of a chain: the id of its last row, the chain's value there, and how many rows it has."""

    row: int = 0
    chain: str = GENESIS
    rows: int = 0


_BEGINNING = ChainEnd()


class BrokenChainError(ValueError):
    """A row is not the one that was written; `row` is its id, `event` counts from 1."""

    def __init__(self, row: object, event: int, expert: object, version: object) -> None:
        super().__init__(f"row {row} (event {event}: {expert!r} version {version!r}) is not as it was written")
        self.row = row
        self.event = event


def check(rows: Iterable[Sequence[object]], after: ChainEnd = _BEGINNING) -> ChainEnd:
    """Follow rows of `COLUMNS` and their chain value to the end; BrokenChainError at the first that breaks it.

    They are those that follow on what was checked up to `after`.
    """
    chain, last, number = after.chain, after.row, after.rows
    for number, row in enumerate(rows, after.rows + 1):
        try:
            chain = link(chain, row[:-1])
        except ValueError:
            chain = ""
        if row[-1] != chain or not isinstance(row[0], int):
            raise BrokenChainError(row[0], number, row[2], row[3])
        last = row[0]
    return ChainEnd(last, chain, number)
