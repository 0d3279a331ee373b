"""`fedmoe evaluator`: score candidate gateways on held-out data."""

from __future__ import annotations

from typing import Annotated

import typer

from fedmoe.cli.options import ChatTemplateFile, ChatTemplateKwargs, DataMap
from fedmoe.cli.output import given, importing
from fedmoe.config import DEFAULT_SYNC_INTERVAL, EvaluatorConfig
from fedmoe.runtime.logs import configure


def evaluator(
    coordinator_url: Annotated[
        str,
        typer.Option(
            envvar=["FEDMOE_EVALUATOR_COORDINATOR_URL", "FEDMOE_COORDINATOR_URL"],
            help="Where the coordinator listens, http://HOST:PORT.",
        ),
    ],
    evaluator_id: Annotated[str, typer.Option(envvar="FEDMOE_EVALUATOR_EVALUATOR_ID", help="This evaluator's name.")],
    expert: Annotated[
        str, typer.Option(envvar="FEDMOE_EVALUATOR_EXPERT", help="The expert whose domain the held-out data are of.")
    ],
    held_out: Annotated[
        str,
        typer.Option(
            envvar="FEDMOE_EVALUATOR_HELD_OUT", help="Data nobody trains on: a data file, a folder or a hub id."
        ),
    ],
    map: DataMap = None,
    held_out_blocks: Annotated[int | None, typer.Option(help="Score at most so many blocks. \\[default: 16]")] = None,
    max_length: Annotated[
        int | None, typer.Option(help="Tokens a block. \\[default: 1024, or the model's context if shorter]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Blocks at once. \\[default: 4]")] = None,
    poll_interval: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS", help=f"Seconds between two looks for a candidate. \\[default: {DEFAULT_SYNC_INTERVAL}]"
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(help="Base model: smollm2, tiny, a folder or a hub id. \\[default: Qwen/Qwen2.5-0.5B-Instruct]"),
    ] = None,
    chat_template: ChatTemplateFile = None,
    chat_template_kwargs: ChatTemplateKwargs = None,
    device: Annotated[str | None, typer.Option(help="Device: auto (default), cpu, cuda, cuda:1, mps.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of computing: auto (default), bf16, fp16, fp32.")] = None,
    token: Annotated[str | None, typer.Option(help="Join token; better as FEDMOE_TOKEN.", show_default=False)] = None,
) -> None:
    """Score candidate gateways on held-out data that stay on this machine; losses go, nothing else."""
    config = EvaluatorConfig(**given(**locals()))  # type: ignore[arg-type]
    configure()
    with importing("worker"):
        from fedmoe.gateway.evaluator import run_evaluator
    run_evaluator(config)
