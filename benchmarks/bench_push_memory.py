"""Memory of a coordinator while many updates arrive at once, and afterwards, beside an earlier build.

    python benchmarks/bench_push_memory.py --against REV [--pushes 64] [--dtype bf16] [--rounds 5]

A coordinator process of each build, just started, with experts of SmolLM2-135M at rank 16. `--pushes` workers connect,
and all send one update of `--dtype` at the same time and read the newest weights that come with the answer.
Measured is the process's anonymous memory in MB, above what it was before the first push: the most while they are under
way, looked at 200 times a second, and what is left five seconds after the last answer. Each round takes new processes.
"""

from __future__ import annotations

import argparse
import http.client
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

from lib.harness import ROOT, pin_threads, write_result

pin_threads(1)

from bench_against import spread, unpack  # noqa: E402  # threads are pinned first
from bench_coordinator import Prepared, prepare, running_coordinator  # noqa: E402

from fedmoe.wire.contract.messages import SAFETENSORS  # noqa: E402

_IDLE_SECONDS = 5.0


def anonymous_mb(process: int) -> float:
    """Anonymous memory of a process in MB of 10^6 bytes."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith("RssAnon:")).split()[1]) * 1024 / 1e6


@contextmanager
def highest(process: int) -> Iterator[list[float]]:
    """The most anonymous memory in MB while the block runs, as the one element of a list."""
    most, over = [anonymous_mb(process)], threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            most[0] = max(most[0], anonymous_mb(process))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def push(port: int, worker: int, prepared: Prepared, ready: threading.Barrier, failures: list[str]) -> None:
    """One update and the newest weights; nothing of them is kept."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    parts, headers = prepared.unique(worker)
    fields = {"expert": "expert-0", "worker": f"w{worker}", "epoch": "bench", "sequence": 0, "base_version": 0}
    connection.connect()
    ready.wait()
    query = urlencode({**fields, "answer": "weights"})
    connection.request("POST", f"/push_expert_update?{query}", parts, headers | {"Accept": SAFETENSORS})
    answer = connection.getresponse()
    if answer.status != 200:
        failures.append(f"{answer.status}: {answer.read(300)!r}")
    while answer.read(1 << 16):
        pass
    connection.close()


def measure(source: Path, pushes: int, prepared: Prepared) -> tuple[float, float]:
    """MB above the idle coordinator: at most during the pushes, and five seconds after them."""
    with tempfile.TemporaryDirectory(prefix="memory-") as state, running_coordinator(state, source) as running:
        time.sleep(2)
        idle, ready, failures = anonymous_mb(running.pid), threading.Barrier(pushes), list[str]()
        workers = [
            threading.Thread(target=push, args=(running.port, worker, prepared, ready, failures))
            for worker in range(pushes)
        ]
        with highest(running.pid) as most:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        assert not failures, failures[:3]
        time.sleep(_IDLE_SECONDS)
        return most[0] - idle, anonymous_mb(running.pid) - idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="REV", help="the earlier revision, as git names it")
    parser.add_argument("--pushes", type=int, default=64, help="workers that send at the same time")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "int8"], default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    prepared = prepare(options.dtype)
    with tempfile.TemporaryDirectory(prefix="fedmoe-before-") as folder:
        sources = {"before": Path(folder), "now": ROOT}
        results: dict[str, object] = {"before_commit": unpack(options.against, sources["before"])}
        rows: dict[str, list[tuple[float, float]]] = {side: [] for side in sources}
        for number in range(options.rounds):
            for side in list(sources) if number % 2 else reversed(list(sources)):
                rows[side].append(measure(sources[side], options.pushes, prepared))
                print(side, rows[side][-1], flush=True)
    for side, values in rows.items():
        results[side] = {name: spread([row[at] for row in values]) for at, name in enumerate(("most_mb", "left_mb"))}
    print(write_result("push_memory", results, vars(options), [0]))


if __name__ == "__main__":
    main()
