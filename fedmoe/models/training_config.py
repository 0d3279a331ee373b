"""The settings of LoRA and training, under Hugging Face's names, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

SCHEDULERS = ("constant", "linear", "cosine")


class ScheduleEndedError(RuntimeError):
    """A step beyond `max_steps`."""


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """LoRA's shape: rank `r`, `lora_alpha` (scale lora_alpha / r), dropout on its input, and the layers that carry it.

    `target_modules` are ends of module names, or `all-linear`. `seed` draws the initial A; give all workers of one
    expert the same.
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"
    seed: int = 0

    def __post_init__(self) -> None:
        _require(self.r >= 1, "r must be at least 1", self.r)
        _require(self.lora_alpha > 0, "lora_alpha must be positive", self.lora_alpha)
        _require(0 <= self.lora_dropout < 1, "lora_dropout must be in [0, 1)", self.lora_dropout)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """AdamW and its schedule; the names and meanings are those of Hugging Face's TrainingArguments.

    `max_steps` 0 is open-ended, which only `constant` can be. `max_grad_norm` 0 does not clip. `warmup_steps` applies
    to every scheduler. One step takes per_device_train_batch_size x gradient_accumulation_steps blocks per process.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_steps: int = 5
    lr_scheduler_type: str = "constant"
    max_steps: int = 0
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _require(self.learning_rate > 0, "learning_rate must be positive", self.learning_rate)
        for name in ("weight_decay", "max_grad_norm", "warmup_steps", "max_steps"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative", getattr(self, name))
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1", getattr(self, name))
        kind = self.lr_scheduler_type
        _require(kind in SCHEDULERS, f"lr_scheduler_type must be one of {', '.join(SCHEDULERS)}", kind)
        ends = kind == "constant" or self.max_steps > self.warmup_steps
        _require(ends, f"{kind} needs max_steps above warmup_steps", self.max_steps)


def learning_rate_at(config: TrainingConfig, step: int) -> float:
    """The learning rate of step `step`, counted from 0; raises ScheduleEndedError from `max_steps` on.

    Warm-up rises by (step + 1) / warmup_steps, so no step is wasted at rate 0; then linear or half a cosine to 0.
    """
    if config.max_steps and step >= config.max_steps:
        raise ScheduleEndedError(f"all {config.max_steps} steps of max_steps are done; raise max_steps to go on")
    if step < config.warmup_steps:
        return config.learning_rate * ((step + 1) / config.warmup_steps)
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    done = (step - config.warmup_steps) / (config.max_steps - config.warmup_steps)
    share = 1.0 - done if config.lr_scheduler_type == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * share


def _require(holds: bool, rule: str, got: object) -> None:
    # A NaN compares false everywhere, so it fails here too.
    if not holds:
        raise ValueError(f"{rule}, got {got!r}")
