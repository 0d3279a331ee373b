"""From parameters to a running worker: data checked first, then the base model, then the coordinator."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from fedmoe.config import WorkerConfig
from fedmoe.coordinator import seed_of
from fedmoe.datasets.check import LoadedFile, load_rows
from fedmoe.datasets.contents import Hashes, sample_hashes
from fedmoe.datasets.formats import Sample
from fedmoe.datasets.packing import Block, BlockSampler, pack
from fedmoe.datasets.render import rendered_preview, tokenize_samples
from fedmoe.datasets.split import split_rows
from fedmoe.distributed_worker import DistributedWorker, SyncSettings
from fedmoe.lora.adapter import Layout
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.context import context_of, resolve_max_length
from fedmoe.models.device import choose_device, pin_threads
from fedmoe.models.held_out import HeldOutPlan
from fedmoe.models.parallel import ProcessGroup, join_group, local_rank
from fedmoe.models.schedule import LoraConfig, TrainingConfig
from fedmoe.qwen_finetune import QwenLoRAExpert
from fedmoe.qwen_worker import QwenWorker
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.messages import StatisticsKind
from fedmoe.worker.disclosure import Disclosure
from fedmoe.worker.group import on_rank_zero
from fedmoe.worker.kept_statistics import keep, read_kept, statistics_key
from fedmoe.worker.options import (
    adapter_layout,
    block_sampler,
    check_federation,
    check_memory_of_step,
    check_processes,
    held_out_plan,
    tell_held_out,
    tokens_per_step,
    training_config,
)
from fedmoe.worker.outbox import Outbox
from fedmoe.worker.restart import check_data
from fedmoe.worker.signals import StopOnSignal
from fedmoe.worker.statistics import data_statistics

_log = structlog.get_logger("fedmoe.worker")
_PREVIEWS = 2
# Of a worker that ends, for statistics that are still on their way.
_LAST_WAIT_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class WorkerData:
    """A worker's data, packed: blocks to train on, hashes of their samples, this rank's sampler of them, what is held
    out, and the schedule."""

    blocks: list[Block]
    hashes: Hashes
    sampler: BlockSampler
    held_out: HeldOutPlan | None
    training: TrainingConfig


def run_worker(config: WorkerConfig) -> None:
    """Run a worker until its schedule ends or it is told to stop (SIGTERM, SIGINT)."""
    pin_threads()
    check_processes(config)
    rows = load_sides(config)
    device = choose_device(config.device, local_rank())
    state_dir = Path(config.state_dir or f"runs/workers/{config.worker_id}")
    token = config.token.get_secret_value() if config.token else None
    group = join_group(device)
    outbox: Outbox | None = None
    try:
        with CoordinatorClient(config.coordinator_url, token) as client:
            outbox = on_rank_zero(group, lambda: Outbox(state_dir, config.worker_id, config.specialty))
            # A wrong URL or token is told before a base model is loaded.
            federation = on_rank_zero(group, client.federation)
            base = load_base(config.base_model, group.device, config.dtype)
            _log.info("base_model", **base.report)
            layout = adapter_layout(config, base, _targets(config))
            theirs = federation.manifest if federation is not None else None
            on_rank_zero(group, lambda: check_federation(config, base, layout, theirs.manifest() if theirs else None))
            data = worker_data(config, rows, base, layout, group)
            _train(config, base, data, group, client, state_dir, outbox)
    finally:
        if outbox is not None:
            outbox.close()
        group.close()


def _train(
    config: WorkerConfig,
    base: LoadedBase,
    data: WorkerData,
    group: ProcessGroup,
    client: CoordinatorClient,
    state_dir: Path,
    outbox: Outbox | None,
) -> None:
    checkpoints, allowed = state_dir / "checkpoint", config.allow_changed_data
    on_rank_zero(group, lambda: check_data(checkpoints, data.sampler, data.hashes, allowed, group))
    # On the bare base model, so before an adapter is attached.
    disclosure = on_rank_zero(group, lambda: _disclosure(config, base, data.blocks, client, state_dir))
    try:
        worker = _build(config, base, data, group, client, state_dir, outbox, disclosure)
        StopOnSignal(worker.stop).install()
        worker.run()
        if disclosure is not None:
            disclosure.close(_LAST_WAIT_SECONDS)
    finally:
        # Before the client goes: its thread may be in the middle of a call.
        if disclosure is not None:
            disclosure.close()


@dataclass(frozen=True)
class Sides:
    """The rows of the data file, and the samples on each side: to train on, and held out (maybe none)."""

    loaded: LoadedFile
    train: tuple[Sample, ...]
    held_out: tuple[Sample, ...]


def load_sides(config: WorkerConfig) -> Sides:
    """Read the files and split them, before any model is loaded; raises `DataError`."""
    loaded = load_rows(Path(config.dataset))
    if config.eval_split is not None:
        return Sides(loaded, *split_rows(loaded.samples, config.eval_split))
    held_out = load_rows(Path(config.eval_dataset)).samples if config.eval_dataset is not None else ()
    return Sides(loaded, loaded.samples, held_out)


def worker_data(config: WorkerConfig, rows: Sides, base: LoadedBase, layout: Layout, group: ProcessGroup) -> WorkerData:
    """All that can be refused about options, data and this machine is refused here, before the long work."""
    length = resolve_max_length(config.max_length, context_of(base.model))
    check_memory_of_step(config, base, layout, length)
    blocks = training_blocks(rows, base, config, length, show=group.rank == 0)
    sampler = block_sampler(blocks, config, group.rank, group.world_size)
    hashes = sample_hashes(blocks)
    held_out = _held_out(config, rows, base, length, hashes, show=group.rank == 0)
    return WorkerData(blocks, hashes, sampler, held_out, training_config(config, sampler.shard))


def _held_out(
    config: WorkerConfig, rows: Sides, base: LoadedBase, length: int, train: Hashes, show: bool
) -> HeldOutPlan | None:
    if not rows.held_out:
        return None
    samples = tokenize_samples(rows.held_out, base.tokenizer, length).samples
    # A fixed seed: whoever measures on the same rows measures on the same blocks.
    plan = held_out_plan(config, pack(samples, length, 0, _pad_id(base)))
    if show:
        tell_held_out(plan, len(rows.held_out), samples, train)
    return plan


def training_blocks(rows: Sides, base: LoadedBase, config: WorkerConfig, max_length: int, show: bool) -> list[Block]:
    """The data as packed blocks; shows two samples as the model will see them."""
    data, loaded = tokenize_samples(rows.train, base.tokenizer, max_length), rows.loaded
    blocks = pack(data.samples, max_length, config.seed, _pad_id(base))
    if show:
        tokens = sum(int((block.segment_ids >= 0).sum()) for block in blocks)
        _log.info(
            "dataset",
            file=config.dataset,
            format=loaded.report.format,
            blocks=len(blocks),
            tokens=tokens,
            max_length=max_length,
            tokens_per_step=tokens_per_step(config, max_length),
        )
        if loaded.report.bad_count or data.unlearnable_lines:
            _log.warning("rows_left_out", bad=loaded.report.bad_count, nothing_to_learn=len(data.unlearnable_lines))
        print(rendered_preview(data.samples, base.tokenizer, _PREVIEWS), flush=True)
    return blocks


def _pad_id(base: LoadedBase) -> int:
    pad = base.tokenizer.pad_token_id
    return int(pad if pad is not None else base.tokenizer.eos_token_id)


def _disclosure(
    config: WorkerConfig, base: LoadedBase, blocks: list[Block], client: CoordinatorClient, state_dir: Path
) -> Disclosure | None:
    statistics = statistics_to_send(config, base, blocks, state_dir / "statistics")
    return Disclosure(client, config.specialty, config.worker_id, statistics) if statistics else None


def statistics_to_send(
    config: WorkerConfig, base: LoadedBase, blocks: list[Block], folder: Path
) -> dict[StatisticsKind, bytes]:
    """What the worker discloses of its data, by kind; nothing where it may not or cannot be told of these data.

    What was made of the same data before is in `folder`.
    """
    if not config.send_statistics:
        return {}
    key = statistics_key(base, blocks, _targets(config))
    if kept := read_kept(folder, key):
        _log.info("statistics_kept", folder=str(folder))
        return kept
    started = time.monotonic()
    try:
        found = data_statistics(base, blocks, _targets(config))
    except ValueError as error:  # too little data, or a base model that has no such numbers: training needs neither
        _log.warning("no_statistics", reason=str(error))
        return {}
    seconds = round(time.monotonic() - started, 1)
    _log.info("statistics", prompts=found.prompts.count, tokens=found.moments.tokens, seconds=seconds)
    bodies: dict[StatisticsKind, bytes] = {"prompts": found.prompts.to_bytes(), "moments": found.moments.to_bytes()}
    if not found.cut_short:  # a machine that has more time next time makes better ones
        keep(folder, key, bodies)
    return bodies


def _build(
    config: WorkerConfig,
    base: LoadedBase,
    data: WorkerData,
    group: ProcessGroup,
    client: CoordinatorClient,
    state_dir: Path,
    outbox: Outbox | None,
    disclosure: Disclosure | None,
) -> DistributedWorker:
    expert = QwenLoRAExpert(base, _lora(config), data.training, group)
    settings = SyncSettings(
        config.worker_id,
        config.specialty,
        config.sync_interval,
        config.max_unsynced,
        config.wire_dtype,
        config.start_from,
        config.allow_changed_data,
    )
    worker = QwenWorker(expert, data.sampler, held_out=data.held_out, hashes=data.hashes)
    on_registered = disclosure.start if disclosure is not None else lambda: None
    return DistributedWorker(worker, client, settings, state_dir, outbox, on_registered=on_registered)


def _lora(config: WorkerConfig) -> LoraConfig:
    return LoraConfig(
        config.lora_r,
        config.lora_alpha,
        config.lora_dropout,
        _targets(config),
        seed_of(config.specialty) % 2**63,
    )


def _targets(config: WorkerConfig) -> str | tuple[str, ...]:
    return config.target_modules[0] if len(config.target_modules) == 1 else config.target_modules
