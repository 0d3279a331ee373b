"""The evaluation gate on a real model: what owners choose, what is refused, and what it costs everybody.

    python benchmarks/bench_evaluation_gate.py [--work FOLDER] [--blocks 16] [--state FOLDER]

A coordinator process with `--evaluation-gate --strategy regmean`, and one `fedmoe evaluator` process for each of three
domains (`lib/trained_experts.py`: experts of 40 steps, their input moments, held-out text split by file). One after the
other: the experts are pushed and a first gateway goes out; the python expert is spoilt (its product times -1) and
the gate must keep the gateway; the python expert is mended and a gateway goes out again. Last, updates are pushed while
candidates are being merged, and their latency is compared with that of updates before.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
from lib.trained_experts import LENGTH, Work  # noqa: E402

from fedmoe.coordinator import seed_of  # noqa: E402
from fedmoe.datasets.demo.domains import DOMAINS  # noqa: E402
from fedmoe.lora.adapter import (  # noqa: E402
    Adapter,
    FloatVector,
    initial_adapter,
)
from fedmoe.lora.codec import encode  # noqa: E402
from fedmoe.lora.manifest import Manifest  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.wire.client import CoordinatorClient  # noqa: E402
from fedmoe.wire.contract.experts import CandidatesRequest, VerdictInfo  # noqa: E402
from fedmoe.wire.contract.messages import DataStatisticsHeader, UpdateHeader  # noqa: E402

PORT = 5871
COLUMNS, TOKENS = 64, 6000
PATIENCE_SECONDS = 3600.0


@dataclass
class Owner:
    """Who trains a domain's expert: pushes changes of it under rising numbers."""

    client: CoordinatorClient
    domain: str
    start: Adapter
    pushed: int = 0
    seconds: list[float] = field(default_factory=list)

    def push(self, delta: FloatVector) -> int:
        """The gateway's version after this update."""
        header = UpdateHeader(
            expert=self.domain, worker=f"w-{self.domain}", epoch="e1", sequence=self.pushed, base_version=self.pushed
        )
        began = time.perf_counter()
        result = self.client.push(header, encode(self.start.layout, delta)).result
        self.seconds.append(time.perf_counter() - began)
        self.pushed += 1
        return result.gateway_version


