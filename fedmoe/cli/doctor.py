"""`fedmoe doctor`: check machine, packages and GPU, and say how to fix what is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sqlite3
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedmoe.cli.doctor_network import Finding, coordinator_findings, hub_finding
from fedmoe.cli.options import DEFAULT_URL, AsJson, CoordinatorUrl, Token
from fedmoe.cli.output import show_json
from fedmoe.runtime.hardware import nvidia_gpus, torch_cuda, unused_gpu
from fedmoe.runtime.machine import machine_memory, memory, usable_cores
from fedmoe.runtime.safe_text import inert
from fedmoe.runtime.threads import own_threads

# Below this SQLite has a rare WAL-reset corruption bug (https://www.sqlite.org/releaselog/3_51_3.html); it takes
# several connections to one database, and a coordinator has exactly one.
_SOUND_SQLITE = (3, 51, 3)
_LEAST_DISK = 2 << 30
_LEAST_MEMORY = 1 << 30
_LEAST_FILES = 1024


def doctor(
    dataset: Annotated[Path | None, typer.Option(help="Also check these data: a file, a folder or a hub id.")] = None,
    hub: Annotated[bool, typer.Option("--hub", help="Also check that models and data can be fetched.")] = False,
    coordinator_url: CoordinatorUrl = DEFAULT_URL,
    token: Token = None,
    as_json: AsJson = False,
) -> None:
    """Check machine, packages, GPU, and the way to the coordinator; every problem comes with its fix."""
    findings = [Finding("Python", "ok", sys.version.split()[0]), _sqlite(), _disk(), _memory(), _limits(), _threads()]
    findings += [
        _package("torch"),
        _package("transformers"),
        *_unused_gpu(),
        _device(),
        *coordinator_findings(coordinator_url, token),
    ]
    if hub:
        findings.append(hub_finding())
    if dataset is not None:
        findings.append(_dataset(dataset))
    if as_json:
        show_json([asdict(finding) for finding in findings])
    else:
        for finding in findings:
            fix = f"  -> {finding.fix}" if finding.fix else ""
            print(f"[{finding.state:7}] {finding.what}: {inert(finding.found)}{fix}")
    if any(finding.state == "problem" for finding in findings):
        raise typer.Exit(1)


def _sqlite() -> Finding:
    fix = "fine with one coordinator per state directory; do not open its journal while it runs, keep it off NFS"
    return Finding.judged("SQLite", sqlite3.sqlite_version, sqlite3.sqlite_version_info >= _SOUND_SQLITE, fix)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free
    return Finding.judged("disk", f"{free / 2**30:.1f} GiB free here", free > _LEAST_DISK, "free some space", "problem")


def _memory() -> Finding:
    limit = memory()
    shown = f"{limit.available / 2**30:.1f} of {limit.total / 2**30:.1f} GiB available"
    if limit.total < machine_memory():
        # The machine's size is not said: nobody in here can use it.
        shown += " to this container"
    fix = "end other programs, or give the container more (docker run --memory); a coordinator needs about 0.5 GiB"
    return Finding.judged("memory", shown, limit.available >= _LEAST_MEMORY, fix)


def _limits() -> Finding:
    """What this process may use of the machine, by its container and its shell."""
    shown = f"{usable_cores():g} of {os.cpu_count() or 1} cores"
    try:
        import resource
    except ModuleNotFoundError:  # of POSIX only
        return Finding("limits", "ok", shown)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    shown += f", {files} open files"
    fix = f"raise it before the start: ulimit -n {_LEAST_FILES}; each connection of a coordinator takes one"
    return Finding.judged("limits", shown, files == resource.RLIM_INFINITY or files >= _LEAST_FILES, fix)


def _threads() -> Finding:
    """What a worker started now would choose."""
    chosen = own_threads(os.environ)
    if chosen.count:
        return Finding("threads", "ok", f"{chosen.count} for a worker ({chosen.reason})")
    return Finding("threads", "problem", f"{chosen.reason} is no number of threads", "unset it, or set it to 1 or more")


def _package(name: str) -> Finding:
    try:
        return Finding(name, "ok", importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        fix = "for a worker: pip install 'fedmoe[worker]'"
        return Finding(name, "note", "not installed; a coordinator does not need it", fix)


def _unused_gpu() -> list[Finding]:
    """A GPU that the installed build of PyTorch cannot use."""
    problem = unused_gpu(nvidia_gpus(), torch_cuda())
    if problem is None:
        return []
    found, _, fix = problem.partition(". ")
    return [Finding("GPU", "note", found, fix)]


def _device() -> Finding:
    try:
        from fedmoe.models.device_faults import device_fault
        from fedmoe.runtime.device import choose_device, choose_dtype, free_and_total
    except ModuleNotFoundError:
        return Finding("device", "note", "unknown without torch")
    try:
        device = choose_device("auto")
        shown = f"{device}, trains in {str(choose_dtype('auto', device)).removeprefix('torch.')}"
        free = free_and_total(device)
    except RuntimeError as error:
        return Finding("device", "problem", device_fault(error) or str(error))
    if free is None:
        return Finding("device", "ok", shown)
    shown += f", {free[0] / 2**30:.1f} of {free[1] / 2**30:.1f} GiB free"
    fix = "nvidia-smi shows what holds it; end that, or choose another with --device"
    return Finding.judged("device", shown, free[0] >= _LEAST_MEMORY, fix)


def _dataset(path: Path) -> Finding:
    from fedmoe.datasets.readers.common import DataError
    from fedmoe.datasets.row_scan import check_file

    try:
        report = check_file(path)
    except DataError as error:
        return Finding("dataset", "problem", str(error))
    if report.problem:
        return Finding("dataset", "problem", report.problem)
    return Finding("dataset", "ok", f"{path}: {report.good} good rows, format {report.format}")
