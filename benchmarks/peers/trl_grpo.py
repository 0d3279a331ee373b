"""TRL's side of `bench_arena_throughput.py`: GRPOTrainer with peft, which trains one policy.

Several policies are several trainers, one after another. What it costs to make them, and to hold what belongs to the
policies whose turn it is not, is left out here. Gradient checkpointing is on there by default, which computes the
forward pass twice to save memory.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lib.arena_workload import (
    ALPHA,
    LEARNING_RATE,
    MODULES,
    NEW_TOKENS,
    RANK,
    SAMPLES,
    Spent,
    arguments,
    peak_memory,
    prompt,
    report,
    reward,
)

if TYPE_CHECKING:
    from trl import GRPOConfig, GRPOTrainer


def rewards(completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """TRL's signature: it gives more than is looked at here."""
    assert all(len(tokens) == NEW_TOKENS for tokens in completion_ids)
    return [reward(tokens) for tokens in completion_ids]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    chosen = parser.parse_args()
    if chosen.policies != 1:
        parser.error("one trainer trains one policy")
    import torch

    torch.set_num_threads(1)
    steps = chosen.repeats + 1
    measured: list[Spent] = []
    with tempfile.TemporaryDirectory(prefix="trl-") as folder:
        trainer = make_trainer(chosen.model, settings(folder, steps, chosen), measured)
        trained = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
        before = {name: one.detach().clone() for name, one in list(trained.items())[:50]}
        loaded = peak_memory()
        trainer.train()
    assert len(measured) == steps
    assert any(not torch.equal(trained[name], old) for name, old in before.items())
    report(
        measured[1:],
        loaded,
        adapter_bytes=sum(one.numel() * one.element_size() for one in trained.values()),
        prompt_tokens=[len(trainer.processing_class(prompt(0))["input_ids"])],
        dtypes=sorted({str(one.dtype) for one in trainer.model.parameters()}),
    )


def settings(folder: str, steps: int, chosen: argparse.Namespace) -> GRPOConfig:
    """The same work as ours; what only costs time (logs, files) is off."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=SAMPLES,
        num_generations=SAMPLES,
        max_completion_length=NEW_TOKENS,
        generation_kwargs={"min_new_tokens": NEW_TOKENS},
        beta=0.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        model_init_kwargs={"dtype": chosen.dtype},
        bf16=chosen.dtype == "bfloat16",
        gradient_checkpointing=chosen.checkpointing,
        use_cpu=True,
        use_vllm=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def make_trainer(model: str, config: GRPOConfig, measured: list[Spent]) -> GRPOTrainer:
    """A trainer that appends what each of its steps took to `measured`."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        """From the beginning of a step (before it samples) to its end (after the optimizer's step)."""

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.spent = Spent()
            self.running = self.spent.on("step")
            self.running.__enter__()

        def on_step_end(self, *_: object, **__: object) -> None:
            self.running.__exit__(None, None, None)
            measured.append(self.spent)

    return GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt(0)}]),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES), task_type="CAUSAL_LM"),
        callbacks=[Stopwatch()],
    )


if __name__ == "__main__":
    main()