@contextmanager
def process(*arguments: str) -> Iterator[None]:
    """A `fedmoe` command, ended with the block."""
    running = subprocess.Popen([sys.executable, "-m", "fedmoe", *arguments], env=os.environ, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        running.terminate()
        running.wait(120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/merge_quality"))
    parser.add_argument("--state", type=Path, default=Path("runs/bench_evaluation_gate"))
    parser.add_argument("--blocks", type=int, default=16)
    arguments = parser.parse_args()
    if arguments.state.exists():
        parser.error(f"--state {arguments.state} exists; name a new folder")
    work = Work(arguments.work, load_base("smollm2", "cpu"))
    work.build()
    url = f"http://127.0.0.1:{PORT}"
    with ExitStack() as stack:
        options = ["--evaluation-gate", "--strategy", "regmean", "--gate-seconds", str(PATIENCE_SECONDS)]
        coordinator = ["coordinator", "--port", str(PORT), "--state-dir", str(arguments.state), *options]
        stack.enter_context(process(*coordinator))
        client = stack.enter_context(CoordinatorClient(url, attempts=10))
        owners = {domain: _owner(client, work, domain) for domain in DOMAINS}
        with ExitStack() as evaluators:
            for domain in DOMAINS:
                evaluators.enter_context(_evaluator(url, work, domain, arguments.blocks))
            found = _measured(client, owners["python"])
        quiet = list(owners["python"].seconds)
        found["push_seconds"] = {"quiet": quiet, "while_merging": _pushed_while_merging(client, owners["python"])}
    shown = {"blocks": arguments.blocks, "tokens_a_block": LENGTH, "domains": list(DOMAINS)}
    print(write_result("evaluation_gate", found, shown, seeds=[work.seed]))


def _owner(client: CoordinatorClient, work: Work, domain: str) -> Owner:
    """The domain's expert, pushed as one update on a fresh registration, with its input moments."""
    expert = work.expert(domain)
    manifest = Manifest(work.base.identity, expert.layout, expert.alpha)
    client.register(domain, f"w-{domain}", manifest)
    start = initial_adapter(expert.layout, expert.alpha, seed_of(domain))
    owner = Owner(client, domain, start)
    owner.push(expert.flat - start.flat)
    header = DataStatisticsHeader(expert=domain, worker=f"w-{domain}", kind="moments")
    client.push_data_statistics(header, work.moments(domain, COLUMNS, TOKENS).to_bytes())
    return owner


@contextmanager
def _evaluator(url: str, work: Work, domain: str, blocks: int) -> Iterator[None]:
    held_out = work.folder / "data" / f"{domain}-validation.jsonl"
    who = ["--evaluator-id", f"e-{domain}", "--expert", domain, "--held-out", str(held_out), "--base-model", "smollm2"]
    sizes = ["--held-out-blocks", str(blocks), "--max-length", str(LENGTH), "--poll-interval", "1", "--device", "cpu"]
    with process("evaluator", "--coordinator-url", url, *who, *sizes):
        yield


def _measured(client: CoordinatorClient, python: Owner) -> dict[str, object]:
    learned = client.pull_expert("python")
    assert learned is not None, "without an ETag there is always an answer"
    spoil = _turned_round(learned.adapter)
    steps = {"first": _verdict(client, 0)}
    steps["python_spoilt"] = _verdict(client, python.push(spoil))
    served = client.gateway_info()
    steps["python_mended"] = _verdict(client, python.push(-spoil))
    return {
        **{name: _told(*step) for name, step in steps.items()},
        "served_while_spoilt": {"version": served.version, "strategy": served.strategy, "scale": served.scale},
    }


def _turned_round(adapter: Adapter) -> FloatVector:
    """The change that turns an adapter's product into its negative: B - 2 B."""
    change = np.zeros_like(adapter.flat)
    for (_, _, target), (_, _, b) in zip(adapter.layout.factors(change), adapter.factors(), strict=True):
        target[:] = -2 * b
    return change


def _verdict(client: CoordinatorClient, version: int) -> tuple[VerdictInfo, float]:
    """The verdict on this version of the gateway or a later one, and the seconds until it came."""
    began = time.monotonic()
    while time.monotonic() - began < PATIENCE_SECONDS:
        newest = client.gateway_verdicts(1)
        if newest and newest[0].version >= version:
            print(newest[0].reason, flush=True)
            return newest[0], time.monotonic() - began
        time.sleep(0.5)
    raise TimeoutError(f"no verdict on version {version} within {PATIENCE_SECONDS:g} s")


def _told(verdict: VerdictInfo, seconds: float) -> dict[str, object]:
    return {
        "published": verdict.published,
        "reason": verdict.reason,
        "kept": verdict.kept,
        "tokens": {found.expert: found.tokens for found in verdict.scores},
        "seconds": round(seconds, 1),
    }


def _pushed_while_merging(client: CoordinatorClient, owner: Owner) -> dict[str, float]:
    """Latencies of updates from the moment a set is asked for until it is open."""
    nothing = np.zeros_like(owner.start.flat)
    owner.push(nothing)
    asked = CandidatesRequest(evaluator=f"e-{owner.domain}", expert=owner.domain)
    first, began = len(owner.seconds), time.monotonic()
    while client.gateway_candidates(asked).open is None:
        owner.push(nothing)
    seconds = owner.seconds[first:]
    return {
        "merge_seconds": round(time.monotonic() - began, 2),
        "count": len(seconds),
        "median": statistics.median(seconds) if seconds else float("nan"),
        "maximum": max(seconds, default=float("nan")),
    }


if __name__ == "__main__":
    main()
