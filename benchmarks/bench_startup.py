"""Starts beside an earlier build: `fedmoe --help`, a coordinator until it listens, what a worker imports.

    python benchmarks/bench_startup.py --against REV [--pairs 5]

Both packages are copied into temporary folders and compiled, as an installation compiles them. They take turns, pair by
pair and in alternating order; one round before them warms up. All figures are processor seconds of processes that are
started anew.

- `help`: `fedmoe --help`, from start to end.
- `coordinator`: `fedmoe coordinator` in a new folder, until its port takes a connection.
- `worker`: everything that `fedmoe worker` imports before it loads its base model. Beside it, in the same rounds, what
  it cannot do without: `import torch, transformers` alone, and with `transformers.modeling_utils`, which every class of
  models imports.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from lib.harness import ROOT, pin_threads, write_result

pin_threads(1)

import psutil  # noqa: E402  # threads are pinned first
from bench_against import check_source, environment, spread, unpack  # noqa: E402
from lib.coordinator_process import free_port  # noqa: E402

#: Those that the command's path goes through, in both builds.
WORKER = "import fedmoe.cli.commands, fedmoe.cli.worker, fedmoe.cli.worker_start, fedmoe.cli.worker_setup"
LIBRARIES = "import torch, transformers"
WITH_MODELS = "import torch, transformers, transformers.modeling_utils"
_START_SECONDS = 120.0


def compiled(source: Path) -> None:
    """Compile the package below a folder; what is measured must not be compiled at each start."""
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(source / "fedmoe")], check=True)


def of_process(arguments: list[str], source: Path) -> float:
    """Processor seconds of a process that ends by itself."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-P", *arguments]
    subprocess.run(command, env=environment(source), stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def of_coordinator(source: Path) -> float:
    """Processor seconds of a coordinator when its port first takes a connection."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="startup-") as state:
        command = [sys.executable, "-P", "-m", "fedmoe", "coordinator", "--port", str(port), "--state-dir", state]
        output = subprocess.DEVNULL
        with subprocess.Popen(command, env=environment(source), stdout=output, stderr=output) as process:
            try:
                _wait(port, process)
                return float(sum(psutil.Process(process.pid).cpu_times()[:2]))
            finally:
                process.terminate()


def _wait(port: int, process: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() - began > _START_SECONDS:
                raise SystemExit("the coordinator did not start; try its command by hand") from None
            time.sleep(0.01)


#: What is measured of each build, and of the libraries alone.
CASES: Mapping[str, Callable[[Path], float]] = {
    "help": lambda source: of_process(["-m", "fedmoe", "--help"], source),
    "coordinator": of_coordinator,
    "worker": lambda source: of_process(["-c", WORKER], source),
}
ALONE = {"libraries": LIBRARIES, "with_models": WITH_MODELS}


def rounds(sources: Mapping[str, Path], pairs: int) -> dict[str, dict[str, list[float]]]:
    """Seconds by case and side; the libraries are a case with one side."""
    measured: dict[str, dict[str, list[float]]] = {}
    for number in range(pairs + 1):
        order = list(sources) if number % 2 else list(reversed(list(sources)))
        for case, taken in CASES.items():
            for side in order:
                seconds = taken(sources[side])
                if number:
                    measured.setdefault(case, {}).setdefault(side, []).append(seconds)
        for name, code in ALONE.items():
            seconds = of_process(["-c", code], sources["now"])
            if number:
                measured.setdefault("worker", {}).setdefault(name, []).append(seconds)
        print(f"round {number} of {pairs}", flush=True)
    return measured


def summary(measured: Mapping[str, Mapping[str, list[float]]]) -> dict[str, dict[str, object]]:
    """Medians and spread, and ratios of the same rounds."""
    results: dict[str, dict[str, object]] = {}
    for case, sides in measured.items():
        ratios = [now / before for now, before in zip(sides["now"], sides["before"], strict=True)]
        results[case] = {**{side: spread(values) for side, values in sides.items()}, "ratio": spread(ratios)}
        for name in ALONE:
            for side in ("before", "now") if name in sides else ():
                pairs = zip(sides[side], sides[name], strict=True)
                results[case][f"{side}_to_{name}"] = statistics.median(own / alone for own, alone in pairs)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="REV", help="the earlier revision, as git names it")
    parser.add_argument("--pairs", type=int, default=5, help="measured rounds, after one to warm up")
    options = parser.parse_args()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory(prefix="fedmoe-before-") as before, tempfile.TemporaryDirectory() as now:
        sources = {"before": Path(before), "now": Path(now)}
        commit = unpack(options.against, sources["before"])
        shutil.copytree(ROOT / "fedmoe", sources["now"] / "fedmoe")
        for source in sources.values():
            compiled(source)
            check_source(source)
        results = summary(rounds(sources, options.pairs))
    print(write_result("startup", {"before": commit, "measured": results}, vars(options)))


if __name__ == "__main__":
    main()
