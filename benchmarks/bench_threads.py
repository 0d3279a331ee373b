"""What a step costs workers that share a machine, started as the README says and with nothing set.

Processor seconds a training step of one, two and four workers beside each other, all on one coordinator and the
embedded base model. Seconds of the processor, not of the clock: what else runs on the machine changes the clock first.
With `--before COMMIT` the same is measured with the package of that commit.

    python benchmarks/bench_threads.py --before HEAD
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import psutil
from lib.harness import ROOT, write_result

_SET_BY_USERS = ("OMP_", "MKL_", "KMP_", "GOMP_", "OPENBLAS_", "TOKENIZERS_", "FEDMOE_")
_POLL_SECONDS = 0.1
_START_SECONDS = 400.0
_STEP_SECONDS = 150.0


@dataclass
class Worker:
    """A running worker, and the processor seconds it had used when each of its steps was seen to be done."""

    process: subprocess.Popen[bytes]
    folder: Path
    used: list[float] = field(default_factory=list)
    steps: int = 0

    def look(self) -> None:
        """Note the seconds used if a step was done since the last look."""
        if self.process.poll() is not None:
            raise SystemExit(f"a worker ended:\n{(self.folder / 'log').read_text(errors='replace')[-2000:]}")
        file = self.folder / "metrics.jsonl"
        steps = file.read_text().count('"kind": "step"') if file.exists() else 0
        if steps > self.steps:
            times = psutil.Process(self.process.pid).cpu_times()
            self.used += [times.user + times.system] * (steps - self.steps)
            self.steps = steps

    def threads(self) -> str:
        """What the worker says it computes with; a version that does not say it took what PyTorch takes."""
        lines = [json.loads(line) for line in (self.folder / "log").read_text().splitlines() if line.startswith("{")]
        return next(
            (line["threads"] for line in lines if line.get("event") == "base_model" and "threads" in line), "all"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=4, help="steps of every worker that count")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--before", help="a commit to measure too")
    parser.add_argument("--before-workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--before-repeats", type=int, default=1)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--name", default="threads")
    arguments = parser.parse_args()
    results: dict[str, object] = {"now": _measured(ROOT, arguments.workers, arguments.repeats, arguments)}
    write_result(arguments.name, results, vars(arguments))  # what follows may take long: threads spin there
    if arguments.before:
        with tempfile.TemporaryDirectory(prefix="before-") as folder:
            archive = subprocess.run(
                ["git", "archive", arguments.before, "fedmoe"], cwd=ROOT, capture_output=True, check=True
            )
            subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
            commit = subprocess.run(
                ["git", "rev-parse", arguments.before], cwd=ROOT, capture_output=True, text=True, check=True
            )
            before = _measured(Path(folder), arguments.before_workers, arguments.before_repeats, arguments)
            results["before"] = {"commit": commit.stdout.strip(), **before}
    print(json.dumps(results, indent=2))
    print(write_result(arguments.name, results, vars(arguments)))


def _measured(source: Path, counts: Sequence[int], repeats: int, arguments: argparse.Namespace) -> dict[str, object]:
    """For every number of workers: median over the workers of all repeats, smallest and largest step of any of them.

    Repeats are outside, so that what runs on the machine at one time meets all numbers of workers.
    """
    seconds: dict[int, list[list[float]]] = {count: [] for count in counts}
    threads: dict[int, list[str]] = {count: [] for count in counts}
    beside: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(repeats):
        for count in counts:
            beside[count].append(round(os.getloadavg()[0], 1))
            for worker_seconds, worker_threads in _run(source, count, arguments):
                seconds[count].append(worker_seconds)
                threads[count].append(worker_threads)
            print(f"{count} workers: {_median(seconds[count]):.2f} s a step", file=sys.stderr, flush=True)
    alone = _median(seconds[counts[0]])
    return {
        str(count): {
            "cpu_seconds_a_step": {
                "median": round(_median(found), 3),
                "smallest": round(min(map(min, found)), 3),
                "largest": round(max(map(max, found)), 3),
                "workers": len(found),
                "steps": sum(map(len, found)),
            },
            f"times_{counts[0]}": round(_median(found) / alone, 3),
            "threads": threads[count],
            "load_average_before": beside[count],
        }
        for count, found in seconds.items()
    }


def _median(steps: Sequence[Sequence[float]]) -> float:
    """The worker in the middle, by its mean over its steps: some send an update, and that is part of the price."""
    return statistics.median(map(statistics.mean, steps))


def _run(source: Path, count: int, arguments: argparse.Namespace) -> Iterator[tuple[list[float], str]]:
    """Processor seconds of each step, and threads, of each of `count` workers, while all of them train."""
    with tempfile.TemporaryDirectory(prefix="threads-") as name, _stopped() as started:
        folder = Path(name)
        url = _coordinator(source, folder, started)
        workers = [
            _worker(source, folder / f"w{number}", url, arguments.max_length, started) for number in range(count)
        ]
        _until(workers, lambda worker: len(worker.used) >= 1, _START_SECONDS)
        for worker in workers:
            worker.used = worker.used[-1:]  # from here on all of them train
        _until(workers, lambda worker: len(worker.used) > arguments.steps, _STEP_SECONDS * arguments.steps)
        for worker in workers:
            yield [after - before for before, after in pairwise(worker.used)], worker.threads()


def _until(workers: Sequence[Worker], done: Callable[[Worker], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not all(done(worker) for worker in workers):
        if time.monotonic() > deadline:
            raise SystemExit("the workers are too slow for this benchmark")
        for worker in workers:
            worker.look()
        time.sleep(_POLL_SECONDS)


def _coordinator(source: Path, folder: Path, started: list[subprocess.Popen[bytes]]) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    _start(source, folder, ["coordinator", "--port", str(port), "--state-dir", str(folder / "state")], started)
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return f"http://127.0.0.1:{port}"
        time.sleep(_POLL_SECONDS)


def _worker(source: Path, folder: Path, url: str, max_length: int, started: list[subprocess.Popen[bytes]]) -> Worker:
    folder.mkdir()
    rows = (
        {"prompt": f"What is {a} plus {b}, and how do you find it?", "completion": f"Add {a} and {b}: it is {a + b}."}
        for a in range(20, 40)
        for b in range(30, 60)
    )
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["worker", "--coordinator-url", url, "--worker-id", folder.name, "--specialty", f"{folder.name}_expert"]
    command += ["--dataset", str(folder / "data.jsonl"), "--base-model", "smollm2", "--state-dir", str(folder)]
    command += ["--max-length", str(max_length), "--no-send-statistics", "--device", "cpu"]
    return Worker(_start(source, folder, command, started), folder)


def _start(
    source: Path, folder: Path, arguments: Sequence[str], started: list[subprocess.Popen[bytes]]
) -> subprocess.Popen[bytes]:
    environment: Mapping[str, str] = {
        name: value for name, value in os.environ.items() if not name.startswith(_SET_BY_USERS)
    }
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedmoe", *arguments],
            cwd=folder,
            env={**environment, "PYTHONPATH": str(source)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    started.append(process)
    return process


@contextmanager
def _stopped() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Ends what was started, whatever happens."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started
    finally:
        for process in reversed(started):
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
