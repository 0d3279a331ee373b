"""All commands of `fedmoe`: where each lies and what it does. A command's module is imported when it is called."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fedmoe import __version__
from fedmoe.cli.groups import CommandGroup, Commands, Place

#: In the order of the help; a summary is the first sentence of the command's own help.
PLACES = {
    "coordinator": Place(
        "coordinator:coordinator", "Start a coordinator: keeps the experts, lands updates on them, makes the gateway."
    ),
    "worker": Place(
        "worker:worker",
        "Train one expert on local data; the data stay on this machine, updates and statistics of them go.",
    ),
    "join": Place(
        "join:join",
        "Join a federation with the line that its coordinator showed, and train; the line works once, on one machine.",
    ),
    "evaluator": Place(
        "evaluator:evaluator",
        "Score candidate gateways on held-out data that stay on this machine; losses go, nothing else.",
    ),
    "rollback": Place("experts:rollback", "Give an expert the content of an earlier version, as a new version."),
    "retract": Place(
        "experts:retract",
        "Take all updates of one worker out of an expert, by replaying the journal without them.",
    ),
    "replicas": Place(
        "replicas:replicas",
        "Show which replica owns what, in which term and for how long; any replica answers (needs an admin token).",
    ),
    "status": Place(
        "status:status", "Show experts, workers, gateway and disk as they are now; a worker's token sees its own."
    ),
    "logs": Place("status:logs", "Show the newest lines of a worker's log, which come with its heartbeats."),
    "dashboard": Place(
        "dashboard:dashboard",
        "Show runs of the arena in a browser on this machine, live and side by side, until Ctrl-C.",
    ),
    "plot": Place(
        "plot:plot",
        "Draw runs side by side: scores, rewards, KL and entropy of the arena, losses over time of a federation.",
    ),
    "simulate": Place(
        "simulate:simulate",
        "Simulate a federation: the real coordinator and bytes, up to 100,000 workers on a virtual clock.",
    ),
    "doctor": Place(
        "doctor:doctor",
        "Check machine, packages, GPU, and the way to the coordinator; every problem comes with its fix.",
    ),
    "demo": Place(
        "demo:demo", "Run a whole federation on this machine: three experts of a real model, one gateway, measured."
    ),
    "gateway": Place("gateway:app", "Look at the gateway, save it, export it, try it."),
    "experts": Place("experts:app", "List, make, rename and retire experts; without a further word it lists them."),
    "quarantine": Place(
        "quarantine:app", "List updates that are held back, release or reject them (needs an admin token)."
    ),
    "data": Place("data:app", "Make the demo's data, and check your own."),
    "token": Place("tokens:app", "Make, list and revoke tokens (needs an admin token)."),
    "state": Place("state:app", "Look after a coordinator's state directory."),
    "arena": Place("arena:app", "Train several LoRA policies with and against each other in one task."),
    "config": Place("config:app", "Look at the configuration, and where its values come from."),
}


class AllCommands(CommandGroup):
    """The commands of `PLACES`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings | {"commands": Commands(PLACES)})


app = typer.Typer(
    name="fedmoe",
    help="Train LoRA experts where the data lives, and make one gateway model of them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    # Help as plain text: tables cut names of options and variables at 80 columns.
    rich_markup_mode=None,
    cls=AllCommands,
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
