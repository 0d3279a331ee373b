"""Trash for blobs that no journal names: after a day unnamed, kept for 30 days, restored if named again.

A blob is moved here when it has been unnamed for a day, and goes for good when it has been here for 30 days of the
federation's own time: the newest event's, so that a clock set forward empties nothing.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from fedmoe.runtime.files import fsync_folder

UNNAMED_SECONDS = 86_400.0
KEPT_DAYS = 30
_DAY = re.compile(r"\d{4}-\d\d-\d\d")


class Trash:
    """A folder with one folder a day, made when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, path: Path, now: float) -> None:
        """Move a file here; `now` is seconds since 1970."""
        day = self.folder / _day(now).isoformat()
        day.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.replace(path, day / path.name)

    def take_back(self, name: str, to: Path) -> bool:
        """Move the newest file of this name to `to`, if there is one."""
        copies = [day / name for day in self._days() if (day / name).exists()]
        if copies:
            os.replace(copies[-1], to)
            fsync_folder(to.parent)
        return bool(copies)

    def names(self) -> set[str]:
        return {entry.name for day in self._days() for entry in day.iterdir()}

    def empty(self, now: float) -> int:
        """Remove for good what came more than `KEPT_DAYS` before `now`; returns how many files."""
        old = [day for day in self._days() if date.fromisoformat(day.name) < _day(now) - timedelta(days=KEPT_DAYS)]
        removed = 0
        for day in old:
            removed += len(list(day.iterdir()))
            shutil.rmtree(day)
        return removed

    def _days(self) -> Iterator[Path]:
        if self.folder.is_dir():
            yield from sorted(day for day in self.folder.iterdir() if _DAY.fullmatch(day.name) and day.is_dir())


def _day(now: float) -> date:
    return datetime.fromtimestamp(now, UTC).date()
