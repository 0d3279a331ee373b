"""From parameters to a running worker: data checked first, then the base model, then the coordinator."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import structlog

from fedmoe.config import WorkerConfig
from fedmoe.coordinator import seed_of
from fedmoe.datasets.check import LoadedFile, load_rows
from fedmoe.datasets.packing import Block, BlockSampler, pack
from fedmoe.datasets.render import rendered_preview, tokenize_samples
from fedmoe.distributed_worker import DistributedWorker, SyncSettings
from fedmoe.lora.moments import InputMoments, thin
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.device import choose_device, pin_threads
from fedmoe.models.parallel import ProcessGroup, join_group, local_rank
from fedmoe.models.schedule import LoraConfig, TrainingConfig
from fedmoe.qwen_finetune import QwenLoRAExpert
from fedmoe.qwen_worker import QwenWorker
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.messages import StatisticsKind
from fedmoe.worker.disclosure import Disclosure
from fedmoe.worker.group import on_rank_zero
from fedmoe.worker.kept_statistics import keep, read_kept, statistics_key
from fedmoe.worker.outbox import Outbox
from fedmoe.worker.phases import PhaseLog, say
from fedmoe.worker.signals import StopOnSignal
from fedmoe.worker.statistics import DataStatistics, data_statistics

_log = structlog.get_logger("fedmoe.worker")
_PREVIEWS = 2


def run_worker(config: WorkerConfig) -> None:
    """Run a worker until its schedule ends or it is told to stop (SIGTERM, SIGINT)."""
    pin_threads()
    loaded = load_rows(Path(config.dataset))
    device = choose_device(config.device, local_rank())
    state_dir = Path(config.state_dir or f"runs/workers/{config.worker_id}")
    token = config.token.get_secret_value() if config.token else None
    group = join_group(device)
    outbox: Outbox | None = None
    disclosure: Disclosure | None = None
    try:
        with CoordinatorClient(config.coordinator_url, token) as client:
            outbox = on_rank_zero(group, lambda: Outbox(state_dir, config.worker_id, config.specialty))
            # A wrong URL or token is told before a base model is loaded.
            on_rank_zero(group, client.federation)
            base, blocks = _base_and_blocks(config, loaded, group)
            # On the bare base model, so before an adapter is attached.
            disclosure = on_rank_zero(group, lambda: _disclosure(config, base, blocks, client, state_dir))
            worker = _build(config, base, blocks, group, client, state_dir, outbox, disclosure)
            stopped = _stopped_by_signal(worker)
            if group.rank == 0:
                say("training")
            worker.run()
            if disclosure is not None:
                disclosure.finish(config.max_unsynced, stopped.is_set)
    finally:
        if disclosure is not None:
            disclosure.close()
        if outbox is not None:
            outbox.close()
        group.close()


def _stopped_by_signal(worker: DistributedWorker) -> threading.Event:
    """Stop the worker on SIGTERM and SIGINT; the event is set once one came."""
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        worker.stop()

    StopOnSignal(stop).install()
    return stopped


def training_blocks(loaded: LoadedFile, base: LoadedBase, config: WorkerConfig, show: bool) -> list[Block]:
    """The data as packed blocks; shows two samples as the model will see them."""
    samples = PhaseLog("preparing data").over(loaded.samples) if show else loaded.samples
    data = tokenize_samples(samples, base.tokenizer, config.max_length)
    blocks = pack(data.samples, config.max_length, config.seed, _pad_id(base))
    if show:
        tokens = sum(int((block.segment_ids >= 0).sum()) for block in blocks)
        _log.info("dataset", file=config.dataset, format=loaded.report.format, blocks=len(blocks), tokens=tokens)
        if loaded.report.bad_count or data.unlearnable_lines:
            _log.warning("rows_left_out", bad=loaded.report.bad_count, nothing_to_learn=len(data.unlearnable_lines))
        print(rendered_preview(data.samples, base.tokenizer, _PREVIEWS), flush=True)
    return blocks


def _pad_id(base: LoadedBase) -> int:
    pad = base.tokenizer.pad_token_id
    return int(pad if pad is not None else base.tokenizer.eos_token_id)


def _base_and_blocks(config: WorkerConfig, loaded: LoadedFile, group: ProcessGroup) -> tuple[LoadedBase, list[Block]]:
    if group.rank == 0:
        say("loading the base model")
    base = load_base(config.base_model, group.device, config.dtype)
    _log.info("base_model", **base.report)
    return base, training_blocks(loaded, base, config, show=group.rank == 0)


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
        tokens = InputMoments.from_bytes(kept["moments"]).tokens
        _log.info("statistics_kept", folder=str(folder), tokens=tokens)
        _warn_if_thin(tokens)
        return kept
    started = time.monotonic()
    try:
        found = data_statistics(base, blocks, _targets(config), progress=PhaseLog("statistics of the data").at)
    except ValueError as error:  # too little data, or a base model that has no such numbers: training needs neither
        _log.warning("no_statistics", reason=str(error))
        return {}
    _tell(found, round(time.monotonic() - started, 1))
    bodies: dict[StatisticsKind, bytes] = {"prompts": found.prompts.to_bytes(), "moments": found.moments.to_bytes()}
    keep(folder, key, bodies)
    return bodies


def _tell(found: DataStatistics, seconds: float) -> None:
    """Log what the statistics rest on and what the data hold."""
    _log.info(
        "statistics",
        prompts=found.prompts.count,
        of_samples=found.samples,
        tokens=found.moments.tokens,
        of_tokens=found.tokens,
        seconds=seconds,
    )
    _warn_if_thin(found.moments.tokens)


def _warn_if_thin(tokens: int) -> None:
    if note := thin(tokens):
        _log.warning("thin_statistics", reason=f"the data give {note}")


def _build(
    config: WorkerConfig,
    base: LoadedBase,
    blocks: list[Block],
    group: ProcessGroup,
    client: CoordinatorClient,
    state_dir: Path,
    outbox: Outbox | None,
    disclosure: Disclosure | None,
) -> DistributedWorker:
    expert = QwenLoRAExpert(base, _lora(config), _training(config), group)
    sampler = BlockSampler(blocks, config.seed, group.rank, group.world_size)
    settings = SyncSettings(
        config.worker_id,
        config.specialty,
        config.sync_interval,
        config.max_unsynced,
        config.wire_dtype,
        config.start_from,
    )
    worker = QwenWorker(expert, sampler)
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


def _training(config: WorkerConfig) -> TrainingConfig:
    return TrainingConfig(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.lr_scheduler_type,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        gradient_checkpointing=config.gradient_checkpointing,
    )
