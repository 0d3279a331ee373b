"""Start of `fedmoe worker`: what can be refused without torch is, by asking the federation first."""

from __future__ import annotations

from pathlib import Path

from fedmoe.cli.joined import connection
from fedmoe.config import WorkerConfig
from fedmoe.models.chat_template import ChatTemplate
from fedmoe.models.stored_base import StoredBase, stored_base
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import FederationInfo
from fedmoe.worker.options import check_processes, check_sources
from fedmoe.worker.terms import settled, with_base


def start_worker(config: WorkerConfig) -> None:
    """Settle the configuration with the federation, then run the worker."""
    check_processes(config)
    chat = ChatTemplate.from_options(config.chat_template, config.chat_template_kwargs)
    check_sources(config)
    state_dir = Path(config.state_dir or f"runs/workers/{config.worker_id}")
    # A wrong URL or token is told before anything slow.
    with CoordinatorClient(*connection(config, state_dir)) as client:
        federation = client.federation()
    config, _ = agreed(config, federation)
    from fedmoe.cli.worker_setup import run_worker

    run_worker(config, chat)


def agreed(config: WorkerConfig, federation: FederationInfo) -> tuple[WorkerConfig, StoredBase | None]:
    """The configuration as the federation has it, and what is known here of its base model; raises OptionError."""
    message = federation.manifest
    manifest = message.manifest() if message is not None else None
    config = with_base(config, manifest)
    base = stored_base(config.base_model)
    return settled(config, federation, manifest, base), base
