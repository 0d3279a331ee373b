"""From parameters to a running worker: data checked first, then the base model, then the coordinator."""

from __future__ import annotations

import signal
from pathlib import Path

import structlog

from fedmoe.config import WorkerConfig
from fedmoe.coordinator import seed_of
from fedmoe.datasets.check import LoadedFile, load_rows
from fedmoe.datasets.packing import Block, BlockSampler, pack
from fedmoe.datasets.render import rendered_preview, tokenize_samples
from fedmoe.distributed_worker import DistributedWorker, SyncSettings
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.device import choose_device, pin_threads
from fedmoe.models.parallel import ProcessGroup, join_group, local_rank
from fedmoe.models.schedule import LoraConfig, TrainingConfig
from fedmoe.qwen_finetune import QwenLoRAExpert
from fedmoe.qwen_worker import QwenWorker
from fedmoe.wire.client import CoordinatorClient

_log = structlog.get_logger("fedmoe.worker")
_PREVIEWS = 2


def run_worker(config: WorkerConfig) -> None:
    """Run a worker until its schedule ends or it is told to stop (SIGTERM, SIGINT)."""
    pin_threads()
    loaded = load_rows(Path(config.dataset))
    device = choose_device(config.device, local_rank())
    group = join_group(device)
    try:
        base = load_base(config.base_model, device, config.dtype)
        _log.info("base_model", **base.report)
        blocks = training_blocks(loaded, base, config, show=group.rank == 0)
        token = config.token.get_secret_value() if config.token else None
        with CoordinatorClient(config.coordinator_url, token) as client:
            worker = _build(config, base, blocks, group, client)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: worker.stop())
            worker.run()
    finally:
        group.close()


def training_blocks(loaded: LoadedFile, base: LoadedBase, config: WorkerConfig, show: bool) -> list[Block]:
    """The data as packed blocks; shows two samples as the model will see them."""
    data = tokenize_samples(loaded.samples, base.tokenizer, config.max_length)
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


def _build(
    config: WorkerConfig, base: LoadedBase, blocks: list[Block], group: ProcessGroup, client: CoordinatorClient
) -> DistributedWorker:
    lora = LoraConfig(
        config.lora_r,
        config.lora_alpha,
        config.lora_dropout,
        config.target_modules[0] if len(config.target_modules) == 1 else config.target_modules,
        seed_of(config.specialty) % 2**63,
    )
    training = TrainingConfig(
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
    expert = QwenLoRAExpert(base, lora, training, group)
    sampler = BlockSampler(blocks, config.seed, group.rank, group.world_size)
    settings = SyncSettings(
        config.worker_id, config.specialty, config.sync_interval, config.max_unsynced, config.wire_dtype
    )
    state_dir = Path(config.state_dir or f"runs/workers/{config.worker_id}")
    return DistributedWorker(QwenWorker(expert, sampler), client, settings, state_dir)
