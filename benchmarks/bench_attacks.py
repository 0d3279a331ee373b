"""What attacks cost a coordinator: its memory, and how long `/healthz` takes meanwhile.

    python benchmarks/bench_attacks.py [--seconds 6] [--parameters 4900000]

A coordinator process on loopback has one expert of rank 16 (SmolLM2-135M: 4.9 million numbers). Another process asks
for `/healthz` every 20 ms all the while; a third is the attacker:

- `quiet`: nobody;
- `uploads N`: N pushes in bf16 at once, one from each of N workers, until all have landed;
- `answered uploads N`: the same, each answered with the newest weights;
- `json`: four clients that pull the gateway as JSON again and again, as often as they are let;
- `silent`: 500 connections that send nothing, opened again as they are closed;
- `flood`: eight connections that ask for `/list_experts` without a pause.

Each entry has the median, 99th percentile and maximum of `/healthz` in milliseconds, the largest anonymous and resident
memory of the coordinator in MB, its anonymous memory three seconds later, its CPU seconds, and how long the thread of
its event loop was ready but had no processor: on a machine that others use, that is what `/healthz` waits for.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import json
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
import psutil  # noqa: E402
from lib.coordinator_process import RunningCoordinator, coordinator_process  # noqa: E402

from fedmoe.lora.adapter import Layout, ModuleShape  # noqa: E402
from fedmoe.lora.codec import encode  # noqa: E402
from fedmoe.lora.manifest import BaseModel, Manifest  # noqa: E402
from fedmoe.wire.client import CoordinatorClient  # noqa: E402
from fedmoe.wire.contract.messages import SAFETENSORS  # noqa: E402

_CONTEXT = get_context("spawn")
_RANK, _MODULES = 16, 8
SEED = 1


def status(process: int, key: str) -> float:
    """A line of /proc/PID/status in MB."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(f"{key}:")).split()[1]) / 1024


def loop_waited(process: int) -> float:
    """Seconds that the main thread was ready to run and did not."""
    return int(Path(f"/proc/{process}/schedstat").read_text().split()[1]) / 1e9


def ask_health(port: int, stop: Event, found: list[float]) -> None:
    """Ask for `/healthz` every 20 ms over one connection; a connection that breaks counts as long as it took."""
    while not stop.is_set():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with suppress(OSError, http.client.HTTPException):
            while not stop.is_set():
                started = time.perf_counter()
                connection.request("GET", "/healthz")
                connection.getresponse().read()
                found.append((time.perf_counter() - started) * 1e3)
                time.sleep(0.02)
        connection.close()


