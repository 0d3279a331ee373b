"""`fedmoe demo`: run a whole federation on this machine."""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from fedmoe.cli.options import AsJson
from fedmoe.cli.output import CommandError, importing, reserved_output, show_json

_SERVE_PORT = 8080


def demo(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/demo"),
    data: Annotated[Path, typer.Option(help="Folder of the data.")] = Path("data/demo"),
    base_model: Annotated[str, typer.Option(help="Base model: smollm2, a folder or a hub id.")] = "smollm2",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of every worker.")] = 60,
    sync_interval: Annotated[float, typer.Option(min=1.0, help="Seconds between pushes.")] = 10.0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew; an earlier run is moved aside, not deleted.")
    ] = False,
    serve: Annotated[
        bool,
        typer.Option("--serve", help="Serve the gateway afterwards to OpenAI clients, on port 8080, until Ctrl-C."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a whole federation on this machine: three experts of a real model, one gateway, measured.

    Run again, it continues where it stopped; a finished run is measured again.
    """
    with importing("worker,charts"):
        from rich.console import Console

        from fedmoe.cli.demo_run.plan import DemoPlan
        from fedmoe.cli.demo_run.run import run_demo, serve_demo
    plan = DemoPlan(out, data, base_model, steps, sync_interval)
    if fresh and out.exists():
        aside = out.with_name(f"{out.name}-{time.strftime('%Y%m%d-%H%M%S')}")
        out.rename(aside)
        print(f"moved the earlier run to {aside}", file=sys.stderr if as_json else sys.stdout)
    # A run continues only with the plan it began with.
    out.mkdir(parents=True, exist_ok=True)
    file, chosen = out / "plan.json", {"base_model": base_model, "steps": steps}
    before = json.loads(file.read_text()) if file.exists() else chosen
    if before != chosen:
        raise CommandError(f"{out} was begun with {before}, not {chosen}; pass --fresh or choose another --out")
    file.write_text(json.dumps(chosen))
    try:
        with reserved_output(as_json):
            run_demo(plan, Console())
    except KeyboardInterrupt:
        raise CommandError("stopped; run the same command again to continue") from None
    if as_json:
        show_json({"folder": str(out), "report": json.loads((out / "report.json").read_bytes())})
    if serve:
        with suppress(KeyboardInterrupt), reserved_output(as_json):
            serve_demo(plan, Console(), _SERVE_PORT)
