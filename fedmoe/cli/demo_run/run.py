"""The demonstration itself: prepare, train three experts in a federation, stop, measure, report."""

from __future__ import annotations

import json
import os
import time
from contextlib import ExitStack
from itertools import pairwise
from typing import Any

from rich.console import Console

from fedmoe import __version__
from fedmoe.cli.demo_run.live import DemoView, sign_of_life
from fedmoe.cli.demo_run.plan import GENERAL, WORKERS, DemoPlan
from fedmoe.cli.demo_run.processes import DemoProcess, free_port, start, wait_until_healthy
from fedmoe.cli.demo_run.report import GATEWAY, report_json, report_markdown, report_table, results
from fedmoe.datasets.demo.domains import GENERAL_RECIPES, build_domains
from fedmoe.gateway.evaluate import LossMatrix, evaluate, held_out_blocks
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.formats import npz_bytes, peft_files, read_peft
from fedmoe.models.base import load_base, prepare_base
from fedmoe.monitor.charts.federation import loss_chart
from fedmoe.runtime.device import pin_threads
from fedmoe.runtime.files import write_atomic, write_folder_atomic
from fedmoe.runtime.records import Record, read_records
from fedmoe.runtime.threads import own_threads
from fedmoe.wire.client import CoordinatorClient

_POLL_SECONDS = 0.5


def run_demo(plan: DemoPlan, console: Console) -> None:
    """The whole demonstration; continues where an earlier run of the same folder stopped."""
    started = time.monotonic()
    console.print(f"[bold]1/4[/] base model {plan.base_model} and data")
    with sign_of_life(console, "checking the base model"):
        prepare_base(plan.base_model)

    def say(line: str) -> None:
        console.print(f"  {line}", highlight=False)

    build_domains(plan.data, progress=say)
    build_domains(plan.data, [GENERAL], say, recipes=GENERAL_RECIPES)
    console.print(f"[bold]2/4[/] coordinator and {len(WORKERS)} workers on loopback, {plan.steps} steps each")
    _train(plan, console)
    console.print("[bold]3/4[/] held-out losses")
    matrix, facts = _measure(plan, console)
    console.print("[bold]4/4[/] report")
    _write_report(plan, matrix, facts)
    console.print(report_table(*results(matrix)))
    # What the gateway's statistics rest on, and what was not done as it was asked for.
    tokens = ", ".join(f"{name} {count:,}" for name, count in facts["statistics_tokens"].items())
    for line in [f"input moments of so many tokens: {tokens}", *(f"note: {note}" for note in facts["notes"])]:
        console.print(line, highlight=False)
    took = time.monotonic() - started
    console.print(f"{plan.folder}/ holds the adapters, gateway_model.npz, metrics.jsonl and report.md ({took:.0f} s)")
    console.print("talk to what was trained, in two terminals (or run 'fedmoe demo --serve'):")
    for command in plan.commands_to_talk():
        console.print(f"  {command}", highlight=False, soft_wrap=True)


def serve_demo(plan: DemoPlan, console: Console, port: int) -> None:
    """Serve the gateway and the experts that were trained, until Ctrl-C or until a process ends."""
    coordinator_port = free_port()
    url = f"http://127.0.0.1:{coordinator_port}"
    logs = plan.folder / "logs"
    with ExitStack() as started:
        coordinator = start("coordinator", plan.coordinator_command(coordinator_port), logs / "coordinator.log")
        started.callback(coordinator.stop)
        with sign_of_life(console, "starting the coordinator"):
            wait_until_healthy(coordinator, url)
        server = start("gateway server", plan.serve_command(url, port), logs / "gateway.log")
        started.callback(server.stop)
        with sign_of_life(console, "loading the base model"):
            wait_until_healthy(server, f"http://127.0.0.1:{port}")
        console.print(f"OpenAI clients: http://127.0.0.1:{port}/v1 (models: gateway, auto and the experts)")
        console.print(f"the federation's page: {url}/   Ctrl-C ends both")
        while server.check() and coordinator.check():
            time.sleep(_POLL_SECONDS)


