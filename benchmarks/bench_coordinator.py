"""The coordinator under load: durable updates per second and pull latency, beside the floor of the same machine.

    python benchmarks/bench_coordinator.py [--seconds 4] [--windows 3]

A coordinator process on loopback takes rank-16 updates of SmolLM2-135M (19.5 MB in fp32, 9.8 in bf16, 5.0 in int8) from
1, 4 and 16 workers, one expert each at most four experts in all. The workers are threads of one other process that send
prepared bodies over keep-alive connections and wait for each answer: an answer means that the update is on disk, in the
journal and applied. Every body differs in its last numbers: bytes that are there already are not written again.

The floor is what one update costs without any of our code between the parts: receive the same bytes from a socket
(another process sends them), sha256, turn them into float32 and check that they are finite, write, fsync, rename, fsync
the folder, and add them to the weights; one after the other in one process. The coordinator may exceed it where it
overlaps those parts over several updates.

The disk of the machine behind the committed result gives a short burst and then about 400 MB/s, which is 20 fp32
updates per second: there the write is most of the floor. Tried on it and of no use: fallocate before the write,
starting the write-back early with sync_file_range, fdatasync instead of fsync.

Pulls: `pull` downloads the newest weights (each worker its own connection), `not modified` asks with the current ETag.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import os
import shutil
import socket
import statistics
import tempfile
import threading
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import urlencode

from lib.harness import ROOT, pin_threads, write_result

pin_threads(1)

import ml_dtypes  # noqa: E402  # threads are pinned first
import numpy as np  # noqa: E402
import psutil  # noqa: E402
from lib.coordinator_process import RunningCoordinator, coordinator_process  # noqa: E402
from lib.shapes import smollm2_layout  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from fedmoe.lora.codec import WIRE_DTYPES, WireDtype, decode, encode  # noqa: E402
from fedmoe.lora.manifest import BaseModel, Manifest  # noqa: E402
from fedmoe.lora.update_rules import (  # noqa: E402
    add_scaled,
    first_not_finite,
)
from fedmoe.runtime.files import fsync_folder  # noqa: E402
from fedmoe.wire.client import CoordinatorClient  # noqa: E402
from fedmoe.wire.contract.messages import SAFETENSORS  # noqa: E402

LAYOUT = smollm2_layout()
MANIFEST = Manifest(BaseModel("bench", "1", "a" * 64, "b" * 64), LAYOUT, 32.0)
WORKERS = (1, 4, 16)
EXPERTS = 4
SEED = 0
PULLS = 8


TAIL = 8  # numbers at the end of a body that make it unlike any other


@dataclass(frozen=True)
class Prepared:
    """A body without its last numbers, hashed so far; the last ones make every update another one at no cost."""

    head: memoryview
    hashed: hashlib._Hash
    dtype: WireDtype

    def unique(self, number: int) -> tuple[list[bytes | memoryview], dict[str, str]]:
        """The parts of a body nobody sent before, and the headers that go with it."""
        digits = np.array([number // 100**place % 100 for place in range(TAIL)])
        tail = digits.astype(np.int8).tobytes() if self.dtype == "int8" else _small(digits, self.dtype)
        hasher = self.hashed.copy()
        hasher.update(tail)
        digest = b64encode(hasher.digest()).decode()
        length = str(len(self.head) + len(tail))
        headers = {"Content-Type": SAFETENSORS, "Content-Digest": f"sha-256=:{digest}:", "Content-Length": length}
        return [self.head, tail], headers


def _small(digits: NDArray[np.int64], dtype: WireDtype) -> bytes:
    """Digits below 100 as small numbers that bfloat16 holds exactly."""
    stored = np.dtype(np.float32) if dtype == "fp32" else np.dtype(ml_dtypes.bfloat16)
    return (digits * 2.0**-20).astype(stored).tobytes()


@dataclass
class Load:
    """What one worker thread did: seconds of every push or pull."""

    seconds: list[float] = field(default_factory=list)
    finished: list[float] = field(default_factory=list)


def prepare(dtype: WireDtype) -> Prepared:
    """An update of the size a worker sends."""
    flat = np.random.default_rng(SEED).normal(0, 1e-4, LAYOUT.size).astype(np.float32)
    body = memoryview(encode(LAYOUT, flat, dtype))
    head = body[: -TAIL * {"fp32": 4, "bf16": 2, "int8": 1}[dtype]]
    return Prepared(head, hashlib.sha256(head), dtype)


@contextmanager
def running_coordinator(state: str, source: Path = ROOT) -> Iterator[RunningCoordinator]:
    """A coordinator process with the package of `source`, at which the experts are registered."""
    with coordinator_process(state, source=source) as running:
        with CoordinatorClient(running.url) as api:
            for index in range(EXPERTS):
                api.register(f"expert-{index}", "bench", MANIFEST)
        yield running


def push_until(port: int, worker: int, prepared: Prepared, stop: threading.Event, load: Load) -> None:
    """One worker: push, wait for the answer, push again."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    sequence = 0
    while not stop.is_set():
        parts, headers = prepared.unique(sequence * 100 + worker)
        query = {
            "expert": f"expert-{worker % EXPERTS}",
            "worker": f"bench-{worker}",
            "epoch": "bench",
            "sequence": sequence,
            "base_version": 0,
        }
        started = time.perf_counter()
        connection.request("POST", "/push_expert_update?" + urlencode(query), parts, headers)
        response = connection.getresponse()
        answer = response.read()
        if response.status != 200:
            raise RuntimeError(f"push answered {response.status}: {answer[:300]!r}")
        load.seconds.append(time.perf_counter() - started)
        load.finished.append(time.perf_counter())
        sequence += 1
    connection.close()


