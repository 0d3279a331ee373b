"""What the page of arena runs costs: 20 of them, and one in a browser, while a run writes ten records a second.

    python benchmarks/bench_runs_page.py [--pages 20] [--seconds 20] [--iterations 300] [--browser PATH_OF_CHROMIUM]

The run has so many iterations of four policies when the page is opened. `pages`: processor seconds of `fedmoe
dashboard` while so many connections listen to `/live`, as a share of a core, and while one does; bytes of a state.
`browser`: the share of a core of Chromium's processes with one page open at its top (needs Playwright).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lib.harness import ROOT, pin_threads, write_result

pin_threads(1)

from lib.open_pages import chromium_page, cpu_seconds, listeners  # noqa: E402  # threads are pinned first

from fedmoe.monitor.sample_records import sample_records  # noqa: E402

SEED, POLICIES, RECORDS_A_SECOND = 1, 4, 10


@contextmanager
def growing_run(folder: Path, iterations: int) -> Iterator[None]:
    """A run that goes on beside us, its records evenly in time."""
    lines = [json.dumps(record) + "\n" for record in sample_records(POLICIES, 2 * iterations, SEED)]
    half, stop = len(lines) // 2, threading.Event()
    (folder / "metrics.jsonl").write_text("".join(lines[:half]))

    def write() -> None:
        began = time.monotonic()
        with (folder / "metrics.jsonl").open("a") as file:
            for number, line in enumerate(lines[half:]):
                file.write(line)
                file.flush()
                if stop.wait(max(0.0, began + number / RECORDS_A_SECOND - time.monotonic())):
                    return

    thread = threading.Thread(target=write)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextmanager
def dashboard(run: Path) -> Iterator[tuple[int, str]]:
    """`fedmoe dashboard` of a run: its process, and its address."""
    command = [sys.executable, "-m", "fedmoe", "dashboard", str(run), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline().split()[-1]
    finally:
        process.terminate()
        process.wait(60)


def share_of(process: int, port: int, pages: int, seconds: float) -> tuple[float, int]:
    """The share of a core that a server takes with so many pages open, and the least bytes that one of them read."""
    with listeners(port, pages) as read:
        time.sleep(3.0)
        before = cpu_seconds(process)
        time.sleep(seconds)
        return (cpu_seconds(process) - before) / seconds, min(read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--browser", help="path of a Chromium; without one only the server is measured")
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as name,
        growing_run(Path(name), options.iterations),
        dashboard(Path(name)) as (process, url),
    ):
        port = int(url.rstrip("/").rpartition(":")[2])
        one, _ = share_of(process, port, 1, options.seconds)
        all_pages, read = share_of(process, port, options.pages, options.seconds)
        results: dict[str, object] = {
            "pages": {
                "pages": options.pages,
                "iterations": options.iterations,
                "records_a_second": RECORDS_A_SECOND,
                "server_share_of_a_core_one": one,
                "server_share_of_a_core": all_pages,
                "least_bytes_read": read,
            }
        }
        print(results, flush=True)
        if options.browser:
            with chromium_page(options.browser) as page:
                page.open(url, "#charts .main-svg")
                results["browser"] = {"chromium_share_of_a_core": page.share(options.seconds)}
            print(results["browser"], flush=True)
    print(write_result("runs_page", results, vars(options), [SEED]))


if __name__ == "__main__":
    main()
