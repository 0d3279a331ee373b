"""All commands of `fedmoe`. Heavy modules are imported by the command that needs them."""

from __future__ import annotations

from typing import Annotated

import typer

from fedmoe import __version__
from fedmoe.cli import (
    arena,
    config,
    coordinator,
    dashboard,
    data,
    demo,
    doctor,
    evaluator,
    experts,
    gateway,
    join,
    plot,
    quarantine,
    replicas,
    simulate,
    state,
    status,
    tokens,
    worker,
)
from fedmoe.cli.groups import CommandGroup

app = typer.Typer(
    name="fedmoe",
    help="Train LoRA experts where the data lives, and make one gateway model of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Help as plain text: tables cut names of options and variables at 80 columns.
    rich_markup_mode=None,
    cls=CommandGroup,
)
app.command("coordinator")(coordinator.coordinator)
app.command("worker")(worker.worker)
app.command("join")(join.join)
app.command("evaluator")(evaluator.evaluator)
app.add_typer(gateway.app, name="gateway", cls=CommandGroup)
app.add_typer(experts.app, name="experts", cls=CommandGroup)
for group in (app, experts.app):
    group.command("rollback")(experts.rollback)
    group.command("retract")(experts.retract)
app.add_typer(quarantine.app, name="quarantine", cls=CommandGroup)
app.command("replicas")(replicas.replicas)
app.command("status")(status.status)
app.command("logs")(status.logs)
app.add_typer(data.app, name="data", cls=CommandGroup)
app.add_typer(tokens.app, name="token", cls=CommandGroup)
app.add_typer(state.app, name="state", cls=CommandGroup)
app.add_typer(arena.app, name="arena", cls=CommandGroup)
app.command("dashboard")(dashboard.dashboard)
app.command("plot")(plot.plot)
app.command("simulate")(simulate.simulate)
app.command("doctor")(doctor.doctor)
app.add_typer(config.app, name="config", cls=CommandGroup)
app.command("demo")(demo.demo)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


#: `get_gateway_model.py`, the specification's name for the gateway tool.
gateway_tool = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None, add_completion=False)
gateway_tool.command()(gateway.get_gateway_model)
