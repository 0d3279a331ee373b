"""Python programs forked from one process that has loaded torch and the package: a start costs no imports.

What a program does before its imports, and what it needs of memory, is tested with a process of its own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmoe.cli.commands import PLACES

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *sorted({place.module for place in PLACES.values()}),
        "fedmoe.cli.worker_setup",
        "fedmoe.distributed_coordinator",
        "fedmoe.gateway.evaluator",
        "fedmoe.gateway.serve.app",
        "fedmoe.arena.run.run",
        "fedmoe.monitor.exporters",
    ]
)


class Fork:
    """A started program, with what of `subprocess.Popen` is used of it."""

    def __init__(
        self,
        arguments: Sequence[str],
        out: Path,
        err: Path | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        """`python ARGUMENTS`, its output appended to files; the environment is the test's own unless it is given."""
        given = dict(os.environ if environment is None else environment)
        streams = (str(out), str(err or out))
        self.args = list(arguments)
        self._process = FORKS.Process(target=_run, args=(self.args, streams, given, str(folder or Path.cwd())))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        status = self._process.exitcode
        if status is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


Process = subprocess.Popen[bytes] | Fork


def run(
    *arguments: str, environment: Mapping[str, str] | None = None, folder: Path | None = None, timeout: float = 120.0
) -> subprocess.CompletedProcess[str]:
    """`python ARGUMENTS` to its end: its status, its standard output and its standard error."""
    with tempfile.TemporaryDirectory() as place:
        out, err = Path(place, "out"), Path(place, "err")
        process = Fork(arguments, out, err, environment, folder)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, status, out.read_text(), err.read_text())


def _run(arguments: list[str], streams: tuple[str, str], environment: dict[str, str], folder: str) -> None:
    """The program in the forked process."""
    enter(streams, environment)
    os.chdir(folder)
    atexit._clear()  # what the first process registered is not ours
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = list(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a process of multiprocessing would not


def enter(streams: tuple[str, str], environment: Mapping[str, str]) -> None:
    """Make the forked process as one of this environment, with its output in these files."""
    for number, file in zip((1, 2), streams, strict=True):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    tempfile.tempdir = None  # of another TMPDIR
    import torch

    from fedmoe.runtime import failpoints

    # Read from the environment at import, which was in another process.
    failpoints._remaining.clear()
    failpoints._remaining.update(failpoints._parse(environment.get("FEDMOE_FAILPOINTS", "")))
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
