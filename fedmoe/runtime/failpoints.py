"""Named places where a test can kill the process, after the idea of gofail.

`FEDMOE_FAILPOINTS="push.after_blob=3"` kills the process with SIGKILL the third time that place is reached. Unset, a
failpoint is one dictionary look-up.
"""

from __future__ import annotations

import os
import signal


def _parse(text: str) -> dict[str, int]:
    remaining = {}
    for item in filter(None, text.split(",")):
        name, _, count = item.partition("=")
        if not count.isdigit() or int(count) < 1:
            raise ValueError(f"FEDMOE_FAILPOINTS: expected NAME=COUNT with COUNT >= 1, got {item!r}")
        remaining[name] = int(count)
    return remaining


_remaining = _parse(os.environ.get("FEDMOE_FAILPOINTS", ""))


def reached(name: str) -> None:
    """Die here, without any clean-up, if a test asked for it."""
    if name in _remaining:
        _remaining[name] -= 1
        if _remaining[name] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