def push_all(port: int, body: bytes, count: int, epoch: str, answered: bool) -> None:
    """One push from each of `count` workers at once, tried again until it has landed."""
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    headers = {"Content-Type": SAFETENSORS, "Content-Digest": f"sha-256=:{digest}:", "Accept": SAFETENSORS}

    def push(index: int) -> None:
        query = f"expert=python&worker=w{index}&epoch={epoch}&sequence=0&base_version=0"
        while True:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
            with suppress(OSError, http.client.HTTPException):
                target = f"/push_expert_update?{query}{'&answer=weights' if answered else ''}"
                connection.request("POST", target, body, headers)
                answer = connection.getresponse()
                answer.read()
                if answer.status in (200, 202):
                    return
            connection.close()
            time.sleep(0.3)

    threads = [threading.Thread(target=push, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def until(seconds: float, clients: int, ask: Callable[[float], None]) -> None:
    """Let `clients` threads ask until the time is over."""
    end = time.monotonic() + seconds
    threads = [threading.Thread(target=ask, args=(end,)) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def pull_json(port: int, seconds: float) -> None:
    def ask(end: float) -> None:
        while time.monotonic() < end:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/get_gateway_weights")
            answer = connection.getresponse()
            answer.read()
            connection.close()
            time.sleep(0.2 if answer.status == 429 else 0.0)

    until(seconds, 4, ask)


def hold_silent(port: int, seconds: float) -> None:
    end, held = time.monotonic() + seconds, list[socket.socket]()
    while time.monotonic() < end:
        while len(held) < 500:
            held.append(socket.create_connection(("127.0.0.1", port), 30))
        time.sleep(0.2)
    for connection in held:
        connection.close()


def flood(port: int, seconds: float) -> None:
    def ask(end: float) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while time.monotonic() < end:
            connection.request("GET", "/list_experts")
            connection.getresponse().read()

    until(seconds, 8, ask)


def quiet(port: int, seconds: float) -> None:
    time.sleep(seconds)


def measured(name: str, manifest: Manifest, attack: Callable[..., None], *arguments: object) -> dict[str, object]:
    """One attack on a fresh coordinator with one expert."""
    with tempfile.TemporaryDirectory(prefix="fedmoe-attacks-") as state, coordinator_process(state) as running:
        with CoordinatorClient(running.url) as client:
            client.register("python", "w", manifest)
        told = attacked(name, running, attack, *arguments)
    print(json.dumps(told), flush=True)
    return told


def attacked(
    name: str, running: RunningCoordinator, attack: Callable[..., None], *arguments: object
) -> dict[str, object]:
    """What the coordinator uses and how it answers while the attack lasts."""
    stop, manager = _CONTEXT.Event(), _CONTEXT.Manager()
    found, peak = manager.list(), [0.0, 0.0]
    health = _CONTEXT.Process(target=ask_health, args=(running.port, stop, found))
    attacker = _CONTEXT.Process(target=attack, args=(running.port, *arguments))
    process = psutil.Process(running.pid)
    health.start()
    while len(found) < 10:
        time.sleep(0.05)
    del found[:]
    cpu, waited, started = sum(process.cpu_times()[:2]), loop_waited(running.pid), time.monotonic()
    attacker.start()
    while attacker.is_alive():
        peak = [max(peak[0], status(running.pid, "RssAnon")), max(peak[1], status(running.pid, "VmRSS"))]
        time.sleep(0.02)
    seconds = time.monotonic() - started
    stop.set()
    health.join()
    told = {
        "attack": name,
        "seconds": seconds,
        "healthz_ms": spread([float(value) for value in found]),
        "anonymous_mb_peak": peak[0],
        "resident_mb_peak": peak[1],
        "cpu_seconds": sum(process.cpu_times()[:2]) - cpu,
        "loop_waited_for_a_processor_seconds": loop_waited(running.pid) - waited,
        "load_1_minute": os.getloadavg()[0],
    }
    time.sleep(3)
    told["anonymous_mb_three_seconds_later"] = status(running.pid, "RssAnon")
    manager.shutdown()
    return told


def spread(values: list[float]) -> dict[str, float]:
    """Median, 99th percentile, maximum, and how many there are."""
    ordered = sorted(values)
    last = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return {"median": statistics.median(ordered), "p99": last, "max": ordered[-1], "count": len(ordered)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of attacks that do not end by themselves")
    parser.add_argument("--parameters", type=int, default=4_900_000, help="numbers in the expert")
    options = parser.parse_args()
    features = options.parameters // (2 * _RANK * _MODULES)
    layout = Layout(tuple(ModuleShape(f"layers.{i}.q", features, features) for i in range(_MODULES)), _RANK)
    manifest = Manifest(BaseModel("measured", "main", "a" * 64, "b" * 64), layout, 32.0)
    flat = np.random.default_rng(SEED).normal(0, 0.01, layout.size).astype(np.float32)
    body = encode(layout, flat, "bf16")
    print(f"{layout.size} numbers, {len(body)} bytes a push")
    results = [measured("quiet", manifest, quiet, options.seconds)]
    for count in (1, 16, 64):
        results.append(measured(f"uploads {count}", manifest, push_all, body, count, "e1", False))
    results.append(measured("answered uploads 64", manifest, push_all, body, 64, "e1", True))
    for name, attack in (("json", pull_json), ("silent", hold_silent), ("flood", flood)):
        results.append(measured(name, manifest, attack, options.seconds))
    data = {"parameters": layout.size, "body_bytes": len(body), "attacks": results}
    print(write_result("attacks", data, vars(options), seeds=[SEED]))


if __name__ == "__main__":
    main()
