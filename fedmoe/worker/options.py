"""Checks options against each other, the data, the base model and the machine, before training starts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import structlog

from fedmoe.config import WorkerConfig
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.packing import Block, BlockSampler
from fedmoe.datasets.tokens.sample_hashes import SampleHashes, change_between, digest_of, sample_hashes
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample
from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.manifest import Manifest
from fedmoe.models.base import LoadedBase
from fedmoe.models.held_out import HeldOutPlan, first_blocks
from fedmoe.models.lora_layers import TargetError, find_targets
from fedmoe.models.schedule import TrainingConfig
from fedmoe.models.step_memory import StepShape, check_memory, free_memory
from fedmoe.wire.contract.messages import MAX_PARAMETERS

_log = structlog.get_logger("fedmoe.worker")


class OptionError(ValueError):
    """An option that cannot be used here; the message names its flag."""


def check_processes(config: WorkerConfig) -> None:
    """Refuse a device that only one of several processes (torchrun) can have."""
    if os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return
    if ":" in config.device or config.device == "mps":
        raise OptionError(
            f"--device {config.device} names one device, but WORLD_SIZE is {os.environ['WORLD_SIZE']}: "
            "give --device cuda, of which each process takes its own, or start one process"
        )


def adapter_layout(config: WorkerConfig, base: LoadedBase, targets: str | tuple[str, ...]) -> Layout:
    """The shape of the adapter that these options make; raises TargetError, or OptionError if it cannot travel."""
    try:
        found = find_targets(base.model, targets)
    except TargetError as error:
        raise TargetError(f"--target-modules: {error}") from error
    layout = Layout(tuple(ModuleShape(name, one.in_features, one.out_features) for name, one in found), config.lora_r)
    if layout.size > MAX_PARAMETERS:
        raise OptionError(
            f"--lora-r {config.lora_r} on {len(found)} modules makes an adapter of {layout.size:,} parameters; at most "
            f"{MAX_PARAMETERS:,} can travel: give a smaller --lora-r or fewer --target-modules"
        )
    return layout


def check_federation(config: WorkerConfig, base: LoadedBase, layout: Layout, theirs: Manifest | None) -> None:
    """Refuse an adapter unlike those that the federation has, as the coordinator would when it is registered."""
    differences = theirs.differences(Manifest(base.identity, layout, config.lora_alpha)) if theirs else []
    if differences:
        raise OptionError(
            f"all experts share one LoRA configuration; {'; '.join(differences[:5])}. Give --base-model, --lora-r, "
            "--lora-alpha and --target-modules as the federation's first worker did"
        )


def check_memory_of_step(config: WorkerConfig, base: LoadedBase, layout: Layout, length: int) -> None:
    """Refuse a step that does not fit into memory; raises LengthError with what fits."""
    batch, checkpointing = config.per_device_train_batch_size, config.gradient_checkpointing
    try:
        shape = StepShape.of(base.model, layout.size, config.lora_r, length, batch, checkpointing)
    except AttributeError as error:
        _log.warning("memory_not_checked", reason=f"the model's configuration does not say its sizes: {error}")
        return
    check_memory(shape, free_memory(base.device, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def block_sampler(blocks: Sequence[Block], config: WorkerConfig, rank: int, world_size: int) -> BlockSampler:
    """This rank's sampler; raises OptionError for fewer blocks than processes."""
    try:
        return BlockSampler(blocks, config.seed, rank, world_size)
    except DataError as error:
        raise OptionError(
            f"--dataset makes {len(blocks)} blocks, which {world_size} processes cannot share; give more data, "
            f"a smaller --max-length, or at most {len(blocks)} processes (torchrun --nproc-per-node)"
        ) from error


def training_config(config: WorkerConfig, blocks: int) -> TrainingConfig:
    """How to train on `blocks` blocks an epoch and process; raises OptionError for a schedule of no length."""
    steps = config.max_steps
    if config.num_train_epochs is not None:
        steps = steps_of_epochs(config.num_train_epochs, blocks, config)
        decays = config.lr_scheduler_type != "constant"
        if decays and steps <= config.warmup_steps:
            raise OptionError(
                f"--num-train-epochs {config.num_train_epochs:g} are {steps} steps of these data, and --warmup-steps "
                f"{config.warmup_steps} leave nothing for --lr-scheduler-type {config.lr_scheduler_type}; give "
                f"--warmup-steps at most {steps - 1}, or more epochs"
            )
        _log.info("epochs", num_train_epochs=config.num_train_epochs, blocks=blocks, max_steps=steps)
    return TrainingConfig(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.lr_scheduler_type,
        max_steps=steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
    )


def tokens_per_step(config: WorkerConfig, max_length: int) -> int:
    """Tokens of an optimizer step and process, padding included."""
    return max_length * config.per_device_train_batch_size * config.gradient_accumulation_steps


def steps_of_epochs(epochs: float, blocks: int, config: WorkerConfig) -> int:
    """Optimizer steps of so many passes over `blocks` blocks a process, the last one rounded up; at least 1."""
    return max(
        1, math.ceil(epochs * blocks / (config.per_device_train_batch_size * config.gradient_accumulation_steps))
    )


def held_out_plan(config: WorkerConfig, blocks: Sequence[Block]) -> HeldOutPlan:
    """What is measured of these held-out blocks: the first ones, bounded by their tokens."""
    measured = first_blocks(blocks)
    return HeldOutPlan(
        measured,
        digest_of(sample_hashes(measured)),
        config.eval_steps,
        config.early_stopping_patience,
        config.early_stopping_threshold,
    )


def log_held_out(plan: HeldOutPlan, samples: Sequence[TokenizedSample], train: SampleHashes) -> None:
    """Say what is measured, of how much, and what of it is in the samples trained on, `train`, too."""
    measured = sample_hashes(plan.blocks)
    _log.info(
        "held_out_data",
        samples=len(samples),
        measured=len(measured),
        blocks=len(plan.blocks),
        eval_steps=plan.eval_steps,
    )
    trained = change_between(measured, train).kept
    if trained:
        _log.warning("held_out_is_trained_on", samples=trained, of=len(measured))
