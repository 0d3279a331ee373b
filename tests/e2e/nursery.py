"""A process that has loaded all that a coordinator is made of, and forks one a request: a start costs milliseconds.

A request is a line of JSON; it answers with the child's process id, waits for the child, and says its exit status.

    python nursery.py CLOCK

CLOCK is a file of eight bytes: how many seconds (a double) the clock of all children is ahead. `time.time` is replaced
before anything is loaded; libfaketime is not used, since it refuses CPython's absolute monotonic sleeps (EINVAL).
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import sys
import time


def _become_coordinator(request: dict[str, object]) -> None:
    from fedmoe.cli import main
    from fedmoe.runtime import failpoints

    log = os.open(str(request["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    failpoints._remaining.update(failpoints._parse(str(request["failpoints"])))
    arguments = request["arguments"]
    assert isinstance(arguments, list)
    sys.argv = ["fedmoe", *arguments]
    main()


def _bend_the_clock(path: str) -> None:
    with open(path, "rb") as file:
        ahead = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
    right, right_ns = time.time, time.time_ns

    def seconds() -> float:
        return float(struct.unpack("d", ahead[:8])[0])

    time.time = lambda: right() + seconds()
    time.time_ns = lambda: right_ns() + int(seconds() * 1e9)


def _serve() -> None:
    import fedmoe.cli
    import fedmoe.cli.commands
    import fedmoe.cli.coordinator
    import fedmoe.distributed_coordinator  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                _become_coordinator(json.loads(line))
            except SystemExit as end:
                os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
            os._exit(0)
        print(pid, flush=True)
        _, ended = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(ended), flush=True)


if __name__ == "__main__":
    _bend_the_clock(sys.argv[1])
    _serve()
