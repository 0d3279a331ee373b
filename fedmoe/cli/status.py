"""`fedmoe status` and `fedmoe logs`: what goes on in a federation, once or again and again; the log of a worker."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Annotated

import typer

from fedmoe.cli.options import AsJson, with_client
from fedmoe.cli.output import say, show_json, show_table
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.status import DiskStatus, ExpertStatus, PushTotals, StatusInfo, WorkerStatus

_EVENTS = 5
_WATCH_SECONDS = 2.0
_NONE = "-"


@with_client()
def status(
    api: CoordinatorClient,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every two seconds, until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show experts, workers, gateway and disk as they are now; a worker's token sees its own."""
    while True:
        info = api.status()
        if as_json and watch:
            print(json.dumps(info.model_dump(mode="json")), flush=True)
        elif as_json:
            show_json(info)
        else:
            if watch and sys.stdout.isatty():
                print("\x1b[H\x1b[2J", end="")
            _show(info)
        if not watch:
            return
        try:
            time.sleep(_WATCH_SECONDS)
        except KeyboardInterrupt:
            return


@with_client()
def logs(
    api: CoordinatorClient,
    worker: Annotated[str, typer.Argument(help="The worker, as `fedmoe status` names it.")],
    expert: Annotated[str | None, typer.Option(help="Which one, of a worker of several experts.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the worker leaves or Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the newest lines of a worker's log, which come with its heartbeats."""
    for line in _lines(api, worker, expert, follow):
        if as_json:
            print(json.dumps({"worker": worker, "line": line}), flush=True)
        else:
            say(line)


def _lines(api: CoordinatorClient, worker: str, expert: str | None, follow: bool) -> Iterator[str]:
    following = 0
    while True:
        log = api.worker_log(worker, expert, following)
        yield from log.lines
        # A coordinator that was started anew counts from 0 again.
        following = log.next
        if not follow or log.state == "left":
            return
        try:
            time.sleep(_WATCH_SECONDS / 2)
        except KeyboardInterrupt:
            return


def _show(info: StatusInfo) -> None:
    if info.problem:
        say(f"NOT READY: {info.problem}")
    experts = [_expert(expert) for expert in info.experts if not expert.retired]
    show_table(
        "Experts",
        ("expert", "version", "workers", "updates/min", "staleness", "loss", "held out", "gain kept"),
        experts,
    )
    columns = ("worker", "expert", "state", "step", "tokens/s", "to the end", "memory", "heard", "pushes")
    show_table("Workers", columns, [_worker(worker, info.at) for worker in info.workers])
    for worker in info.workers:
        if worker.pushes.refusal:
            say(f"{worker.worker}: newest refusal: {worker.pushes.refusal}")
    if info.gateway is not None:
        sources = ", ".join(f"{name} {version}" for name, version in info.gateway.sources.items())
        say(f"Gateway: version {info.gateway.version}, {info.gateway.strategy} of {sources}")
    if info.gate is not None:
        say(f"Evaluation gate: {'; '.join(filter(None, (info.gate.reason, info.gate.status)))}")
    if info.held_updates:
        say(f"{info.held_updates} updates are held: `fedmoe quarantine list`")
    if info.disk is not None:
        say(_disk(info.disk))
    for event in info.events[:_EVENTS]:
        moment = time.strftime("%H:%M:%S", time.localtime(event.at))
        say(" ".join(word for word in (moment, event.kind, event.expert, event.worker, event.text) if word))


def _disk(disk: DiskStatus) -> str:
    free = "" if disk.free is None else f", {disk.free / 1e9:.1f} GB free"
    left = "" if disk.hours_left is None else f": room for {disk.hours_left:.0f} h"
    return f"Disk: {disk.stored / 1e9:.2f} GB of updates{free}, {disk.bytes_per_hour / 1e9:.2f} GB an hour now{left}"


def _expert(expert: ExpertStatus) -> tuple[str, ...]:
    newest = reversed(expert.losses), reversed(expert.losses)
    training = next((point.training for point in newest[0] if point.training is not None), None)
    held_out = next((point.held_out for point in newest[1] if point.held_out is not None), None)
    return (
        expert.name,
        str(expert.version),
        str(expert.workers),
        f"{expert.updates_per_minute:.1f}",
        _number(expert.staleness, 1),
        _number(training, 3),
        _number(held_out, 3),
        _NONE if expert.gain_kept is None else f"{expert.gain_kept:.0%}",
    )


def _worker(worker: WorkerStatus, now: float) -> tuple[str, ...]:
    state = worker.state or _NONE
    return (
        worker.worker,
        worker.expert,
        f"{state}: {worker.phase}" if worker.phase and state == "loading" else state,
        _NONE if worker.step is None else f"{worker.step}/{worker.steps}" if worker.steps else str(worker.step),
        _number(worker.tokens_per_second, 0),
        _NONE if worker.seconds_left is None else _duration(worker.seconds_left),
        _memory(worker),
        f"{_duration(max(0.0, now - worker.heard_at))} ago",
        _pushes(worker.pushes),
    )


def _pushes(pushes: PushTotals) -> str:
    rest = {"held": pushes.held, "refused": pushes.refused}
    return ", ".join([f"{pushes.landed} landed", *(f"{count} {what}" for what, count in rest.items() if count)])


def _memory(worker: WorkerStatus) -> str:
    """Of the GPU where there is one, else what the process holds."""
    if worker.device_memory is not None and worker.device_total is not None:
        return f"{worker.device_memory / 1e9:.1f}/{worker.device_total / 1e9:.0f} GB"
    return _NONE if worker.memory is None else f"{worker.memory / 1e9:.1f} GB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:.{digits}f}"
