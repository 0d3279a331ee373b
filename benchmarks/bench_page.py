"""What open pages cost: 200 of them at one update a second; and a browser at 10,000 events a minute of 1,000 workers.

    python benchmarks/bench_page.py [--pages 200] [--seconds 20] [--browser PATH_OF_CHROMIUM]

`pages`: a coordinator process on loopback takes one small update a second, without pages and with so many that listen
to `/live`; the difference of its processor seconds is what they cost, as a share of a core. `browser`: 1,000 workers
send heartbeats, 10,000 a minute in all, while one page is open in Chromium (needs Playwright); its processes' share of
a core, and how long `/healthz` takes meanwhile, in milliseconds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
from lib.coordinator_process import RunningCoordinator, coordinator_process  # noqa: E402
from lib.open_pages import chromium_page, cpu_seconds, listeners  # noqa: E402

from fedmoe.lora.adapter import Layout, ModuleShape  # noqa: E402
from fedmoe.lora.codec import encode  # noqa: E402
from fedmoe.lora.manifest import BaseModel, Manifest  # noqa: E402
from fedmoe.wire.client import CoordinatorClient  # noqa: E402
from fedmoe.wire.contract.messages import UpdateHeader  # noqa: E402

LAYOUT = Layout((ModuleShape("layers.0.q", 64, 64),), 4)
MANIFEST = Manifest(BaseModel("small", "1", "0" * 64, "0" * 64), LAYOUT, 8.0)
SEED = 1
WORKERS, EVENTS_A_MINUTE = 1000, 10_000


def push_for(running: RunningCoordinator, seconds: float, sequence: int) -> int:
    """One update a second for so long; the next number."""
    body = encode(LAYOUT, np.random.default_rng(SEED).standard_normal(LAYOUT.size, np.float32), "fp32")
    with CoordinatorClient(running.url) as client:
        header = UpdateHeader(expert="law", worker="w1", epoch="e1", sequence=sequence, base_version=sequence, loss=1.0)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            begun = time.monotonic()
            client.push(header, body)
            sequence += 1
            header = header.model_copy(update={"sequence": sequence, "base_version": sequence})
            time.sleep(max(0.0, 1.0 - (time.monotonic() - begun)))
    return sequence


def measure_pages(pages: int, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as state, coordinator_process(state) as running:
        with CoordinatorClient(running.url) as client:
            client.register("law", "w1", MANIFEST)
        sequence = push_for(running, 3.0, 0)
        before = cpu_seconds(running.pid)
        sequence = push_for(running, seconds, sequence)
        alone = cpu_seconds(running.pid) - before
        with listeners(running.port, pages) as read:
            sequence = push_for(running, 3.0, sequence)
            before = cpu_seconds(running.pid)
            push_for(running, seconds, sequence)
            watched = cpu_seconds(running.pid) - before
        return {
            "pages": pages,
            "cpu_share_without": alone / seconds,
            "cpu_share_with": watched / seconds,
            "cost_of_a_core": (watched - alone) / seconds,
            "least_bytes_read": min(read),
        }


def measure_browser(chromium: str, seconds: float) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as state, ExitStack() as opened:
        running = opened.enter_context(coordinator_process(state, ["--requests-per-second", "0"]))
        with CoordinatorClient(running.url) as client:
            for number in range(10):
                client.register(f"expert_{number}", "w1", MANIFEST)
        stop, waits = threading.Event(), list[float]()
        threads = [
            threading.Thread(target=beat, args=(running.port, stop)),
            threading.Thread(target=ask_health, args=(running.port, stop, waits)),
        ]
        for thread in threads:
            thread.start()
        try:
            page = opened.enter_context(chromium_page(chromium))
            page.open(running.url, "#workers tbody tr:nth-child(100)")
            own = cpu_seconds(running.pid)
            waits.clear()
            chromium_share = page.share(seconds)
            coordinator_share = (cpu_seconds(running.pid) - own) / seconds
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    return {
        "workers": WORKERS,
        "events_a_minute": EVENTS_A_MINUTE,
        "chromium_share_of_a_core": chromium_share,
        "coordinator_share_of_a_core": coordinator_share,
        "healthz_p50_ms": 1e3 * statistics.median(waits),
        "healthz_p99_ms": 1e3 * float(np.percentile(waits, 99)),
    }


def beat(port: int, stop: threading.Event) -> None:
    """Heartbeats of all workers in turn, evenly."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    pause, number, began = 60.0 / EVENTS_A_MINUTE, 0, time.monotonic()
    while not stop.is_set():
        worker = number % WORKERS
        message = {
            "expert": f"expert_{worker % 10}",
            "worker": f"w{worker}",
            "state": "training",
            "interval": 10.0,
            "step": number // WORKERS,
            "steps": 1000,
            "tokens_per_second": 100.0 + number % 17,
            "loss": 2.0,
        }
        connection.request("POST", "/heartbeat", json.dumps(message), {"Content-Type": "application/json"})
        connection.getresponse().read()
        number += 1
        time.sleep(max(0.0, began + number * pause - time.monotonic()))
    connection.close()


def ask_health(port: int, stop: threading.Event, waits: list[float]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    while not stop.is_set():
        begun = time.monotonic()
        connection.request("GET", "/healthz")
        connection.getresponse().read()
        waits.append(time.monotonic() - begun)
        time.sleep(0.02)
    connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--browser", help="path of a Chromium; without one only the first part is measured")
    options = parser.parse_args()
    results: dict[str, object] = {"pages": measure_pages(options.pages, options.seconds)}
    print(results, flush=True)
    if options.browser:
        results["browser"] = measure_browser(options.browser, options.seconds)
        print(results["browser"], flush=True)
    print(write_result("page", results, vars(options), [SEED]))


if __name__ == "__main__":
    main()
