"""Rollouts by Ray actors beside the engine in this process: tokens a second, for equal batches.

    python benchmarks/bench_ray_rollouts.py [--base smollm2] [--actors 2] [--threads 2] [--repeats 5]

A wave of `--requests` answers of up to `--tokens` tokens, drawn by four policies of rank 16 (random factors), is
sampled in batches of `--rows`: in this process with `--threads` threads, and by `--actors` actors of one thread each,
in a Ray cluster of this program's own on loopback. Both stand ready and take turns, so that each repeat gives a
pair under about the same load; `ratio` is the median over pairs of actors by process. Beside it is checked
that actors answer bit for bit as this process does with one thread.

More actors than cores gain nothing. The gain is on more cores or GPUs: only prompts and tokens travel, and no batch
of a wave waits for another.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
import torch  # noqa: E402

from fedmoe.arena.config import ArenaConfig  # noqa: E402
from fedmoe.arena.run.ray_rollouts import rollout_engine  # noqa: E402
from fedmoe.inference.engine import AdapterKey, Engine, Sample, SampleRequest  # noqa: E402
from fedmoe.lora.adapter import Adapter, Layout  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.models.multilora import MultiLora  # noqa: E402

RANK = 16
KEYS = tuple(AdapterKey(name, 0) for name in ("ann", "bob", "cy", "dee"))
SEED = 7


def adapters(layout: Layout) -> list[Adapter]:
    rng = np.random.default_rng(SEED)
    return [
        Adapter(layout, 2.0 * RANK, rng.normal(0.0, 0.01, layout.size).astype(np.float32)) for _ in range(len(KEYS))
    ]


def wave(requests: int, tokens: int) -> list[SampleRequest]:
    """Prompts of 30 to 60 ordinary tokens, the same in every repeat."""
    rng = np.random.default_rng(SEED)
    prompts = [tuple(int(token) for token in rng.integers(97, 250, rng.integers(30, 60))) for _ in range(requests)]
    return [SampleRequest(KEYS[index % len(KEYS)], prompt, tokens, 1.0, index) for index, prompt in enumerate(prompts)]


def timed(engine: Engine, requests: list[SampleRequest], threads: int) -> tuple[float, list[Sample]]:
    """Sampled tokens a second, and the answers; `threads` are those of this process."""
    torch.set_num_threads(threads)
    began = time.perf_counter()
    samples = engine.sample(requests)
    seconds = time.perf_counter() - began
    return sum(len(sample.tokens) for sample in samples) / seconds, samples


def alike(some: list[Sample], others: list[Sample]) -> bool:
    return all(
        one.tokens == other.tokens and one.logprobs.tobytes() == other.logprobs.tobytes()
        for one, other in zip(some, others, strict=True)
    )


def summary(rates: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(rates), 2),
        "minimum": round(min(rates), 2),
        "maximum": round(max(rates), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--actors", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="of the engine in this process")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args()
    base = load_base(chosen.base, "cpu", "fp32")
    multi = MultiLora(base.model)
    requests = wave(chosen.requests, chosen.tokens)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def opened(actors: int) -> Engine:
            engine = {"rows": chosen.rows, "actors": actors}
            config = ArenaConfig.model_validate({"base_model": chosen.base, "engine": engine})
            made = stack.enter_context(rollout_engine(config, folder, base, multi, base.device))
            for key, adapter in zip(KEYS, adapters(multi.layout(RANK)), strict=True):
                made.load(key, adapter)
            return made

        process, fleet = opened(0), opened(chosen.actors)
        _, reference = timed(process, requests, 1)
        loads: list[float] = []
        pairs: list[tuple[float, float]] = []
        for repeat in range(chosen.repeats + 1):
            load = round(os.getloadavg()[0], 2)
            own, _ = timed(process, requests, chosen.threads)
            theirs, samples = timed(fleet, requests, 1)
            if not alike(samples, reference):
                raise SystemExit("actors answered otherwise than the engine in this process")
            if repeat:  # the first warms up
                loads.append(load)
                pairs.append((own, theirs))
            print(f"process {own:.1f}, actors {theirs:.1f} tokens/s, load {load}", flush=True)
    results = {
        "tokens_per_second": {
            name: summary(rates) for name, rates in zip(("process", "actors"), zip(*pairs, strict=True), strict=True)
        },
        "ratio": round(statistics.median(theirs / own for own, theirs in pairs), 3),
        "equal_bit_for_bit": True,
        "load_averages": loads,
    }
    print(write_result("ray_rollouts", results, vars(chosen), [SEED]))
    print(results)


if __name__ == "__main__":
    main()
