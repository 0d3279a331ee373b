"""Prepares a worker: checks its options; reads, splits, packs and checks its data before training starts."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields

import structlog

from fedmoe.config import WorkerConfig
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.row_scan import RowOptions, held_out_rows
from fedmoe.datasets.tokens.packing import Block, BlockSampler, pack
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample
from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.manifest import Manifest
from fedmoe.models.base import LoadedBase, context_length, pad_token
from fedmoe.models.data_hashes import SampleHashes, change_between, digest_of, sample_hashes
from fedmoe.models.held_out import HeldOutPlan, first_blocks
from fedmoe.models.lora_layers import TargetError, find_targets
from fedmoe.models.parallel import ProcessGroup
from fedmoe.models.prepare_data import DataOptions, PreparedData, prepare_samples
from fedmoe.models.step_memory import StepShape, check_memory, free_memory, resolve_max_length
from fedmoe.models.training_config import TrainingConfig
from fedmoe.runtime.cache import cache_folder
from fedmoe.wire.contract.messages import MAX_PARAMETERS
from fedmoe.worker.options import OptionError
from fedmoe.worker.report import log_phase

_log = structlog.get_logger("fedmoe.worker")
# Samples until the first line about the progress of tokenising, and between two lines at most; first they double.
_LOGGED_FIRST, _LOGGED_EVERY = 500, 20_000


def adapter_layout(config: WorkerConfig, base: LoadedBase, targets: str | tuple[str, ...]) -> Layout:
    """The shape of the adapter that these options make; raises TargetError, or OptionError if it cannot travel."""
    try:
        modules = find_targets(base.model, targets)
    except TargetError as error:
        raise TargetError(f"--target-modules: {error}") from error
    shapes = tuple(ModuleShape(name, module.in_features, module.out_features) for name, module in modules)
    layout = Layout(shapes, config.lora_r)
    if layout.size > MAX_PARAMETERS:
        raise OptionError(
            f"--lora-r {config.lora_r} on {len(modules)} modules makes an adapter of {layout.size:,} parameters; at "
            f"most {MAX_PARAMETERS:,} can travel: give a smaller --lora-r or fewer --target-modules"
        )
    return layout


def check_federation(config: WorkerConfig, base: LoadedBase, layout: Layout, theirs: Manifest | None) -> None:
    """Refuse an adapter unlike those that the federation has, as the coordinator would when it is registered."""
    differences = theirs.differences(Manifest(base.identity, layout, config.lora_alpha)) if theirs else []
    if differences:
        raise OptionError(
            f"all experts share one LoRA configuration; {'; '.join(differences[:5])}. To join, give --base-model, "
            "--lora-r, --lora-alpha and --target-modules as the federation's first worker did"
        )


def check_memory_of_step(config: WorkerConfig, base: LoadedBase, layout: Layout, length: int) -> None:
    """Refuse a step that does not fit into memory; raises LengthError with what fits."""
    batch, checkpointing = config.per_device_train_batch_size, config.gradient_checkpointing
    try:
        text, item = base.model.config.get_text_config(), base.model.dtype.itemsize
        shape = StepShape.of(text, layout.size, config.lora_r, length, batch, checkpointing, item)
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
        # The last pass is rounded up.
        steps = max(1, math.ceil(config.num_train_epochs * blocks / blocks_per_step(config)))
        if config.lr_scheduler_type != "constant" and steps <= config.warmup_steps:
            raise OptionError(
                f"--num-train-epochs {config.num_train_epochs:g} are {steps} steps of these data, and --warmup-steps "
                f"{config.warmup_steps} leave nothing for --lr-scheduler-type {config.lr_scheduler_type}; give "
                f"--warmup-steps at most {steps - 1}, or more epochs"
            )
        _log.info("epochs", num_train_epochs=config.num_train_epochs, blocks=blocks, max_steps=steps)
    # The same names and meanings in both.
    values = {field.name: getattr(config, field.name) for field in fields(TrainingConfig)}
    return TrainingConfig(**values | {"max_steps": steps})


def blocks_per_step(config: WorkerConfig) -> int:
    """Blocks of one process in an optimizer step."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


