"""The difference between two machines' clocks, in words."""

from __future__ import annotations

#: Less is told to nobody: the answer was on its way, and clocks differ.
_TOLD_FROM = 60.0


def clock_difference(coordinator_time: object, now: float) -> str:
    """A sentence on this machine's clock, `now`, beside the time in a coordinator's answer; empty if they agree.

    Both are seconds since 1970; what is no number says nothing.
    """
    if isinstance(coordinator_time, bool) or not isinstance(coordinator_time, (int, float)):
        return ""
    ahead = now - coordinator_time
    if not _TOLD_FROM <= abs(ahead) < float("inf"):
        return ""
    minutes = round(abs(ahead) / 60)
    far = f"{minutes} min" if minutes < 120 else f"{minutes / 60:.0f} h"
    return f"This machine's clock is {far} {'ahead of' if ahead > 0 else 'behind'} the coordinator's."
