"""`fedmoe arena`: train, check and chart runs of policies that learn with and against each other."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmoe.cli.arena_episodes import episodes
from fedmoe.cli.arena_tournament import tournament
from fedmoe.cli.arena_watch import watch
from fedmoe.cli.options import AsJson, Token, template_of
from fedmoe.cli.output import CommandError, importing, reserved_output, show_json
from fedmoe.runtime.logs import configure
from fedmoe.runtime.trackers import REPORT_TO

if TYPE_CHECKING:
    from fedmoe.arena.config import ArenaConfig
    from fedmoe.arena.run.options import RunOptions, Watch
    from fedmoe.arena.run.results import RunOutcome
    from fedmoe.arena.run.run import LearnerMaker
    from fedmoe.arena.tasks.task import Task

app = typer.Typer(help="Train several LoRA policies with and against each other in one task.", no_args_is_help=True)

app.command()(episodes)
app.command()(watch)
app.command()(tournament)

Config = Annotated[Path, typer.Argument(help="The run's configuration, a TOML file; see docs/arena.md.")]


@app.command()
def train(
    config: Config,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/arena"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Begin anew; an earlier run is moved aside, not deleted.")
    ] = False,
    coordinator_url: Annotated[
        str | None,
        typer.Option(envvar="FEDMOE_COORDINATOR_URL", help="Every policy becomes an expert of this coordinator."),
    ] = None,
    token: Token = None,
    memory_limit_gb: Annotated[
        float | None, typer.Option(min=0.5, help="Memory limit in GiB; change it in OUT/control.json. [default: 32]")
    ] = None,
    gpu_memory_limit_gb: Annotated[float | None, typer.Option(min=0.5, help="Memory limit on every GPU.")] = None,
    allow_network_fs: Annotated[
        bool, typer.Option("--allow-network-fs", help="Accept a run folder on a network file system.")
    ] = False,
    rollout_device: Annotated[str, typer.Option(help="Where text is sampled: auto, cpu, cuda:N.")] = "auto",
    learner_device: Annotated[str, typer.Option(help="Where weights are trained: auto, cpu, cuda:N.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Precision of computing: auto, bf16, fp16, fp32.")] = "auto",
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray cluster for [engine] actors: HOST:PORT, or auto. [default: one of its own, here]"),
    ] = None,
    prometheus_port: Annotated[int | None, typer.Option(help="Serve metrics on this port of 127.0.0.1.")] = None,
    tensorboard: Annotated[bool, typer.Option(help="Write TensorBoard files to OUT/tensorboard.")] = True,
    report_to: Annotated[
        str, typer.Option(envvar=REPORT_TO, metavar="NAMES", help="Also send metrics to: trackio, wandb, mlflow.")
    ] = "",
    charts: Annotated[bool, typer.Option(help="Draw the charts at the end, to OUT/visualization_outputs.")] = True,
    as_json: AsJson = False,
) -> None:
    """Train, evaluate on held-out episodes, checkpoint and report; SIGTERM and Ctrl-C end it in order."""
    if resume and fresh:
        raise CommandError("--resume goes on with a run and --fresh begins anew; pass one of them")
    configure()
    run = _configured(config, coordinator_url)
    if ray_address is not None and not run.engine.actors:
        raise CommandError(f"--ray-address is for rollouts by Ray actors, and {config} has none: set [engine] actors")
    with importing("arena"):
        from fedmoe.arena.run.options import RunOptions
        from fedmoe.monitor.exporters import all_monitors
    limits = (memory_limit_gb, gpu_memory_limit_gb, allow_network_fs)
    options = RunOptions(out, resume, *limits, rollout_device, learner_device, dtype, token, ray_address)
    monitors = partial(
        all_monitors,
        iterations=run.iterations,
        prometheus_port=prometheus_port,
        tensorboard=tensorboard,
        report_to=report_to,
    )
    with reserved_output(as_json):
        if fresh:
            _move_aside(out)
        ending = _run(run, options, monitors)
        drawn = list(_drawn(out)) if charts else []
        print(f"{ending.status}{f' ({ending.reason})' if ending.reason else ''}; everything is in {out}")
    if as_json:
        files = [str(path) for path in drawn]
        show_json({"status": ending.status, "reason": ending.reason, "folder": str(out), "charts": files})


@app.command()
def check(config: Config, as_json: AsJson = False) -> None:
    """Read a configuration, try its task and modes, and say what a run would do; loads no model."""
    from fedmoe.arena.modes.registry import make_mode
    from fedmoe.arena.tasks.registry import make_task

    run = _configured(config, None)
    template_of(run.chat_template, run.chat_template_kwargs)
    task = make_task(run.task.name, run.task.options)
    for phase in run.phases:
        make_mode(phase.mode).check(task, run.policies.count)
    if as_json:
        facts = run.model_dump(mode="json", include={"base_model", "policies", "phases", "learning", "engine"})
        show_json({"task": task.name, "seats": list(task.seats), **facts})
    else:
        _show_plan(run, task)


def _show_plan(run: ArenaConfig, task: Task) -> None:
    learning = run.learning
    print(f"task       {task.name}, {task.seats[0]} to {task.seats[1]} seats")
    print(f"policies   {', '.join(run.policies.all_names)} (rank {run.policies.rank}) over {run.base_model}")
    for phase in run.phases:
        print(f"phase      {phase.mode}: {phase.iterations} iterations")
    print(f"iteration  {learning.groups} groups of {learning.samples} episodes, at most {learning.max_staleness} stale")
    actors, gpus = run.engine.actors, run.engine.gpus_per_actor
    where = f" in {actors} Ray actors with {gpus:g} GPUs each" if actors else ""
    print(f"engine     {run.engine.kind}{where}")


@app.command("charts")
def draw(
    out: Annotated[Path, typer.Argument(help="Folder of a run.")] = Path("runs/arena"), as_json: AsJson = False
) -> None:
    """Draw the charts of a run as it stands."""
    with reserved_output(as_json):
        drawn = list(_drawn(out))
    if as_json:
        show_json({"folder": str(out), "charts": [str(path) for path in drawn]})


def _drawn(out: Path) -> Iterator[Path]:
    """The charts of a run, each said once it is there."""
    from fedmoe.cli.arena_charts import draw_charts, load_series

    for path in draw_charts(load_series(out / "metrics.jsonl"), out / "visualization_outputs"):
        print(f"drew {path}")
        yield path


def _configured(path: Path, coordinator_url: str | None) -> ArenaConfig:
    with importing("arena"):
        from fedmoe.arena.config import FederationSection, read_config

    config = read_config(path)
    if coordinator_url is None:
        return config
    federation = config.federation or FederationSection(url=coordinator_url)
    return config.model_copy(update={"federation": federation.model_copy(update={"url": coordinator_url})})


def _run(config: ArenaConfig, options: RunOptions, watch: Watch) -> RunOutcome:
    with importing("arena"):
        from fedmoe.arena.run.options import Stop
        from fedmoe.arena.run.run import run_arena
        from fedmoe.runtime.device import pin_threads
        from fedmoe.runtime.stop_signals import StopOnSignal

    pin_threads()
    stop = Stop()
    StopOnSignal(lambda: stop.ask("asked to stop by a signal")).install()
    learners: dict[str, LearnerMaker] = {}
    if config.learning.kind == "areal":
        # The arena does not know of it; what it needs is checked before anything is loaded.
        from fedmoe.areal.run_learner import areal_learner, check_environment

        check_environment(config.learning.python)
        learners["areal"] = areal_learner
    return run_arena(config, options, stop, watch, learners)


#: Files and folders of a run; anything else in its folder is left where it is.
_RUN_FILES = (
    *("metrics.jsonl", "episodes.jsonl", "multi_model_training_simple_results.json", "run_report.json", "control.json"),
    *("logs", "checkpoints", "tensorboard", "visualization_outputs", "federation", "vllm_adapters"),
)


def _move_aside(out: Path) -> None:
    files = [out / name for name in _RUN_FILES if (out / name).exists()]
    if not files:
        return
    from fedmoe.runtime.files import lock_folder

    lock = lock_folder(out)  # a run that is still going on must not lose its files
    try:
        aside = out / "earlier" / time.strftime("%Y%m%d-%H%M%S")
        aside.mkdir(parents=True)
        for path in files:
            path.rename(aside / path.name)
    finally:
        lock.close()
    print(f"moved the earlier run to {aside}")
