"""`fedmoe doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from fedmoe.cli.options import DEFAULT_URL, AsJson, CoordinatorUrl, Token, client
from fedmoe.cli.output import show_json
from fedmoe.errors import RefusedError
from fedmoe.machine import memory
from fedmoe.threads import look
from fedmoe.wire.client import CoordinatorUnavailableError

# Below this SQLite has a rare WAL-reset corruption bug (https://www.sqlite.org/releaselog/3_51_3.html); it takes
# several connections to one database, and a coordinator has exactly one.
_SOUND_SQLITE = (3, 51, 3)
_LEAST_DISK = 2 << 30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at: `state` is ok, note or problem; `fix` says what to do."""

    what: str
    state: str
    found: str
    fix: str = ""


def doctor(
    dataset: Annotated[Path | None, typer.Option(help="Also check these data: a file, a folder or a hub id.")] = None,
    coordinator_url: CoordinatorUrl = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Check machine, packages, memory, threads, GPU, coordinator and data; every problem comes with its fix."""
    checks: list[Callable[[], Finding]] = [
        _python,
        _sqlite,
        _disk,
        _memory,
        _threads,
        lambda: _package("torch", "pip install 'fedmoe[worker]'"),
        lambda: _package("transformers", "pip install 'fedmoe[worker]'"),
        _device,
        lambda: _coordinator(coordinator_url, token),
    ]
    if dataset is not None:
        checks.append(lambda: _dataset(dataset))
    findings = [check() for check in checks]
    if as_json:
        show_json([{"what": f.what, "state": f.state, "found": f.found, "fix": f.fix} for f in findings])
    else:
        for finding in findings:
            print(
                f"[{finding.state:7}] {finding.what}: {finding.found}" + (f"  -> {finding.fix}" if finding.fix else "")
            )
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


def _python() -> Finding:
    return Finding("Python", "ok", sys.version.split()[0])


def _sqlite() -> Finding:
    if sqlite3.sqlite_version_info >= _SOUND_SQLITE:
        return Finding("SQLite", "ok", sqlite3.sqlite_version)
    fix = "fine with one coordinator per state directory; do not open its journal while it runs, keep it off NFS"
    return Finding("SQLite", "note", sqlite3.sqlite_version, fix)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{free / 2**30:.1f} GiB free here"
    return Finding("disk", "ok", found) if free > _LEAST_DISK else Finding("disk", "problem", found, "free some space")


def _memory() -> Finding:
    found = memory()
    return Finding("memory", "ok", f"{found.available / 2**30:.1f} of {found.total / 2**30:.1f} GiB available")


def _threads() -> Finding:
    """What a worker started now would choose."""
    chosen = look(os.environ)
    if chosen.count:
        return Finding("threads", "ok", f"{chosen.count} for a worker ({chosen.reason})")
    return Finding("threads", "problem", f"{chosen.reason} is no number of threads", "unset it, or set it to 1 or more")


def _package(name: str, fix: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, "note", "not installed; a coordinator does not need it", f"for a worker: {fix}")


def _device() -> Finding:
    try:
        from fedmoe.models.device import choose_device, choose_dtype
    except ModuleNotFoundError:
        return Finding("device", "note", "unknown without torch")
    device = choose_device("auto")
    return Finding("device", "ok", f"{device}, trains in {str(choose_dtype('auto', device)).removeprefix('torch.')}")


def _coordinator(url: str, token: str | None) -> Finding:
    with client(url, token) as api:
        if not api.healthy():
            return Finding("coordinator", "note", f"{url} does not answer", "start it with: fedmoe coordinator")
        try:
            listing = api.list_experts()
        except RefusedError as error:
            return Finding("coordinator", "problem", f"{url} refuses: {error.detail}", error.fix)
        except CoordinatorUnavailableError as error:
            return Finding("coordinator", "problem", str(error), "see the coordinator's log")
    return Finding("coordinator", "ok", f"{url}, {len(listing.experts)} experts")


def _dataset(path: Path) -> Finding:
    from fedmoe.datasets.check import check_file
    from fedmoe.datasets.errors import DataError

    try:
        report = check_file(path)
    except DataError as error:
        return Finding("dataset", "problem", str(error))
    if report.problem:
        return Finding("dataset", "problem", report.problem)
    return Finding("dataset", "ok", f"{path}: {report.good} good rows, format {report.format}")
