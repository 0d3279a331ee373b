"""The commands of the specification as they are written, in processes of their own."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from command import ROOT, Outcome, run_script
from support import CoordinatorProcess, free_port

# Enough text for a few steps of the tiny model.
LINES = [{"text": f"def number_{i}(): return {i} * {i}  # the square of {i}"} for i in range(60)]


@dataclass(frozen=True)
class Federation:
    """A coordinator that runs, and what its one worker left."""

    url: str
    worker: Outcome


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A1 and A2: `run_coordinator.py`, and `run_worker.py` until its six steps are done."""
    folder = tmp_path_factory.mktemp("federation")
    port = free_port()
    coordinator = CoordinatorProcess(folder / "state", port=port)
    coordinator.start()
    try:
        yield Federation(coordinator.url, _train(folder, coordinator.url))
    finally:
        coordinator.stop()


def _train(folder: Path, url: str) -> Outcome:
    data = folder / "python.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    specified = ["--coordinator-url", url, "--worker-id", "Worker-1-Python", "--specialty", "python_expert"]
    specified += ["--dataset", str(data), "--sync-interval", "1.0"]
    small = ["--base-model", "tiny", "--max-steps", "6", "--max-length", "64", "--lora-r", "2"]
    return run_script("run_worker.py", *specified, *small, "--state-dir", str(folder / "worker"))


def test_a_worker_trains_pushes_and_leaves(federation: Federation) -> None:
    """A1, A2, D1."""
    assert federation.worker.status == 0, federation.worker.err[-2000:]
    events = [json.loads(line)["event"] for line in federation.worker.err.splitlines() if line.startswith("{")]
    assert "registered" in events
    assert "pulled" in events
    assert "pushed" in events


def test_the_gateway_is_printed(federation: Federation) -> None:
    """A3."""
    outcome = run_script("get_gateway_model.py", "--coordinator-url", federation.url)
    assert outcome.status == 0
    assert "weighted_average of python_expert v" in outcome.out
    assert "lora_A" in outcome.out


def test_the_gateway_is_saved(federation: Federation, tmp_path: Path) -> None:
    """A4, D3: the worker's updates are in it."""
    file = tmp_path / "gateway_model.npz"
    outcome = run_script("get_gateway_model.py", "--coordinator-url", federation.url, "--save-gateway", str(file))
    assert outcome.status == 0
    with np.load(file, allow_pickle=False) as arrays:
        assert arrays["lora_A"].ndim == arrays["lora_B"].ndim == 2
        assert arrays["lora_A"].shape[0] == arrays["lora_B"].shape[1] == 2
        assert np.abs(arrays["lora_B"]).max() > 0
        assert int(arrays["version"]) >= 2


def test_the_experts_are_listed(federation: Federation) -> None:
    """A5."""
    outcome = run_script("get_gateway_model.py", "--coordinator-url", federation.url, "--list-experts")
    assert outcome.status == 0
    for word in ("python_expert", "Worker-1-Python", "Gateway", "weighted_average"):
        assert word in outcome.out


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_exported_gateway_loads_in_peft(federation: Federation, tmp_path: Path) -> None:
    """D8: what another library computes with the export is the base model changed by the gateway."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from fedmoe.models.tiny import tiny_model

    folder = tmp_path / "gateway"
    export = ("-m", "fedmoe", "gateway", "export", str(folder), "--format", "peft")
    outcome = run_script(*export, "--coordinator-url", federation.url)
    assert outcome.status == 0, outcome.err
    tokens = torch.arange(40, 72).reshape(1, -1)
    with torch.no_grad():
        before = tiny_model().eval()(tokens).logits
        after = peft.PeftModel.from_pretrained(tiny_model(), str(folder)).eval()(tokens).logits
    assert torch.isfinite(after).all()
    assert (after - before).abs().max() > 1e-4


def test_an_answer_comes_from_the_gateway_on_its_base_model(
    federation: Federation, fedmoe: Callable[..., Outcome]
) -> None:
    """D8."""
    options = ("--base-model", "tiny", "--device", "cpu", "--max-new-tokens", "4")
    outcome = fedmoe("gateway", "generate", "def number_", *options, "--coordinator-url", federation.url)
    assert outcome.status == 0, outcome.err


def test_another_lora_configuration_is_refused(federation: Federation, tmp_path: Path) -> None:
    """D7: a clear error that names the differing option; nothing is trained for the wrong federation."""
    data = tmp_path / "python.jsonl"
    data.write_text(json.dumps(LINES[0]) + "\n")
    outcome = run_script(
        *("run_worker.py", "--coordinator-url", federation.url, "--worker-id", "w2", "--specialty", "sql_expert"),
        *("--dataset", str(data), "--base-model", "tiny", "--lora-r", "4", "--state-dir", str(tmp_path / "w2")),
    )
    assert outcome.status == 1
    error = outcome.err.splitlines()[-1]
    assert "rank: expected 2, got 4" in error
    assert "--lora-r" in error
    assert "Traceback" not in outcome.err


def test_on_an_open_address_tokens_are_printed_once_and_asked_for(
    coordinator_process: Callable[..., CoordinatorProcess],
) -> None:
    """A1: `--host 0.0.0.0`."""
    running = coordinator_process(["--host", "0.0.0.0"])
    running.start()
    said = running.log.read_text()
    tokens = dict(line.split() for line in said.splitlines() if line.strip().startswith(("join ", "admin ")))
    assert tokens.keys() == {"join", "admin"}
    command = f"FEDMOE_TOKEN={tokens['join']} fedmoe worker --coordinator-url http://THIS-HOST:{running.port}"
    assert command in said
    listing = ("-m", "fedmoe", "experts", "list", "--coordinator-url", running.url)
    assert run_script(*listing).status == 1
    assert run_script(*listing, environment={"FEDMOE_TOKEN": tokens["join"]}).status == 0
    running.stop()
    running.log.unlink()
    running.start()
    assert not [line for line in running.log.read_text().splitlines() if "fmt_" in line]
    assert run_script(*listing, environment={"FEDMOE_TOKEN": tokens["join"]}).status == 0
    kept = b"".join(file.read_bytes() for file in running.state_dir.rglob("*") if file.is_file())
    assert not [token for token in tokens.values() if token.encode() in kept]


def test_the_coordinator_ends_with_status_0_when_it_is_told_to_stop(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "run_coordinator.py", "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(
        [*command, "--state-dir", str(tmp_path / "state")], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    with process.stderr as log:
        while '"listening"' not in log.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert '"stopped"' in log.read()
    assert process.wait(20) == 0
