"""A worker's training step beside the same step of PEFT and transformers, in one process and in turns.

    python benchmarks/bench_training_step.py [--pairs 5]

SmolLM2-135M in float32, rank 16 on all linear layers, one thread; both sides start from the same factors, learn the
same tokens with the same fused AdamW, learning rate and clipping, and their losses are reported beside each other.
PEFT's side is a plain loop: forward with labels, backward, clip, step.

- `rows`: two rows of 256 tokens without padding, every token learned: no side has anything to leave out.
- `samples`: eight texts of uneven length (at most 256 tokens). PEFT's side pads them to the longest, as the collators
  of transformers do; ours packs them into rows of 256, in which none sees another.

The texts are the help topics of Python. One pair warms up, then `--pairs` are measured, in alternating order; a ratio
is PEFT's seconds over ours of one pair, so above 1 ours is faster. Both sides share one allocator.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
import peft  # noqa: E402
import torch  # noqa: E402

from fedmoe.datasets.tokens.packing import collate, pack  # noqa: E402
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample  # noqa: E402
from fedmoe.models.base import LoadedBase, load_base  # noqa: E402
from fedmoe.models.training_config import LoraConfig, TrainingConfig  # noqa: E402
from fedmoe.qwen_finetune import QwenLoRAExpert  # noqa: E402

LENGTH, ROWS, SAMPLES, RATE = 256, 2, 8, 1e-3
Samples = Sequence[TokenizedSample]
#: Learns the samples in one step and gives their loss before it.
Step = Callable[[Samples], float]


@dataclass(frozen=True, slots=True)
class Timed:
    """One step: its loss, and seconds by the clock and of the processor."""

    loss: float
    wall: float
    cpu: float


def ours(expert: QwenLoRAExpert) -> Step:
    """A worker's step."""
    return lambda samples: expert.train_step([collate(pack(samples, LENGTH, 0))]).loss


def theirs(base: LoadedBase, expert: QwenLoRAExpert) -> Step:
    """A plain step of PEFT, from the factors of `expert`."""
    shape = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base.model, shape).train()
    own = expert.attached.adapter()
    for name, layer in model.get_base_model().named_modules():
        if name in own.layout.spans:
            span = own.layout.spans[name]
            layer.lora_A["default"].weight.data.view(-1).copy_(torch.tensor(own.flat[span.start : span.middle]))
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=True)

    def step(samples: Samples) -> float:
        longest = max(len(sample.input_ids) for sample in samples)
        ids = np.zeros((len(samples), longest), np.int64)
        mask, labels = np.zeros_like(ids), np.full_like(ids, -100)
        for row, sample in enumerate(samples):
            size = len(sample.input_ids)
            ids[row, :size], labels[row, :size], mask[row, :size] = sample.input_ids, sample.labels, 1
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        loss = model(**{name: torch.from_numpy(array) for name, array in batch.items()}, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step


def texts(base: LoadedBase) -> list[list[int]]:
    """Tokens of the help topics, by name."""
    return [base.tokenizer(topics[name])["input_ids"] for name in sorted(topics)]


def whole_rows(tokens: Sequence[Sequence[int]]) -> Iterator[Samples]:
    flat = np.array([token for each in tokens for token in each], np.int64)
    rows = [TokenizedSample(row, row) for row in flat[: len(flat) // LENGTH * LENGTH].reshape(-1, LENGTH)]
    for start in range(0, len(rows), ROWS):
        yield rows[start : start + ROWS]


def uneven_samples(tokens: Sequence[Sequence[int]]) -> Iterator[Samples]:
    """Paragraph-like pieces: lengths drawn evenly from 24 to 256, from a fixed seed."""
    random = np.random.default_rng(0)
    pieces = [np.array(each[: int(random.integers(24, LENGTH + 1))], np.int64) for each in tokens if len(each) >= 24]
    for start in range(0, len(pieces), SAMPLES):
        yield [TokenizedSample(piece, piece) for piece in pieces[start : start + SAMPLES]]


def timed(step: Step, samples: Samples) -> Timed:
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step(samples)
    return Timed(loss, time.perf_counter() - wall, time.process_time() - cpu)


def compared(batches: Iterator[Samples], sides: dict[str, Step], pairs: int) -> dict[str, object]:
    """Medians of both sides, the ratio of each pair, and both loss curves, that of the warm-up included."""
    steps: dict[str, list[Timed]] = {name: [] for name in sides}
    sizes = []
    for number, samples in zip(range(pairs + 1), batches, strict=False):
        sizes.append([len(sample.input_ids) for sample in samples])
        for name in sorted(sides, reverse=bool(number % 2)):
            steps[name].append(timed(sides[name], samples))
            print(name, steps[name][-1], flush=True)
    done: dict[str, object] = {
        "lengths": sizes,
        "losses": {name: [each.loss for each in steps[name]] for name in steps},
    }
    for kind in ("cpu", "wall"):
        seconds = {name: [getattr(each, kind) for each in steps[name][1:]] for name in steps}
        ratios = [peers / own for peers, own in zip(seconds["peft"], seconds["fedmoe"], strict=True)]
        done[f"{kind}_seconds"] = {name: statistics.median(values) for name, values in seconds.items()}
        done[f"{kind}_ratios"] = ratios
        done[f"{kind}_ratio"] = statistics.median(ratios)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, object] = {"peft": peft.__version__}
    for name, batches in (("rows", whole_rows), ("samples", uneven_samples)):
        base, other = (load_base("smollm2", "cpu", "fp32") for _ in range(2))
        training = TrainingConfig(learning_rate=RATE, warmup_steps=0)
        expert = QwenLoRAExpert(base, LoraConfig(), training)
        sides = {"fedmoe": ours(expert), "peft": theirs(other, expert)}
        results[name] = compared(batches(texts(base)), sides, chosen.pairs)
        print(name, json.dumps(results[name]), flush=True)
    write_result("training_step", results, vars(chosen), [0])


if __name__ == "__main__":
    main()
