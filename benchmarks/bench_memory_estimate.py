"""The memory that a worker's plan tells, against the peak of real training steps.

    python benchmarks/bench_memory_estimate.py [--cases tiny:1024:1 smollm2:256:1]

Each case, BASE:LENGTH:BATCH and `:checkpointing` for less memory, is a process of its own in float32 on the CPU. The
resident set is read before the base model is loaded, the peak is that of two steps after it: every token is learned.
Linux only: the kernel forgets the peak of loading where `/proc/self/clear_refs` is told to.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first

_CASES = ["tiny:1024:1", "tiny:1024:2", "smollm2:256:1", "smollm2:512:1", "smollm2:512:1:checkpointing"]
_RANK = 16
_MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=_CASES)
    parser.add_argument("--one", action="store_true", help="measure the first case in this process, print JSON")
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measured(asked.cases[0])))
        return
    rows = []
    for case in asked.cases:
        command = [sys.executable, __file__, "--one", "--cases", case]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(rows[-1], flush=True)
    write_result("memory_estimate", {"rows": rows}, vars(asked))


def measured(case: str) -> dict[str, object]:
    """Peak and estimate of one case, MiB."""
    from fedmoe.datasets.tokens.packing import Block, collate
    from fedmoe.models.base import load_base
    from fedmoe.models.step_memory import StepShape
    from fedmoe.qwen_finetune import LoraConfig, QwenLoRAExpert, TrainingConfig
    from fedmoe.worker.plan import memory_plan

    name, length, batch, *further = case.split(":")
    checkpointing, tokens = "checkpointing" in further, int(length)
    before = _status("VmRSS")
    base = load_base(name, "cpu", "fp32")
    parameters = sum(parameter.numel() for parameter in base.model.parameters())
    training = TrainingConfig(per_device_train_batch_size=int(batch), gradient_checkpointing=checkpointing)
    expert = QwenLoRAExpert(base, LoraConfig(_RANK), training)
    numbers = np.arange(tokens, dtype=np.int64)
    block = Block(numbers % 250, numbers % 250, numbers, np.zeros(tokens, np.int64))
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        expert.train_step([collate([block] * int(batch))])
    peak = _status("VmHWM")
    text, size = base.model.config.get_text_config(), expert.attached.layout.size
    plan = memory_plan(parameters, StepShape.of(text, size, _RANK, tokens, int(batch), checkpointing))
    return {
        "base": name,
        "length": tokens,
        "batch": int(batch),
        "checkpointing": checkpointing,
        "process_mib": round(before / _MIB),
        "measured_mib": round((peak - before) / _MIB),
        "estimated_mib": round(plan.total / _MIB),
    }


def _status(key: str) -> int:
    """Bytes in a line of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
