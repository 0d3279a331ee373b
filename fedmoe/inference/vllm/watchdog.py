"""The process between a trainer and its vLLM server, which ends the server when the trainer ends.

Run as a program with the server's command as arguments; whoever started it holds the other end of its standard input.
Standard library only: it runs by path, without this package.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

_GRACE_SECONDS = 15.0


def main() -> None:
    """Run the server until it ends, or until standard input does; then end everything it started."""
    if os.getpgrp() != os.getpid():
        sys.exit("start this in a session of its own: it ends its whole process group")
    server = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_parent, args=(server,), daemon=True).start()
    server.wait()
    # Workers outlive a server that was killed. The group is ours alone, and this process goes with it.
    os.killpg(0, signal.SIGKILL)


def _end_with_parent(server: subprocess.Popen[bytes]) -> None:
    # Nothing is ever written: reading ends when the other end is closed, however its holder came to its end.
    sys.stdin.buffer.read()
    server.terminate()
    try:
        server.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
