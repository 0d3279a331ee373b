"""Start of `fedmoe worker`: what can be refused without torch is, by asking the federation first; then the plan."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import structlog

from fedmoe.cli.joined import connection
from fedmoe.cli.output import say, show_json
from fedmoe.config import WorkerConfig
from fedmoe.lora.manifest import Manifest
from fedmoe.models.chat_template import ChatTemplate
from fedmoe.models.stored_base import StoredBase, stored_base
from fedmoe.runtime.hardware import Gpu, expected_device, expected_dtype, nvidia_gpus, torch_cuda, unused_gpu
from fedmoe.runtime.machine import available_memory
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import FederationInfo
from fedmoe.worker.options import check_processes, check_sources
from fedmoe.worker.plan import Machine, WorkerPlan, worker_plan
from fedmoe.worker.terms import settled, with_base

_log = structlog.get_logger("fedmoe.worker")


def start_worker(config: WorkerConfig, dry_run: bool = False, as_json: bool = False) -> None:
    """Settle the configuration with the federation and show the plan, then run the worker unless it is a `dry_run`."""
    check_processes(config)
    chat = ChatTemplate.from_options(config.chat_template, config.chat_template_kwargs)
    check_sources(config)
    state_dir = Path(config.state_dir or f"runs/workers/{config.worker_id}")
    # A wrong URL or token is told before anything slow.
    with CoordinatorClient(*connection(config, state_dir)) as client:
        federation = client.federation()
    manifest = federation.manifest.manifest() if federation.manifest is not None else None
    config, base = agreed(config, federation, manifest)
    if dry_run or os.environ.get("RANK", "0") == "0":
        gpus, cuda = nvidia_gpus(), torch_cuda()
        if config.device == "auto" and (problem := unused_gpu(gpus, cuda)) is not None:
            _log.warning("gpu_not_used", reason=problem)
        layout = manifest.layout if manifest is not None else None
        plan = worker_plan(config, base, layout, federation.min_sync_interval, _machine(config, gpus, cuda))
        _show(plan, as_json)
    if not dry_run:
        _log.info("phase", phase="loading PyTorch")
        import fedmoe.runtime.device  # noqa: F401  # brings PyTorch alone

        _log.info("phase", phase="loading transformers")
        from fedmoe.cli.worker_setup import run_worker

        run_worker(config, chat)


def agreed(
    config: WorkerConfig, federation: FederationInfo, manifest: Manifest | None
) -> tuple[WorkerConfig, StoredBase | None]:
    """The configuration as the federation has it, and what is known here of its base model; raises OptionError."""
    config = with_base(config, manifest)
    base = stored_base(config.base_model)
    return settled(config, federation, manifest, base), base


def _machine(config: WorkerConfig, gpus: list[Gpu], cuda: str | None) -> Machine:
    device = expected_device(config.device, gpus, cuda)
    number = device.partition(":")[2] or "0"
    available: int | None = available_memory()
    if device.startswith("cuda"):
        available = gpus[int(number)].free if number.isdecimal() and int(number) < len(gpus) else None
    return Machine(device, expected_dtype(config.dtype, device, gpus), available)


def _show(plan: WorkerPlan, as_json: bool) -> None:
    if as_json:
        show_json(plan.as_json())
        return
    for line in plan.lines():
        say(line)
    sys.stdout.flush()
