"""One thing that `fedmoe doctor` looked at, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: `state` is ok, note or problem; `fix` says what to do."""

    what: str
    state: str
    found: str
    fix: str = ""
