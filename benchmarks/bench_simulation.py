"""Ten thousand workers on one machine, and fifty that train: what `fedmoe simulate` takes, and what it says.

    python benchmarks/bench_simulation.py [--parts scale training int8 deadline outages]

Each part is the command in a process of its own, with one thread; its wall-clock and processor seconds and its peak
memory are recorded with the report.

- `scale`: 10,000 workers of 20 experts, speeds 1/1/2/4/8, send an update every 16 s of the virtual clock,
  each recorded from a worker that trained the tiny model at rank 4 (8,192 numbers); that recording is made first, and
  not measured.
- `training`: 50 workers of 2 experts really train the tiny model at speeds 1/1/2/4/8: rounds, and FedMoE with and
  without a buffer, a bound on staleness, int8 and fewer pushes. Half an hour on a busy core.
- `int8`: the same workers at rank 16, where the header of a body is small, with int8 and a push every 12 s.
- `deadline`: the same workers beside rounds that go on without those who are late.
- `outages`: rounds and one way of FedMoE on the same workers with outages, some of whom leave.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from lib.harness import ROOT, write_result

RECORD = """
seconds = 80.0
[work]
kind = "training"
[fleet]
workers = 10
slowness = [1, 1, 2, 4, 8]
"""
SCALE = """
seconds = 108.0
[work]
kind = "recorded"
recording = "{recording}"
[fleet]
workers = 10000
experts = 20
slowness = [1, 1, 2, 4, 8]
start_within = 10.0
up_mbit = [2, 50]
down_mbit = [10, 100]
[[schemes]]
name = "fp32, every 16 s"
kind = "asynchronous"
sync_interval = 16.0
"""
TRAINING = """
seconds = 240.0
[work]
kind = "training"
learning_rate = 0.01
topics = 2
evaluate_every = 10.0
[fleet]
workers = 50
experts = 2
step_seconds = 2.0
slowness = [1, 1, 2, 4, 8]
start_within = 10.0
up_mbit = [2, 50]
down_mbit = [10, 100]
"""
TROUBLES = """
outages = { every = 600, length = 30 }
churn = { leaving = 0.1 }
"""
ROUNDS = """
[[schemes]]
name = "rounds of 5 steps"
kind = "rounds"
local_steps = 5
"""
DEADLINE = """
[[schemes]]
name = "rounds of 5 steps, deadline 22 s"
kind = "rounds"
local_steps = 5
deadline = 22.0
"""
BUFFER = """
[[schemes]]
name = "buffer of 5"
kind = "asynchronous"
buffer_size = 5
"""
MORE = """
[[schemes]]
name = "rounds of 2 steps"
kind = "rounds"
local_steps = 2
[[schemes]]
name = "no buffer"
kind = "asynchronous"
[[schemes]]
name = "buffer of 5, staleness at most 20"
kind = "asynchronous"
buffer_size = 5
max_staleness = 20
[[schemes]]
name = "buffer of 5, int8"
kind = "asynchronous"
buffer_size = 5
wire_dtype = "int8"
[[schemes]]
name = "buffer of 5, int8, every 20 s"
kind = "asynchronous"
buffer_size = 5
wire_dtype = "int8"
sync_interval = 20.0
"""
RANK_16 = TRAINING.replace("learning_rate", "rank = 16\nlearning_rate")
INT8 = """
[[schemes]]
name = "buffer of 5, int8, every 12 s"
kind = "asynchronous"
buffer_size = 5
wire_dtype = "int8"
sync_interval = 12.0
"""
#: The first scheme is what others are compared with.
REPORT = """
[report]
target = 0.98
"""
CONFIGS = {
    "training": TRAINING + ROUNDS + BUFFER + MORE + REPORT + 'robustness = ["rounds of 5 steps", "buffer of 5"]',
    "int8": RANK_16 + BUFFER + INT8 + REPORT,
    "deadline": TRAINING + DEADLINE + BUFFER + REPORT,
    "outages": TRAINING + TROUBLES + ROUNDS + BUFFER + REPORT,
}
PARTS = ("scale", *CONFIGS)


def simulated(config: str, folder: Path) -> dict[str, object]:
    """What the command took: wall-clock and processor seconds, peak memory in MiB; and its report."""
    folder.mkdir()
    file = folder / "simulation.toml"
    file.write_text(config)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment = os.environ | threads | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    began = time.perf_counter()
    command = [sys.executable, "-m", "fedmoe", "simulate", str(file), "--out", str(folder)]
    process = subprocess.Popen(command, env=environment, stdout=sys.stderr)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"fedmoe simulate ended with status {process.returncode}")
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_mib": used.ru_maxrss / 1024,
        "report": shortened(json.loads((folder / "report.json").read_bytes())),
    }


def shortened(report: Mapping[str, object]) -> dict[str, object]:
    """The report without the longest lists: counts of every staleness, and digests."""
    schemes = report["schemes"]
    assert isinstance(schemes, list)
    for scheme in schemes:
        del scheme["staleness"]["counts"], scheme["digests"]
    return dict(report)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="simulation-") as scratch:
        folder = Path(scratch)
        for part in options.parts:
            if part == "scale":
                simulated(RECORD, folder / "record")
                config = SCALE.format(recording=folder / "record" / "deltas.safetensors")
            else:
                config = CONFIGS[part]
            results = simulated(config, folder / part)
            print(write_result(f"simulation_{part}", results, {"part": part}, seeds=[0]))


if __name__ == "__main__":
    main()
