"""What a start costs: CPU seconds to recover a long journal, with snapshots and without, and the parts of it.

    python benchmarks/bench_recovery.py [--rows 100000] [--repeats 5]

A state directory with the given number of updates of small experts (84 numbers), a snapshot every 50 versions, is made
without syncing. Then a process of its own opens it as `fedmoe coordinator` does, up to where it would listen: chain,
checksums, the file beside the journal, recovery, roster. CPU seconds of that process count, without its imports. What a
start costs in the experts' size is hashing and reading their snapshots, which `bench_coordinator.py` has.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first

from fedmoe.experts import ExpertModel  # noqa: E402
from fedmoe.federation.events import ExpertRegistered, UpdateAccepted  # noqa: E402
from fedmoe.lora.adapter import Layout, ModuleShape  # noqa: E402
from fedmoe.lora.codec import encode  # noqa: E402
from fedmoe.lora.manifest import BaseModel, Manifest  # noqa: E402
from fedmoe.lora.update_rules import RULES  # noqa: E402
from fedmoe.server.history.history import SNAPSHOT_EVERY  # noqa: E402
from fedmoe.server.history.replay import snapshot_bytes  # noqa: E402
from fedmoe.server.storage.sqlite_journal import SqliteJournal  # noqa: E402
from fedmoe.server.storage.state_dir import StateDir  # noqa: E402

LAYOUT = Layout((ModuleShape("layers.0.q", 12, 8), ModuleShape("layers.0.v", 12, 10)), 2)
MANIFEST = Manifest(BaseModel("bench", "1", "a" * 64, "b" * 64), LAYOUT, 4.0)
EXPERTS, WORKERS, DELTAS, BATCH, SEED = 4, 20, 500, 500, 0

OPEN = """
import json, resource, sys
from fedmoe.config import CoordinatorConfig
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.runtime.logs import configure
configure()
before = resource.getrusage(resource.RUSAGE_SELF)
running = DistributedCoordinator(CoordinatorConfig(state_dir=sys.argv[1], enable_gateway=False))
after = resource.getrusage(resource.RUSAGE_SELF)
versions = sum(expert.version for expert in running.service.coordinator.experts.values())
roster = sum(len(running.service.roster.workers(name, 0.0)) for name in running.service.coordinator.experts)
running.close()
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(json.dumps({"cpu_seconds": cpu, "versions": versions, "roster": roster, "peak_mib": after.ru_maxrss / 1024}))
"""


def fill(folder: Path, rows: int) -> None:
    """A state directory with so many updates."""
    state = StateDir.open(folder)
    bodies = [encode(LAYOUT, delta) for delta in _deltas()]
    for body in bodies:
        (folder / "blobs" / hashlib.sha256(body).hexdigest()).write_bytes(body)
    digests = [hashlib.sha256(body).hexdigest() for body in bodies]
    assert isinstance(state.journal, SqliteJournal)
    state.journal._connection.exec_driver_sql("PRAGMA synchronous=OFF")
    state.journal._connection.rollback()
    events: list[ExpertRegistered | UpdateAccepted] = []
    made: list[str | None] = []
    for event, model in _past(rows, digests):
        events.append(event)
        made.append(model.digest if model.version else None)
        if len(events) == BATCH:
            state.journal.append(events, made)
            events, made = [], []
        if model.version and model.version % SNAPSHOT_EVERY == 0:
            body = snapshot_bytes(model.state)
            (folder / "blobs" / hashlib.sha256(body).hexdigest()).write_bytes(body)
            state.journal.add_snapshot(model.name, model.version, hashlib.sha256(body).hexdigest())
    state.journal.append(events, made)
    state.close()


def _deltas() -> list[np.ndarray[tuple[int], np.dtype[np.float32]]]:
    random = np.random.default_rng(SEED)
    return [random.normal(0, 1e-3, LAYOUT.size).astype(np.float32) for _ in range(DELTAS)]


def _past(rows: int, digests: list[str]) -> Iterator[tuple[ExpertRegistered | UpdateAccepted, ExpertModel]]:
    """Every event and the expert after it."""
    rule, deltas = RULES["sgd"], _deltas()
    models = {
        f"expert-{number}": ExpertModel.initial(f"expert-{number}", MANIFEST, 1, rule) for number in range(EXPERTS)
    }
    for name, model in models.items():
        yield ExpertRegistered(name, "bench", MANIFEST, 1, 0.0), model
    for number in range(rows):
        name, worker = f"expert-{number % EXPERTS}", f"worker-{number % WORKERS}"
        before = models[name]
        info = {"loss": 1.0, "steps": float(number), "tokens": 4096.0 * number, "seconds": 1.5, "norm": 0.1}
        event = UpdateAccepted(
            *(name, worker, "bench", number, before.version, digests[number % DELTAS], 0, 1.0, before.version + 1),
            float(number),
            info,
        )
        models[name] = before.land(deltas[number % DELTAS], 1.0, rule)
        yield event, models[name]


def opened(folder: Path) -> dict[str, float]:
    """What one start cost."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(folder)], env=environment, capture_output=True, check=True, text=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measured(folder: Path, repeats: int, rows: int) -> dict[str, object]:
    runs = [opened(folder) for _ in range(repeats)]
    if any(run["versions"] != rows for run in runs):
        raise RuntimeError(f"not everything was recovered: {runs}")
    seconds = sorted(run["cpu_seconds"] for run in runs)
    spread = {"median": statistics.median(seconds), "min": seconds[0], "max": seconds[-1], "repeats": repeats}
    return {"cpu_seconds": spread, "peak_mib": max(run["peak_mib"] for run in runs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "state"
        fill(folder, options.rows)
        results = {"with_snapshots": measured(folder, options.repeats, options.rows)}
        bare = Path(scratch) / "bare"
        shutil.copytree(folder, bare)
        state = StateDir.open(bare)
        for number in range(EXPERTS):
            for version in state.journal.snapshots(f"expert-{number}"):
                state.journal.drop_snapshot(f"expert-{number}", version)
        state.close()
        results["without_snapshots"] = measured(bare, max(1, options.repeats // 2), options.rows)
        results["journal_mib"] = {"size": (folder / "journal.sqlite").stat().st_size / 2**20}
    print(json.dumps(results, indent=1))
    print(write_result("recovery", results, {"rows": options.rows, "repeats": options.repeats}, seeds=[SEED]))


if __name__ == "__main__":
    main()