def _train(plan: DemoPlan, console: Console) -> None:
    """Run coordinator and workers until every worker has done its steps; then save what they made and stop."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with ExitStack() as started:  # stops what was started, the last first, whatever happens in between
        coordinator = start("coordinator", plan.coordinator_command(port), plan.folder / "logs" / "coordinator.log")
        started.callback(coordinator.stop)
        with sign_of_life(console, "starting the coordinator"):
            wait_until_healthy(coordinator, url)
        console.print(f"  the federation's page: {url}/", highlight=False, soft_wrap=True)
        view = DemoView(plan, console)  # looks at what is logged from now on
        workers: list[DemoProcess] = []
        for worker in WORKERS:
            command = plan.worker_command(worker, url)
            workers.append(start(worker.name, command, plan.log(worker), worker.niceness))
            started.callback(workers[-1].stop)
        with view:
            # All of them are looked at, so that a failure is seen while others run.
            while sum(process.check() for process in workers) and coordinator.check():
                view.refresh()
                time.sleep(_POLL_SECONDS)
        with sign_of_life(console, "saving the experts and the gateway"):
            _save_models(plan, url)


def _save_models(plan: DemoPlan, url: str) -> None:
    """Every expert and the gateway as PEFT folders, and the gateway as npz."""
    with CoordinatorClient(url) as api:
        gateway = api.pull_gateway()
        assert gateway is not None, "without an ETag there is always an answer"
        models: list[tuple[str, Adapter]] = [(GATEWAY, gateway.adapter)]
        for worker in WORKERS:
            pulled = api.pull_expert(worker.expert)
            assert pulled is not None, "without an ETag there is always an answer"
            models.append((worker.expert, pulled.adapter))
    for name, adapter in models:
        files = peft_files(adapter, gateway.base["name"], gateway.base["revision"])
        write_folder_atomic(plan.folder / "adapters" / name, files, force=True)
    write_atomic(plan.folder / "gateway_model.npz", npz_bytes(gateway.adapter, gateway.version, gateway.sources), 0o644)
    facts = {
        "gateway_version": gateway.version,
        "gateway_digest": gateway.digest,
        "sources": gateway.sources,
        # What was done, which is another strategy than the one asked for while an expert lacks input moments.
        **{key: gateway.info[key] for key in ("strategy", "notes", "statistics_tokens")},
    }
    write_atomic(plan.folder / "models.json", json.dumps(facts, indent=2).encode(), 0o644)


def _measure(plan: DemoPlan, console: Console) -> tuple[LossMatrix, dict[str, Any]]:
    """Score the saved models on the held-out files, with what cores are free after training; also facts of the run."""
    pin_threads(own_threads(os.environ).count or None)
    with sign_of_life(console, "loading the base model"):
        base = load_base(plan.base_model)
    names = [*(worker.expert for worker in WORKERS), GATEWAY]
    folders = {name: (plan.folder / "adapters" / name).iterdir() for name in names}
    adapters = {name: read_peft({path.name: path.read_bytes() for path in files}) for name, files in folders.items()}
    # The first blocks of each file in a fixed, shuffled order, the same in every run.
    held_out = {
        domain: held_out_blocks(plan.data / domain / "test.jsonl", base, plan.max_length, plan.held_out_blocks)
        for domain in (*(worker.domain for worker in WORKERS), GENERAL)
    }
    with sign_of_life(console, "measuring") as progress:
        matrix = evaluate(base, adapters, held_out, progress=progress)
    return matrix, {
        "fedmoe": __version__,
        "base_model": base.identity.name,
        "steps_per_worker": plan.steps,
        "tokens_per_step": plan.batch_size * plan.max_length,
        "sync_interval_seconds": plan.sync_interval,
        "training_seconds": round(training_seconds(_all_records(plan)), 1),
        "dtype": str(base.dtype),
        **json.loads((plan.folder / "models.json").read_bytes()),
    }


def _write_report(plan: DemoPlan, matrix: LossMatrix, facts: dict[str, Any]) -> None:
    records, (domains, general) = _all_records(plan), results(matrix)
    held_out = {
        name: {"base": result.base, "own expert": result.expert, "gateway": result.gateway}
        for name, result in domains.items()
    }
    lines = "".join(json.dumps(record) + "\n" for record in records)
    files = {
        "metrics.jsonl": lines.encode(),
        "loss.png": loss_chart(records, held_out),
        "report.md": report_markdown(domains, general, facts).encode(),
        "report.json": report_json(domains, general, facts).encode(),
    }
    for name, data in files.items():
        write_atomic(plan.folder / name, data, 0o644)


def training_seconds(records: list[Record], pause: float = 60.0) -> float:
    """Wall-clock seconds in which at least one worker trained; longer pauses, between two runs, do not count."""
    moments = [float(str(record["at"])) for record in records]
    gaps = [after - before for before, after in pairwise(moments)]
    return sum(gap for gap in gaps if gap < pause)


def _all_records(plan: DemoPlan) -> list[Record]:
    """The records of all workers in the order of time."""
    files = [plan.worker_dir(worker) / "metrics.jsonl" for worker in WORKERS]
    records = [record for file in files if file.exists() for record in read_records(file)]
    return sorted(records, key=lambda record: float(str(record["at"])))
