"""TRL's side of `bench_arena_throughput.py`: GRPOTrainer with peft, one policy after another.

One trainer stands for all of the policies: what it would cost to make or load P of them, and to hold their optimizers,
is not counted. Gradient checkpointing is on there by default, which computes the forward pass twice to save memory.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from arena_workload import (
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


def rewards(completion_ids: Sequence[Sequence[int]], **_: object) -> list[float]:
    """TRL's signature: it gives more than is looked at here."""
    assert all(len(tokens) == NEW_TOKENS for tokens in completion_ids)
    return [reward(tokens) for tokens in completion_ids]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    chosen = parser.parse_args()
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(1)
    measured: list[Spent] = []

    class Stopwatch(TrainerCallback):  # type: ignore[misc]
        """From the beginning of a step (before it samples) to its end (after the optimizer's step)."""

        def on_step_begin(self, *_: object, **__: object) -> None:
            self.spent = Spent()
            self.running = self.spent.on("step")
            self.running.__enter__()

        def on_step_end(self, *_: object, **__: object) -> None:
            self.running.__exit__(None, None, None)
            measured.append(self.spent)

    steps = (chosen.repeats + 1) * chosen.policies
    with tempfile.TemporaryDirectory(prefix="trl-") as folder:
        config = GRPOConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=SAMPLES,
            num_generations=SAMPLES,
            max_completion_length=NEW_TOKENS,
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
            beta=0.0,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            model_init_kwargs={"dtype": "float32"},
            bf16=False,
            gradient_checkpointing=chosen.checkpointing,
            use_cpu=True,
            use_vllm=False,
            shuffle_dataset=False,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=chosen.model,
            reward_funcs=rewards,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt(index)} for index in range(chosen.policies)]),
            peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(MODULES), task_type="CAUSAL_LM"),
            callbacks=[Stopwatch()],
        )
        trained = {name: one for name, one in trainer.model.named_parameters() if one.requires_grad}
        before = {name: one.detach().clone() for name, one in list(trained.items())[:50]}
        loaded = peak_memory()
        trainer.train()
    assert len(measured) == steps
    assert any(not torch.equal(trained[name], old) for name, old in before.items())
    rounds = [measured[start : start + chosen.policies] for start in range(0, steps, chosen.policies)][1:]
    report(
        [together(one) for one in rounds],
        loaded,
        adapter_bytes=sum(one.numel() * one.element_size() for one in trained.values()),
        prompt_tokens=[len(trainer.processing_class(prompt(index))["input_ids"]) for index in range(chosen.policies)],
        dtypes=sorted({str(one.dtype) for one in trainer.model.parameters()}),
    )


def together(steps: Sequence[Spent]) -> Spent:
    """A step of every policy, one after another."""
    total = Spent()
    for step in steps:
        total = total.plus(step)
    return total


if __name__ == "__main__":
    main()
