"""The whole demonstration, small: real processes, the tiny base model, a few steps; then once more to continue it."""

from __future__ import annotations

import io
import json
import os
import shlex
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forks
import httpx2
import numpy as np
import pytest
from forks import Fork
from rich.console import Console

from fedmoe.cli.demo_run import run
from fedmoe.cli.demo_run.plan import GENERAL, WORKERS, DemoPlan
from fedmoe.cli.demo_run.processes import DemoProcess, free_port
from fedmoe.cli.demo_run.report import GATEWAY
from fedmoe.lora.formats import read_peft
from fedmoe.lora.moments import LEAST_TOKENS
from fedmoe.runtime.records import Record

TEXTS = {
    "python": "def add(left, right):\n    return left + right\n",
    "sql": "SELECT name, count(*) FROM orders GROUP BY name;\n",
    "docs": "Call this method to open the file. It returns a handle.\n",
}


def write_data(folder: Path) -> None:
    for name, text in TEXTS.items():
        (folder / name).mkdir(parents=True)
        for split, rows in (("train", 40), ("test", 12)):
            lines = [json.dumps({"text": text * (1 + number % 5)}) for number in range(rows)]
            (folder / name / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / GENERAL).mkdir()
    lines = [json.dumps({"text": f"Number {number} of the stories was told by the fire."}) for number in range(20)]
    (folder / GENERAL / "test.jsonl").write_text("\n".join(lines) + "\n")


def forked(name: str, arguments: Sequence[str], log: Path, niceness: int = 0) -> DemoProcess:
    """As `start` does it, without the seconds that six workers take to load torch; `start` has a test of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    process: Any = Fork(["-m", "fedmoe", *arguments], log, environment=os.environ | {"OMP_NUM_THREADS": "1"})
    return DemoProcess(name, process, log)


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DemoPlan:
    write_data(tmp_path / "data")
    # The data is there; making it needs a package registry and has tests of its own.
    monkeypatch.setattr(run, "build_domains", lambda *_, **__: {})
    monkeypatch.setattr(run, "start", forked)
    monkeypatch.chdir(tmp_path)
    return DemoPlan(
        tmp_path / "run", tmp_path / "data", "tiny", steps=12, sync_interval=1.0, max_length=64, held_out_blocks=4
    )


def run_quietly(plan: DemoPlan) -> str:
    out = io.StringIO()
    run.run_demo(plan, Console(file=out, force_terminal=False, width=160))
    return out.getvalue()


def test_the_demonstration_trains_merges_measures_can_be_run_again_and_served(
    plan: DemoPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = run_quietly(plan)
    for part in ("gain kept", "general", "phase starting", "input moments of so many tokens: docs_expert"):
        assert part in said
    first = check_run(plan)
    assert "gain kept" in run_quietly(plan)
    again = check_run(plan)
    # Every worker had done its steps: the second run changes no expert and measures the same.
    assert again["sources"] == first["sources"]
    assert again["domains"] == first["domains"]
    check_adapters(plan)
    check_served(plan, said, monkeypatch)


def check_served(plan: DemoPlan, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are there for clients, and the command that was advised talks to the gateway."""
    begun, out, answers, port = list[DemoProcess](), io.StringIO(), list[Any](), free_port()

    def noted(*arguments: Any) -> DemoProcess:
        begun.append(forked(*arguments))
        return begun[-1]

    def talk() -> None:
        try:
            while "OpenAI clients" not in out.getvalue():
                time.sleep(0.1)
            answers.append(httpx2.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).json())
            url = out.getvalue().partition("page: ")[2].split("/   ")[0]
            advised = plan.commands_to_talk()[1]
            assert advised in said
            environment = os.environ | {"FEDMOE_COORDINATOR_URL": url}
            answers.append(forks.run("-m", *shlex.split(advised), environment=environment, timeout=100))
        finally:
            begun[-1].stop()

    monkeypatch.setattr(run, "start", noted)
    talker = threading.Thread(target=talk, daemon=True)
    talker.start()
    run.serve_demo(plan, Console(file=out, force_terminal=False, width=160), port)
    talker.join(30)
    models, generated = answers
    assert {model["id"] for model in models["data"]} >= {"gateway", *(worker.expert for worker in WORKERS)}
    assert generated.returncode == 0, generated.stderr
    assert not any(process.check() for process in begun), "what was started is ended"


def check_run(plan: DemoPlan) -> dict[str, object]:
    report: dict[str, object] = json.loads((plan.folder / "report.json").read_text())
    assert (report["strategy"], report["notes"]) == ("regmean", [])
    domains = report["domains"]
    assert isinstance(domains, dict)
    assert domains.keys() == TEXTS.keys()
    general, tokens = report["general"], report["statistics_tokens"]
    assert isinstance(general, dict)
    assert general["experts"].keys() == {worker.expert for worker in WORKERS}
    assert isinstance(tokens, dict)
    assert all(count >= LEAST_TOKENS for count in tokens.values())
    for losses in domains.values():
        assert losses["expert"] < losses["base"]
    for name in ("metrics.jsonl", "report.md", "loss.png", "gateway_model.npz"):
        assert (plan.folder / name).stat().st_size > 0
    assert (plan.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    return report


def check_adapters(plan: DemoPlan) -> None:
    for name in (GATEWAY, *(worker.expert for worker in WORKERS)):
        folder = plan.folder / "adapters" / name
        assert read_peft({path.name: path.read_bytes() for path in folder.iterdir()}).rank in range(16, 49)
    with np.load(plan.folder / "gateway_model.npz", allow_pickle=False) as arrays:
        assert arrays["lora_A"].ndim == arrays["lora_B"].ndim == 2
        assert int(arrays["version"]) > 0


def test_the_time_between_two_runs_is_no_training_time() -> None:
    records: list[Record] = [{"at": at, "kind": "step"} for at in (0.0, 4.0, 10.0, 500.0, 503.0)]
    assert run.training_seconds(records) == 13.0
    assert run.training_seconds([]) == 0.0
