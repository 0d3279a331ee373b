"""What a push and a list of all experts take with 10, 100 and 1,000 experts, each with an update of its own.

One coordinator process on loopback and one caller. A pair is a push to one expert and the list that follows it; also
measured are the resident memory and the start with all that was registered. Adapters are small, so that what grows is
the number of experts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from lib.coordinator_process import coordinator_process
from lib.harness import write_result

from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.codec import encode
from fedmoe.lora.manifest import BaseModel, Manifest
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import UpdateHeader

LAYOUT = Layout((ModuleShape("layers.0.q", 64, 64), ModuleShape("layers.0.v", 64, 32)), 4)
MANIFEST = Manifest(BaseModel("many/experts", "main", "a" * 64, "b" * 64), LAYOUT, 8.0)
EXPERTS = (10, 100, 1000)
SEED = 7


class Caller:
    """Registers and pushes for all experts, by hand: no worker trains."""

    def __init__(self, url: str) -> None:
        self.api = CoordinatorClient(url)
        self.versions: dict[str, int] = {}
        self.sequence = 0
        self._numbers = np.random.default_rng(SEED)

    def push(self, expert: str) -> None:
        delta = self._numbers.normal(0, 0.01, LAYOUT.size).astype(np.float32)
        base = self.versions.get(expert, 0)
        header = UpdateHeader(
            expert=expert, worker=f"w-{expert}", epoch="e1", sequence=self.sequence, base_version=base
        )
        self.versions[expert] = self.api.push(header, encode(LAYOUT, delta)).result.version
        self.sequence += 1


def milliseconds(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(seconds, n=4)
    return {"median_ms": 1e3 * median, "quartile_1_ms": 1e3 * low, "quartile_3_ms": 1e3 * high, "count": len(seconds)}


def measure(experts: int, repeats: int, folder: str) -> dict[str, object]:
    """One number of experts."""
    with coordinator_process(folder) as running:
        caller = Caller(running.url)
        names = [f"expert-{number}" for number in range(experts)]
        for name in names:
            caller.api.register(name, "bench", MANIFEST)
            caller.push(name)
        caller.api.list_experts()
        pairs: dict[str, list[float]] = {"push": [], "list": [], "push_and_list": []}
        for _ in range(repeats):
            began = time.perf_counter()
            caller.push(names[0])
            pushed = time.perf_counter()
            listing = caller.api._retried("GET", "/list_experts")
            listed = time.perf_counter()
            pairs["push"].append(pushed - began)
            pairs["list"].append(listed - pushed)
            pairs["push_and_list"].append(listed - began)
        memory = psutil.Process(running.pid).memory_info().rss
    with coordinator_process(folder) as again:
        seconds = again.start_seconds
    times = {name: milliseconds(found) for name, found in pairs.items()}
    return {**times, "list_bytes": len(listing.body), "resident_mib": round(memory / 2**20, 1), "start_s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60, help="pairs of a push and a list")
    parser.add_argument("--experts", type=int, nargs="*", default=list(EXPERTS), help="numbers of experts")
    options = parser.parse_args()
    results: dict[str, object] = {}
    for experts in options.experts:
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(experts, options.repeats, str(Path(scratch) / "state"))
        results[f"{experts}_experts"] = found
        print(
            f"{experts:5} experts: push and list {found['push_and_list']}, start {found['start_s']:.1f} s", flush=True
        )
    print(write_result("many_experts", results, {"repeats": options.repeats, "experts": options.experts}, [SEED]))


if __name__ == "__main__":
    main()
