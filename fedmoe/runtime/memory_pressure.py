"""Decisions under memory pressure, without I/O: drop caches, then halve micro-batches, finally stop gracefully."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

#: From this share of the limit on something is done, below the other for a while it is taken back.
NEAR = 0.85
CALM = 0.70
#: Checks below CALM before a batch is doubled again; doubles with every growth that had to be taken back.
CALM_CHECKS = 8
MOST_CALM_CHECKS = 1024
#: Checks that a halved batch gets to show an effect, before it is halved again.
SETTLE_CHECKS = 2


@dataclass(frozen=True, slots=True)
class Pressure:
    """The state of the decision. `batch` is the micro-batch in force, always within `least` and `most`.

    `dropped`: caches were emptied at the last check. `calm`: checks in a row below CALM.
    `patience`: how many of them a growth takes. `settling`: checks to wait before the next halving. `grown`: the last
    change was a growth.
    """

    batch: int
    most: int
    least: int = 1
    dropped: bool = False
    calm: int = 0
    patience: int = CALM_CHECKS
    settling: int = 0
    grown: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.batch <= self.most:
            raise ValueError(f"1 <= least <= batch <= most is needed, got {self.least}, {self.batch}, {self.most}")

    def with_most(self, most: int) -> Pressure:
        """The same under another upper bound; a batch that was at the old bound goes to the new one at once."""
        most = max(most, self.least)
        return replace(self, most=most, batch=most if self.batch == self.most else min(self.batch, most))


class Action(Enum):
    """What to do now besides using the batch of the new state: empty the caches, or stop, for nothing else is left."""

    NOTHING = auto()
    DROP_CACHES = auto()
    STOP = auto()


def pressure(used: int, limit: int, state: Pressure) -> tuple[Action, Pressure]:
    """Decide once a batch by the most bytes used since the last decision; a changed batch is in the new state.

    Near the limit caches go first; if that was not enough the batch halves, down to its floor, and gets a few checks
    to take effect. Above the limit both happen at once; above it with empty caches and the smallest batch: stop.
    """
    calm = state.calm + 1 if used < CALM * limit else 0
    state = replace(state, calm=calm)
    rested = replace(state, dropped=False, settling=max(state.settling - 1, 0))
    if used > limit:
        if state.batch > state.least:
            return Action.DROP_CACHES, replace(_halved(state), dropped=True)
        return Action.STOP if state.dropped else Action.DROP_CACHES, replace(state, dropped=True)
    if used >= NEAR * limit and not state.dropped:
        return Action.DROP_CACHES, replace(rested, dropped=True)
    if used >= NEAR * limit and state.batch > state.least and state.settling == 0:
        return Action.NOTHING, _halved(state)
    # Near the limit caches fill up again, so they are emptied again at the next check.
    if calm < state.patience or state.batch == state.most:
        return Action.NOTHING, rested
    return Action.NOTHING, replace(rested, batch=min(state.batch * 2, state.most), calm=0, grown=True)


def _halved(state: Pressure) -> Pressure:
    patience = min(state.patience * 2, MOST_CALM_CHECKS) if state.grown else state.patience
    batch = max(state.batch // 2, state.least)
    return replace(state, batch=batch, dropped=False, settling=SETTLE_CHECKS, patience=patience, grown=False)


def after_failure(state: Pressure) -> Pressure | None:
    """The state after an allocation failed in the middle of a batch, or None when there is nothing smaller to try."""
    return None if state.batch == state.least else replace(_halved(state), calm=0)
