"""`fedmoe evaluator`: score candidate gateways on held-out data."""

from __future__ import annotations

from collections.abc import Mapping

import typer

from fedmoe.cli.options import BASE_MODEL_OPTIONS, DEVICE_OPTIONS, JOIN_TOKEN, MAP, OptionText, configured
from fedmoe.cli.output import importing
from fedmoe.config import DEFAULT_SYNC_INTERVAL, EvaluatorConfig
from fedmoe.runtime.logs import configure

_OPTIONS: Mapping[str, OptionText] = {
    "coordinator_url": typer.Option(
        envvar=["FEDMOE_EVALUATOR_COORDINATOR_URL", "FEDMOE_COORDINATOR_URL"],
        help="Where the coordinator listens, http://HOST:PORT.",
    ),
    "evaluator_id": "This evaluator's name.",
    "expert": "The expert whose domain the held-out data are of.",
    "held_out": "Data nobody trains on: a data file, a folder or a hub id.",
    "map": MAP,
    "held_out_blocks": "Score at most so many blocks. [default: 16]",
    "max_length": "Tokens a block. [default: 1024, or the model's context if shorter]",
    "batch_size": "Blocks at once. [default: 4]",
    "poll_interval": typer.Option(
        metavar="SECONDS", help=f"Seconds between two looks for a candidate. [default: {DEFAULT_SYNC_INTERVAL}]"
    ),
    **BASE_MODEL_OPTIONS,
    **DEVICE_OPTIONS,
    "token": JOIN_TOKEN,
}


@configured(EvaluatorConfig, _OPTIONS)
def evaluator(config: EvaluatorConfig) -> None:
    """Score candidate gateways on held-out data that stay on this machine; losses go, nothing else."""
    configure()
    with importing("worker"):
        from fedmoe.gateway.evaluator import run_evaluator
    run_evaluator(config)