@dataclass(frozen=True, eq=False)
class WorkerData:
    """A worker's data, packed: blocks to train on, hashes of their samples, this rank's sampler of them, what is held
    out, and the schedule.
    """

    blocks: list[Block]
    hashes: SampleHashes
    sampler: BlockSampler
    held_out: HeldOutPlan | None
    training: TrainingConfig


def _data_options(config: WorkerConfig) -> DataOptions:
    """Raises `DataError` for columns that cannot be mapped so."""
    return DataOptions(RowOptions.mapping(config.map), config.long_rows)


def worker_data(
    config: WorkerConfig, base: LoadedBase, layout: Layout, group: ProcessGroup, processes: int
) -> WorkerData:
    """The data, by up to `processes` processes; what options, data or this machine cannot do is refused."""
    length = resolve_max_length(config.max_length, context_length(base))
    check_memory_of_step(config, base, layout, length)
    if group.rank == 0:
        log_phase("preparing data")
    data = _prepared(config, config.dataset, base, length, processes)
    if group.rank == 0:
        # Of a process, padding included.
        tokens = length * blocks_per_step(config)
        _log.info("dataset", **data.report.summary, kept=data.from_cache, tokens_per_step=tokens)
        print(data.report.text, *data.report.previews, sep="\n", flush=True)
    train, held_out = _sides(config, data, base, length, processes)
    blocks = pack(train, length, config.seed, pad_token(base))
    sampler = block_sampler(blocks, config, group.rank, group.world_size)
    hashes, plan = sample_hashes(blocks), None
    if held_out:
        # A fixed seed: whoever measures on the same rows measures on the same blocks, the first ones.
        measured = first_blocks(pack(held_out, length, 0, pad_token(base)))
        their_hashes = sample_hashes(measured)
        patience, threshold = config.early_stopping_patience, config.early_stopping_threshold
        plan = HeldOutPlan(measured, digest_of(their_hashes), config.eval_steps, patience, threshold)
        if group.rank == 0:
            sizes = {"samples": len(held_out), "measured": len(their_hashes), "blocks": len(measured)}
            _log.info("held_out_data", **sizes, eval_steps=config.eval_steps)
            if trained := change_between(their_hashes, hashes).unchanged:
                _log.warning("held_out_is_trained_on", samples=trained, of=len(their_hashes))
    return WorkerData(blocks, hashes, sampler, plan, training_config(config, sampler.shard))


def _sides(
    config: WorkerConfig, data: PreparedData, base: LoadedBase, length: int, processes: int
) -> tuple[Sequence[TokenizedSample], Sequence[TokenizedSample]]:
    """The samples to train on, and those held out (maybe none)."""
    if config.eval_split is not None:
        held_out = held_out_rows(data.row_hashes, config.eval_split)
        sides: tuple[list[TokenizedSample], list[TokenizedSample]] = ([], [])
        for sample, is_held_out in zip(data.samples, held_out.tolist(), strict=True):
            sides[is_held_out].append(sample)
        return sides
    if config.eval_dataset is None:
        return data.samples, ()
    measured = _prepared(config, config.eval_dataset, base, length, processes)
    _log.info("eval_dataset", **measured.report.summary)
    return data.samples, measured.samples


def _prepared(config: WorkerConfig, name: str, base: LoadedBase, length: int, processes: int) -> PreparedData:
    logged = 0

    def progress(done: int) -> None:
        nonlocal logged
        if done - logged >= min(max(logged, _LOGGED_FIRST), _LOGGED_EVERY):
            logged = done
            log_phase("preparing data", done)

    options, cache = _data_options(config), cache_folder("tokens")
    return prepare_samples(name, base.tokenizer, length, options, cache=cache, processes=processes, progress=progress)
