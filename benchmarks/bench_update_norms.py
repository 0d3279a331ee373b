"""How far an update's norm lies above the usual one when it covers many sync intervals, as after an outage.

    python benchmarks/bench_update_norms.py [--steps 900] [--seeds 0 1 2]

The tiny model is trained step by step on counting sequences. With a push every so many steps, usual is the median of
the last 32 norms; a worker that was away for many intervals pushes what it learned in all of them at once, as a real
one does (`max_unsynced`). The largest ratio of a run is what `--hold-norm` must leave room for.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first

from fedmoe.datasets.tokens.packing import Block, BlockSampler, pack  # noqa: E402
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample  # noqa: E402
from fedmoe.lora.adapter import FloatVector  # noqa: E402
from fedmoe.lora.update_rules import USUAL_LEAST, USUAL_WINDOW, times_usual  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.qwen_finetune import LoraConfig, QwenLoRAExpert, TrainingConfig  # noqa: E402
from fedmoe.qwen_worker import QwenWorker  # noqa: E402

INTERVALS = (1, 5, 10)
COVERED = (1, 2, 10, 30, 60)


@dataclass(frozen=True)
class Training:
    """How a worker trains: learning rate and the steps until it is reached."""

    learning_rate: float
    warmup_steps: int


TRAININGS = (Training(1e-3, 5), Training(5e-3, 2), Training(1e-4, 100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    rows = [
        {**asdict(training), "steps_an_interval": interval, "intervals_covered": covered, **told}
        for training in TRAININGS
        for interval in INTERVALS
        for covered, told in ratios(training, interval, asked.steps, asked.seeds).items()
    ]
    for row in rows:
        print(row)
    write_result("update_norms", {"rows": rows}, vars(asked), asked.seeds)


def ratios(training: Training, interval: int, steps: int, seeds: Sequence[int]) -> dict[int, dict[str, float]]:
    """By intervals covered: how many times the usual norm such an update is, at most and in the middle, by seed."""
    found: dict[int, dict[str, float]] = {}
    paths = [path(training, steps, seed) for seed in seeds]
    for covered in COVERED:
        runs = [along(one, interval, covered) for one in paths]
        largest = [max(run) for run in runs]
        found[covered] = {
            "largest": round(max(largest), 2),
            "largest_by_seed_from": round(min(largest), 2),
            "median": round(statistics.median(ratio for run in runs for ratio in run), 2),
        }
    return found


def along(weights: FloatVector, interval: int, covered: int) -> list[float]:
    """The ratio at every push of a run after the first few."""
    norms = [
        float(np.linalg.norm(b - a)) for a, b in zip(weights[::interval], weights[interval::interval], strict=False)
    ]
    found = []
    for number in range(USUAL_LEAST, len(norms) - covered + 1):
        away = weights[(number + covered) * interval] - weights[number * interval]
        recent = norms[max(0, number - USUAL_WINDOW) : number]
        ratio = times_usual(float(np.linalg.norm(away)), recent)
        assert ratio is not None
        found.append(ratio)
    return found


def path(training: Training, steps: int, seed: int) -> FloatVector:
    """The adapter after every step, `(steps + 1, parameters)`."""
    config = TrainingConfig(learning_rate=training.learning_rate, warmup_steps=training.warmup_steps)
    expert = QwenLoRAExpert(load_base("tiny", "cpu", "fp32"), LoraConfig(8, 16, seed=seed + 1), config)
    worker = QwenWorker(expert, BlockSampler(counting(seed), seed=seed))
    seen = [worker.weights()]
    worker.train_for(float("inf"), lambda: False, lambda _: seen.append(worker.weights()), steps, lambda _: None)
    return np.stack(seen)


def counting(seed: int) -> list[Block]:
    """Sequences that count up byte by byte."""
    starts = np.random.default_rng(seed).integers(0, 200, 60)
    rows = (np.arange(start, start + 20) % 256 for start in starts)
    return pack([TokenizedSample(ids, ids) for ids in rows], 32, 0)


if __name__ == "__main__":
    main()
