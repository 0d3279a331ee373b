"""A worker's data: read, reported, split, packed and checked before training starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import structlog

from fedmoe.config import WorkerConfig
from fedmoe.datasets.row_scan import RowOptions, check_beginning
from fedmoe.datasets.split import held_out_rows
from fedmoe.datasets.tokens.packing import Block, BlockSampler, pack
from fedmoe.datasets.tokens.sample_hashes import SampleHashes, sample_hashes
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample
from fedmoe.lora.adapter import Layout
from fedmoe.models.base import LoadedBase, context_length, pad_token
from fedmoe.models.held_out import HeldOutPlan
from fedmoe.models.parallel import ProcessGroup
from fedmoe.models.prepare_data import DataOptions, PreparedData, prepare_samples
from fedmoe.models.schedule import TrainingConfig
from fedmoe.models.step_memory import resolve_max_length
from fedmoe.runtime.cache import cache_folder
from fedmoe.worker.options import (
    block_sampler,
    check_memory_of_step,
    held_out_plan,
    log_held_out,
    tokens_per_step,
    training_config,
)
from fedmoe.worker.phases import log_phase

_log = structlog.get_logger("fedmoe.worker")
# Samples until the first line that tells how far tokenising is, and between two lines at most; first they double.
_TOLD_FIRST, _TOLD_EVERY = 500, 20_000


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


def data_options(config: WorkerConfig) -> DataOptions:
    """How this worker's files become samples; raises `DataError` for columns that cannot be mapped so."""
    return DataOptions(RowOptions.mapping(config.map), config.long_rows)


def check_sources(config: WorkerConfig) -> None:
    """Look at the first rows of every file, before any model is loaded; raises `DataError`."""
    for name in (config.dataset, config.eval_dataset):
        if name is not None:
            check_beginning(name, data_options(config).rows)


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
        _log.info("dataset", **data.report.summary, kept=data.kept, tokens_per_step=tokens_per_step(config, length))
        print(data.report.text, *data.report.previews, sep="\n", flush=True)
    train, held_out = _sides(config, data, base, length, processes)
    blocks = pack(train, length, config.seed, pad_token(base))
    sampler = block_sampler(blocks, config, group.rank, group.world_size)
    hashes, plan = sample_hashes(blocks), None
    if held_out:
        # A fixed seed: whoever measures on the same rows measures on the same blocks.
        plan = held_out_plan(config, pack(held_out, length, 0, pad_token(base)))
        if group.rank == 0:
            log_held_out(plan, held_out, hashes)
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
    told = 0

    def progress(done: int) -> None:
        nonlocal told
        if done - told >= min(max(told, _TOLD_FIRST), _TOLD_EVERY):
            told = done
            log_phase("preparing data", done)

    return prepare_samples(
        name,
        base.tokenizer,
        length,
        data_options(config),
        cache=cache_folder("tokens"),
        processes=processes,
        progress=progress,
    )
