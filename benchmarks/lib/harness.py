"""Measuring and writing down: what every benchmark here shares.

A result is only worth what is known about how it came about, so each file carries the commit, the machine, the
versions, the arguments and the spread. Import this before numpy and call `pin_threads` first: a library for linear
algebra reads its number of threads once, when it is loaded.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True, slots=True)
class Measured:
    """Wall-clock seconds of one call over some repeats."""

    median: float
    minimum: float
    maximum: float
    repeats: int

    def to_json(self) -> dict[str, float]:
        return {f"{name}_seconds" if name != "repeats" else name: value for name, value in asdict(self).items()}


def pin_threads(count: int = 1) -> None:
    """Start this program again with `count` threads for linear algebra, unless that is how it was started."""
    wanted = dict.fromkeys(_THREAD_VARIABLES, str(count))
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    if "numpy" in sys.modules:
        raise RuntimeError("numpy is loaded already and keeps its threads; call pin_threads before importing it")
    os.environ.update(wanted)
    os.execv(sys.executable, sys.orig_argv)  # noqa: S606  # the same interpreter with the same arguments


def measure(call: Callable[[], object], repeats: int, warm_up: bool = True) -> Measured:
    """Seconds of `call`, once unmeasured to warm up and then `repeats` times."""
    if repeats < 1:
        raise ValueError(f"at least one repeat is needed, got {repeats}")
    if warm_up:
        call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return Measured(statistics.median(seconds), min(seconds), max(seconds), repeats)


def write_result(
    name: str, data: Mapping[str, object], arguments: Mapping[str, object], seeds: Sequence[int] = ()
) -> Path:
    """Write `benchmarks/results/<name>.json`: `data` with everything needed to judge it or to run it again."""
    document = {
        "name": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "arguments": dict(arguments),
        "seeds": list(seeds),
        "git": _git(),
        "hardware": hardware(),
        "versions": _versions(),
        "results": dict(data),
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path


def add_run(path: Path, report: Mapping[str, object]) -> None:
    """Add one run to a file of runs that are added up, with what `write_result` says of a result."""
    runs = json.loads(path.read_text())["runs"] if path.exists() else []
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "git": _git(),
        "hardware": hardware(),
        "versions": _versions(),
    }
    path.write_text(json.dumps({"name": path.stem, "runs": [*runs, {**about, **report}]}, indent=2) + "\n")


def hardware() -> dict[str, object]:
    """Processor, cores, memory in GiB, threads in use, and how busy the machine was (load average over a minute)."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "threads": os.environ.get("OMP_NUM_THREADS", "not pinned"),
        "load_average": round(os.getloadavg()[0], 2),
    }


def _cpu_model() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _git() -> dict[str, object]:
    commit = _run_git("rev-parse", "--verify", "HEAD")
    changes = _run_git("status", "--porcelain", "--", ".", ":!benchmarks/results")
    return {"commit": commit or "none", "dirty": bool(changes)}


def _run_git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("numpy", "torch", "transformers"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
