"""One full step of some policies, the same for us and for the peers: what is computed, and how it is measured.

Only the standard library: the peers import it in environments of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

RANK = 16
ALPHA = 32.0
#: The targets of peft's `all-linear` on this model.
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SAMPLES = 8
NEW_TOKENS = 32
LEARNING_RATE = 1e-4
#: What every child prints before its report, so that whatever a library prints is not taken for it.
MARK = "FEDMOE-REPORT "


def prompt(policy: int) -> str:
    """The policy's own prompt: 40 tokens of SmolLM2 for every policy below 10."""
    return (
        f"Player {policy} of the table speaks. The other players listen and will answer in turn. "
        "Tell them now in a few plain short words what the best next move in this game is, and why:"
    )


def reward(tokens: Sequence[int]) -> float:
    """The share of even token ids: differs within every group, so that no gradient is zero."""
    return sum(token % 2 == 0 for token in tokens) / max(1, len(tokens))


@dataclass
class Spent:
    """Wall-clock and CPU seconds (all threads of this process) by part of a step."""

    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def on(self, part: str) -> Iterator[None]:
        """Add what happens inside to `part`."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall[part] = self.wall.get(part, 0.0) + time.perf_counter() - wall
        self.cpu[part] = self.cpu.get(part, 0.0) + time.process_time() - cpu


def peak_memory() -> int:
    """The most memory this process has had at once, in bytes (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def arguments(description: str) -> argparse.ArgumentParser:
    """What every child is told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="folder of the base model")
    parser.add_argument("--policies", type=int, required=True)
    parser.add_argument("--repeats", type=int, required=True, help="measured steps, after one to warm up")
    return parser


def report(steps: Sequence[Spent], loaded_bytes: int, **more: object) -> None:
    """Print what was measured as one line; `loaded_bytes` is the peak before the first step."""
    found = {
        "steps": [{"wall": step.wall, "cpu": step.cpu} for step in steps],
        "loaded_bytes": loaded_bytes,
        "peak_bytes": peak_memory(),
        "load_average": round(os.getloadavg()[0], 2),
        **more,
    }
    sys.stdout.flush()
    print(MARK + json.dumps(found), flush=True)
