"""Sets up `fedmoe worker` from its configuration; everything that can be refused early is, before slow steps."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import structlog

from fedmoe.cli.joined import connection
from fedmoe.config import WorkerConfig
from fedmoe.coordinator import seed_of
from fedmoe.datasets.tokens.packing import Block
from fedmoe.distributed_worker import DistributedWorker, SyncSettings
from fedmoe.models.base import ChatTemplate, LoadedBase, load_base
from fedmoe.models.parallel import ProcessGroup, join_group, local_rank
from fedmoe.models.training_config import LoraConfig
from fedmoe.qwen_finetune import QwenLoRAExpert
from fedmoe.qwen_worker import QwenWorker, StepRecord
from fedmoe.runtime.device import choose_device, pin_threads
from fedmoe.runtime.logs import log_tail
from fedmoe.runtime.stop_signals import StopOnSignal
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import StatisticsKind
from fedmoe.wire.outbox import Outbox
from fedmoe.worker.disclosure import Disclosure, StatisticsSender
from fedmoe.worker.heartbeat import LOGGED_EVENTS, HeartbeatSender
from fedmoe.worker.options import OptionError
from fedmoe.worker.preparation import (
    WorkerData,
    adapter_layout,
    blocks_per_step,
    check_federation,
    worker_data,
)
from fedmoe.worker.recovery import check_data, on_rank_zero
from fedmoe.worker.report import Phase, log_phase

_log = structlog.get_logger("fedmoe.worker")


def run_worker(config: WorkerConfig, chat: ChatTemplate | None = None) -> None:
    """Run a worker, what `worker_start` settled, until its schedule ends or it is told to stop (SIGTERM, SIGINT)."""
    processes = pin_threads()
    device = choose_device(config.device, local_rank())
    state_dir = Path(config.state_dir or f"runs/workers/{config.worker_id}")
    url, token = connection(config, state_dir)
    group = join_group(device)
    outbox: Outbox | None = None
    try:
        _check_same(config, group)
        with CoordinatorClient(url, token) as client, ExitStack() as opened:
            outbox = on_rank_zero(group, lambda: Outbox(state_dir, config.worker_id, config.specialty))
            # A wrong URL or token is told before a base model is loaded.
            federation = on_rank_zero(group, client.federation)
            heartbeat = _heartbeat(config, client, opened) if group.rank == 0 else None
            _begin("loading the base model", heartbeat)
            base = load_base(config.base_model, group.device, config.dtype, chat)
            _log.info("base_model", **base.report)
            for note in base.notes:
                _log.warning("base_model_note", note=note)
            layout = adapter_layout(config, base, _targets(config))
            message = federation.manifest if federation is not None else None
            manifest = message.manifest() if message is not None else None
            on_rank_zero(group, lambda: check_federation(config, base, layout, manifest))
            if heartbeat is not None:
                heartbeat.loading("preparing data")
            data = worker_data(config, base, layout, group, processes)
            _train(config, base, data, group, client, state_dir, outbox, heartbeat)
    finally:
        if outbox is not None:
            outbox.close()
        group.close()


def _check_same(config: WorkerConfig, group: ProcessGroup) -> None:
    """Refuse processes that asked the federation at different moments and were told different things."""
    terms = repr((config.base_model, config.lora_r, config.lora_alpha, config.target_modules, config.max_length))
    number = int.from_bytes(hashlib.sha256(terms.encode()).digest()[:7], "big")
    if group.any_flag(group.number(number) != number):
        raise OptionError("the federation got its first expert while these processes started; start them again")


def _heartbeat(config: WorkerConfig, client: CoordinatorClient, opened: ExitStack) -> HeartbeatSender:
    """Heartbeats until `opened` is closed."""
    tail = opened.enter_context(log_tail(LOGGED_EVENTS))
    sender = HeartbeatSender(client, config.specialty, config.worker_id, config.sync_interval, tail)
    opened.callback(sender.close)
    return sender


def _begin(phase: Phase, heartbeat: HeartbeatSender | None) -> None:
    """Say on rank 0 that a phase of unknown length begins."""
    if heartbeat is not None:
        heartbeat.loading(phase)
        log_phase(phase)


def _train(
    config: WorkerConfig,
    base: LoadedBase,
    data: WorkerData,
    group: ProcessGroup,
    client: CoordinatorClient,
    state_dir: Path,
    outbox: Outbox | None,
    heartbeat: HeartbeatSender | None,
) -> None:
    checkpoints, allowed = state_dir / "checkpoint", config.allow_changed_data
    on_rank_zero(group, lambda: check_data(checkpoints, data.sampler, data.hashes, allowed, group))

    # On the bare base model, so before an adapter is attached.
    disclosure = _disclosure(config, base, data.blocks, client, state_dir) if group.rank == 0 else None
    seed = seed_of(config.specialty) % 2**63
    lora = LoraConfig(config.lora_r, config.lora_alpha, config.lora_dropout, _targets(config), seed)
    settings = SyncSettings(
        *(config.worker_id, config.specialty, config.sync_interval, config.max_unsynced),
        *(config.wire_dtype, config.start_from, config.allow_changed_data, config.report_to),
    )
    try:
        expert = QwenLoRAExpert(base, lora, data.training, group)
        tokens_per_step = data.blocks[0].input_ids.size * blocks_per_step(config)

        def stepped(record: StepRecord) -> None:
            if heartbeat is not None:
                heartbeat.stepped(record)
            if disclosure is not None:
                disclosure.advance(expert.bare_base, tokens_per_step)

        worker = DistributedWorker(
            QwenWorker(expert, data.sampler, held_out=data.held_out, hashes=data.hashes),
            client,
            settings,
            state_dir,
            outbox,
            on_step=stepped,
            on_registered=disclosure.registered if disclosure is not None else lambda: None,
        )
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            worker.stop()

        StopOnSignal(stop).install()
        if heartbeat is not None:
            log_phase("training")
            heartbeat.training(str(group.device), data.training.max_steps or None)
        worker.run()
        if disclosure is not None:
            disclosure.finish(expert.bare_base, config.max_unsynced, stopped.is_set)
    finally:
        # Before the client goes: its thread may be in the middle of a call.
        if disclosure is not None:
            disclosure.close()


def _disclosure(
    config: WorkerConfig, base: LoadedBase, blocks: list[Block], client: CoordinatorClient, state_dir: Path
) -> Disclosure | None:
    """What the worker discloses of its data; None where it may not."""
    if not config.send_statistics:
        return None

    def sender(bodies: Mapping[StatisticsKind, bytes]) -> StatisticsSender:
        return StatisticsSender(client, config.specialty, config.worker_id, bodies)

    return Disclosure(base, blocks, _targets(config), state_dir / "statistics", sender)


def _targets(config: WorkerConfig) -> str | tuple[str, ...]:
    return config.target_modules[0] if len(config.target_modules) == 1 else config.target_modules
