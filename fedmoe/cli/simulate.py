"""`fedmoe simulate`: what schemes would give a federation of many workers, on a virtual clock."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedmoe.cli.options import AsJson
from fedmoe.cli.output import importing, reserved_output, show_json, show_table

if TYPE_CHECKING:
    from fedmoe.simulation.config import SimulationConfig
    from fedmoe.simulation.run import SchemeRun
    from fedmoe.simulation.work import FleetWork


def simulate(
    config: Annotated[Path, typer.Argument(help="The simulation's configuration, a TOML file; see docs/scale.md.")],
    out: Annotated[Path, typer.Option(help="Folder of the report.")] = Path("runs/simulation"),
    as_json: AsJson = False,
) -> None:
    """Simulate a federation: the real coordinator and bytes, up to 100,000 workers on a virtual clock.

    The same configuration gives the same report.
    """
    from fedmoe.simulation.config import read_config

    with reserved_output(as_json):
        report = _simulated(read_config(config), out)
    if as_json:
        schemes = [
            {key: row[key] for key in ("name", "kind", "fleet", "updates", "bytes")} for row in report["schemes"]
        ]
        show_json({"folder": str(out), "work": report["work"], "note": report["note"], "schemes": schemes})
    else:
        _show(report, out)


def _simulated(chosen: SimulationConfig, out: Path) -> dict[str, Any]:
    """Run a simulation and write its report; returns it."""
    from fedmoe.simulation.recorded import Recording, write_recording
    from fedmoe.simulation.report import make_report
    from fedmoe.simulation.report_text import markdown
    from fedmoe.simulation.run import run_simulation

    work = _work(chosen)
    out.mkdir(parents=True, exist_ok=True)
    runs = run_simulation(chosen, work, _tell)
    report = make_report(chosen, work.manifest.layout.size, runs)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    (out / "report.md").write_text(markdown(report), "utf-8")
    recorded = next((run.recorded for run in runs if run.scheme.kind == "asynchronous"), ())
    if recorded:
        write_recording(out / "deltas.safetensors", Recording.of(work.manifest, recorded))
    if find_spec("matplotlib") is not None and chosen.work.kind == "training":
        from fedmoe.monitor.charts.simulation import simulation_chart
        from fedmoe.monitor.picture import png

        (out / "report.png").write_bytes(png(simulation_chart(report)))
    return report


def _show(report: dict[str, Any], out: Path) -> None:
    from fedmoe.simulation.report_text import COSTS, COUNTS, cost_rows, count_rows

    print(report["note"])
    show_table("Traffic", COUNTS, count_rows(report))
    if report["work"] == "training":
        show_table("Cost to Target", COSTS, cost_rows(report))
    print(f"everything is in {out}")


def _work(config: SimulationConfig) -> FleetWork:
    if config.work.kind == "recorded":
        from fedmoe.simulation.recorded import RecordedFleet

        return RecordedFleet(config.work, config.seed)
    with importing("worker"):
        from fedmoe.runtime.device import pin_threads
        from fedmoe.simulation.training import TrainingFleet

    pin_threads(1)  # more would only make the tiny model slower
    return TrainingFleet(config.work, config.seed, config.fleet.experts)


def _tell(run: SchemeRun) -> None:
    fleet = " on the ideal fleet" if run.ideal else ""
    print(f"{run.scheme.name}{fleet}: {sum(run.tally.accepted.values()):,} updates accepted", flush=True)