def run_pushes(
    port: int, workers: int, prepared: Prepared, seconds: float, windows: int
) -> tuple[list[float], list[float]]:
    """Updates per second in every window, and the seconds of every push; one window before them warms up."""
    stop = threading.Event()
    loads = [Load() for _ in range(workers)]
    threads = [
        threading.Thread(target=push_until, args=(port, index, prepared, stop, loads[index]))
        for index in range(workers)
    ]
    for thread in threads:
        thread.start()
    time.sleep(seconds / 2)
    begin = time.perf_counter()
    time.sleep(seconds * windows)
    end = time.perf_counter()
    stop.set()
    for thread in threads:
        thread.join()
    finished = sorted(moment for load in loads for moment in load.finished)
    rates = []
    for window in range(windows):
        low = begin + window * (end - begin) / windows
        high = begin + (window + 1) * (end - begin) / windows
        rates.append(sum(low <= moment < high for moment in finished) / (high - low))
    return rates, [second for load in loads for second in load.seconds]


def pull_some(port: int, worker: int, etag: str | None, dtype: str, load: Load) -> None:
    """One worker: download (or ask with an ETag) a few times."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    headers = {"Accept": SAFETENSORS, "Content-Type": "application/json"} | ({"If-None-Match": etag} if etag else {})
    body = json.dumps({"expert": f"expert-{0 if etag else worker % EXPERTS}", "dtype": dtype})
    for _ in range(PULLS):
        started = time.perf_counter()
        connection.request("POST", "/get_expert_weights", body, headers)
        response = connection.getresponse()
        data = response.read()
        if response.status != (304 if etag else 200):
            raise RuntimeError(f"pull answered {response.status}: {data[:300]!r}")
        load.seconds.append(time.perf_counter() - started)
    connection.close()


def run_pulls(port: int, workers: int, dtype: str, etag: str | None = None) -> dict[str, float]:
    """Seconds of pulls by all workers at once."""
    loads = [Load() for _ in range(workers)]
    threads = [
        threading.Thread(target=pull_some, args=(port, index, etag, dtype, loads[index])) for index in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latency([second for load in loads for second in load.seconds])


def latency(seconds: list[float]) -> dict[str, float]:
    """Median, 99th percentile, extremes, in milliseconds."""
    ordered = sorted(seconds)
    return {
        "median_ms": 1e3 * statistics.median(ordered),
        "p99_ms": 1e3 * ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "min_ms": 1e3 * ordered[0],
        "max_ms": 1e3 * ordered[-1],
        "count": len(ordered),
    }


def measure_coordinator(
    workers: int, dtype: WireDtype, seconds: float, windows: int, scratch: str
) -> dict[str, object]:
    """One coordinator, one number of workers, one precision."""
    with tempfile.TemporaryDirectory(dir=scratch) as state, running_coordinator(state) as running:
        port = running.port
        seen = psutil.Process(running.pid)
        before = sum(seen.cpu_times()[:2])
        rates, pushes = run_pushes(port, workers, prepare(dtype), seconds, windows)
        cpu = sum(seen.cpu_times()[:2]) - before
        memory = seen.memory_full_info()
        pull = run_pulls(port, workers, dtype)
        with CoordinatorClient(running.url) as api:
            pulled = api.pull_expert("expert-0", dtype=dtype)
        assert pulled is not None
        return {
            "updates_per_second": {"median": statistics.median(rates), "min": min(rates), "max": max(rates)},
            "push": latency(pushes),
            "pull": pull,
            "not_modified": run_pulls(port, workers, dtype, pulled.etag),
            "server_cpu_seconds_per_update": cpu / len(pushes),
            "server_private_memory_mib": round(memory.uss / 2**20, 1),
        }


def send_forever(port: int, body: bytes, count: int) -> None:
    """The other end of the floor: sends the same bytes again and again."""
    with socket.create_connection(("127.0.0.1", port)) as sender:
        for _ in range(count):
            sender.sendall(body)
            sender.recv(1)


def measure_floor(dtype: WireDtype, scratch: str, repeats: int = 30) -> dict[str, object]:
    """Seconds of every part of an update, and updates per second if they simply follow each other."""
    prepared = prepare(dtype)
    body = b"".join(prepared.unique(0)[0])
    listener = socket.create_server(("127.0.0.1", 0))
    sender = get_context("spawn").Process(target=send_forever, args=(listener.getsockname()[1], body, repeats + 1))
    sender.start()
    connection, _ = listener.accept()
    buffer = bytearray(len(body))
    weights = np.zeros(LAYOUT.size, np.float32)
    parts: dict[str, list[float]] = {name: [] for name in ("receive", "hash", "check", "fsync", "apply", "total")}
    folder = Path(tempfile.mkdtemp(dir=scratch))
    for index in range(repeats + 1):
        moments = [time.perf_counter()]
        _receive(connection, buffer)
        moments.append(time.perf_counter())
        hashlib.sha256(buffer).digest()
        moments.append(time.perf_counter())
        delta = decode(buffer, LAYOUT).flat
        if first_not_finite(LAYOUT, delta) is not None:
            raise RuntimeError("the floor's update must be finite")
        moments.append(time.perf_counter())
        _write(folder / f"{index}", buffer)
        moments.append(time.perf_counter())
        weights = add_scaled(weights, delta, 1.0)
        moments.append(time.perf_counter())
        connection.sendall(b".")
        if index:  # the first one warms up
            for name, left, right in zip(parts, moments, moments[1:], strict=False):
                parts[name].append(right - left)
            parts["total"].append(moments[-1] - moments[0])
    sender.join(30)
    connection.close()
    listener.close()
    shutil.rmtree(folder)
    medians = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in parts.items()}
    totals = sorted(parts["total"])
    rates = {"median": 1 / statistics.median(totals), "min": 1 / totals[-1], "max": 1 / totals[0]}
    return {"updates_per_second": rates, "body_bytes": len(body), **medians}


def _receive(connection: socket.socket, buffer: bytearray) -> None:
    view = memoryview(buffer)
    while view:
        view = view[connection.recv_into(view) :]


def _write(path: Path, data: bytearray) -> None:
    temporary = path.with_suffix(".tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
    os.fsync(descriptor)
    os.close(descriptor)
    os.rename(temporary, path)
    fsync_folder(path.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="length of a measured window")
    parser.add_argument("--windows", type=int, default=3, help="windows per configuration")
    parser.add_argument("--scratch", default=None, help="folder on the disk to measure (default: the temporary folder)")
    options = parser.parse_args()
    results: dict[str, object] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        for dtype in WIRE_DTYPES:
            floor = measure_floor(dtype, scratch)
            base = floor["updates_per_second"]["median"]  # type: ignore[index]
            rows: dict[str, object] = {"floor": floor}
            for workers in WORKERS:
                row = measure_coordinator(workers, dtype, options.seconds, options.windows, scratch)
                rate = row["updates_per_second"]["median"]  # type: ignore[index]
                row["share_of_floor"] = rate / base
                rows[f"{workers}_workers"] = row
                print(
                    f"{dtype:5} {workers:3} workers  {rate:6.1f} updates/s  {100 * rate / base:4.0f} % of the floor "
                    f"({base:.1f}/s)  pull {row['pull']['median_ms']:.0f} ms  "  # type: ignore[index]
                    f"304 {row['not_modified']['median_ms']:.1f} ms",  # type: ignore[index]
                    flush=True,
                )
            results[dtype] = rows
    arguments = {"seconds": options.seconds, "windows": options.windows, "experts": EXPERTS}
    print(write_result("coordinator", results, arguments, seeds=[SEED]))


if __name__ == "__main__":
    main()
