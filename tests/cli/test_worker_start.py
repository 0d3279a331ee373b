"""A worker asks the federation before it imports torch: what is not set is taken over, what differs is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from builders import write_rows
from command import ROOT, Outcome
from live import House, listening, open_house
from structlog.testing import capture_logs

from fedmoe.cli import main
from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.manifest import BaseModel, Manifest
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.lora_layers import find_targets
from fedmoe.models.tiny import save_tiny
from fedmoe.runtime.stop_signals import StopOnSignal

Start = Callable[..., tuple[int, str, bool]]
ROWS = [{"prompt": f"{n} and one is ", "completion": f"{n + 1}"} for n in range(20)]


@pytest.fixture(scope="module")
def manifest(base: LoadedBase) -> Manifest:
    """Of rank 4 on two modules of every layer."""
    modules = find_targets(base.model, ("q_proj", "v_proj"))
    shapes = tuple(ModuleShape(name, module.in_features, module.out_features) for name, module in modules)
    return Manifest(base.identity, Layout(shapes, 4), 8.0)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[House]:
    (tmp_path / "house").mkdir()
    with capture_logs(), open_house(tmp_path / "house", min_sync_interval=0.0) as house:
        yield house


@pytest.fixture
def start(tmp_path: Path, opened: House) -> Iterator[Start]:
    """Starts a worker in a process that has loaded nothing; exit status, what it said, and whether torch was there."""
    data = write_rows(tmp_path / "d.jsonl", *ROWS)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDMOE_")}
    with listening(opened.app) as server:

        def run(*options: str) -> tuple[int, str, bool]:
            fixed = ["worker", "--coordinator-url", server.url, "--worker-id", "w1", "--specialty", "python"]
            fixed += ["--dataset", str(data), "--state-dir", str(tmp_path / "w1"), *options]
            code = f"""
import sys
from fedmoe.cli import main
try:
    main({fixed!r})
finally:
    print("torch" in sys.modules, flush=True)
"""
            environment = kept | {"FEDMOE_CACHE": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240
            )
            return done.returncode, done.stderr.strip(), done.stdout.splitlines()[-1] == "True"

        yield run


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--lora-r", "8"], ["rank: expected 4, got 8", "leave out --lora-r ("]),
        (["--lora-alpha", "32"], ["lora_alpha: expected 8, got 32", "leave out --lora-alpha ("]),
        (["--target-modules", "q_proj"], ["module missing: model.layers.0.self_attn.v_proj", "--target-modules"]),
        (["--target-modules", "all-linear"], ["module not expected: model.layers.0.mlp.down_proj"]),
    ],
)
def test_a_difference_is_refused_before_torch_is_imported(
    options: list[str], words: list[str], start: Start, opened: House, manifest: Manifest
) -> None:
    opened.register("sql", manifest=manifest)
    status, said, torch = start(*options)
    assert (status, torch) == (1, False)
    assert said.startswith("error: all experts share one LoRA configuration; ")
    for word in words:
        assert word in said


def test_a_name_that_is_no_tracker_is_refused_before_torch_is_imported(start: Start) -> None:
    status, said, torch = start("--report-to", "wandb,comet")
    assert (status, torch) == (2, False)
    assert said.startswith("error: --report-to: comet: no such tracker to report to; there are trackio, wandb, mlflow")


def test_another_base_model_is_refused_by_its_hash_before_torch_is_imported(
    start: Start, opened: House, manifest: Manifest, tmp_path: Path
) -> None:
    """The same settings, and other weights."""
    save_tiny(tmp_path / "other")
    weights = tmp_path / "other" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    opened.register("sql", manifest=manifest)
    status, said, torch = start("--base-model", str(tmp_path / "other"))
    assert (status, torch) == (1, False)
    assert f"base weights_hash: expected {manifest.base.weights_hash} (tiny), got " in said
    assert "give --base-model as the federation's first worker did" in said
    (kept,) = (tmp_path / "cache" / "hashes").iterdir()
    record = json.loads(kept.read_text())
    assert record["weights_hash"] in said
    # What is kept is used while size and time of the file are the same, and no longer.
    kept.write_text(json.dumps(record | {"weights_hash": "f" * 64}))
    assert f"got {'f' * 64}" in start("--base-model", str(tmp_path / "other"))[1]
    os.utime(weights, ns=(0, 0))
    assert f"got {record['weights_hash']}" in start("--base-model", str(tmp_path / "other"))[1]


def test_a_base_model_that_only_others_have_is_asked_for(start: Start, opened: House, manifest: Manifest) -> None:
    opened.register("sql", manifest=replace(manifest, base=BaseModel("ours", "local", "a" * 64, "b" * 64)))
    status, said, torch = start()
    assert (status, torch) == (1, False)
    assert "a folder called ours on another machine (weights aaaaaaaaaaaa); give its place here with --base" in said


def test_what_is_not_set_is_the_federations(
    opened: House, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.cli.worker.configure", lambda: None)
    monkeypatch.setattr(StopOnSignal, "install", lambda self: None)
    monkeypatch.delenv("FEDMOE_TOKEN", raising=False)
    opened.register("sql", manifest=manifest)
    data = write_rows(tmp_path / "d.jsonl", *ROWS)
    with listening(opened.app) as server:
        fixed = ["--coordinator-url", server.url, "--worker-id", "w1", "--specialty", "python", "--dtype", "fp32"]
        main(["worker", *fixed, "--dataset", str(data), "--state-dir", str(tmp_path / "w1"), "--max-steps", "1"])
    expert = opened.service.coordinator.expert("python")
    assert expert.version == 1
    assert expert.manifest == manifest


def test_the_command_reports_to_the_tracker_that_is_named(
    opened: House, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = ModuleType("trackio")
    logged: list[dict[str, float]] = []
    run = SimpleNamespace(log=lambda values, step: logged.append(values), finish=lambda: None)
    vars(tracker)["init"] = lambda project, name: run
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    monkeypatch.setenv("TRACKIO_DIR", "")
    monkeypatch.setattr("fedmoe.cli.worker.configure", lambda: None)
    monkeypatch.setattr(StopOnSignal, "install", lambda self: None)
    opened.register("sql", manifest=manifest)
    data = write_rows(tmp_path / "d.jsonl", *ROWS)
    with listening(opened.app) as server:
        fixed = ["--coordinator-url", server.url, "--worker-id", "w1", "--specialty", "python", "--dtype", "fp32"]
        fixed += ["--dataset", str(data), "--state-dir", str(tmp_path / "w1"), "--max-steps", "1"]
        main(["worker", *fixed, "--report-to", "trackio"])
    assert any("step/loss" in values for values in logged)
    assert any("push/bytes" in values for values in logged)


def test_the_kept_hash_of_the_tiny_model_is_its_own(base: LoadedBase) -> None:
    from fedmoe.models.stored_base import stored_base

    tiny = stored_base("tiny")
    assert tiny is not None
    assert tiny.hashes() == {"weights_hash": base.identity.weights_hash}
    assert tiny.parameters() == sum(parameter.numel() for parameter in load_base("tiny", "cpu").model.parameters())


def test_a_dry_run_ends_with_the_plan_before_torch_is_imported(start: Start, opened: House, manifest: Manifest) -> None:
    opened.register("sql", manifest=manifest)
    status, said, torch = start("--dry-run", "--dtype", "fp32", "--device", "cpu")
    assert (status, said, torch) == (0, "", False)
    assert [expert.name for expert in opened.service.coordinator.experts.values()] == ["sql"]


def test_the_plan_as_json_is_one_document(
    opened: House, manifest: Manifest, tmp_path: Path, fedmoe: Callable[..., Outcome]
) -> None:
    opened.register("sql", manifest=manifest)
    data = write_rows(tmp_path / "d.jsonl", *ROWS)
    with listening(opened.app) as server:
        fixed = ["worker", "--coordinator-url", server.url, "--worker-id", "w1", "--specialty", "python"]
        fixed += ["--dataset", str(data), "--state-dir", str(tmp_path / "w1")]
        plan = json.loads(fedmoe(*fixed, "--dry-run", "--json", "--wire-dtype", "bf16").out)
        refused = fedmoe(*fixed, "--json")
        text = fedmoe(*fixed, "--dry-run").out
    assert (plan["base_model"], plan["lora_r"], plan["trainable_parameters"]) == ("tiny", 4, manifest.layout.size)
    assert 2 * manifest.layout.size < plan["traffic"]["push_bytes"] < 2 * manifest.layout.size + 4096
    assert plan["fits"]
    assert text.startswith("plan: expert python on tiny (90,880 parameters, ")
    assert refused.status == 1
    assert "add --dry-run" in refused.err


def test_a_gpu_that_the_build_of_torch_cannot_use_is_told(
    opened: House, tmp_path: Path, fedmoe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H200, 143771, 143000, 9.0'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("fedmoe.cli.worker_start.torch_cuda", lambda: "")
    monkeypatch.setattr("fedmoe.cli.doctor.torch_cuda", lambda: "")
    data = write_rows(tmp_path / "d.jsonl", *ROWS)
    said = "torch is a CPU build but this machine has an NVIDIA GPU: NVIDIA H200"
    with listening(opened.app) as server:
        fixed = ["worker", "--coordinator-url", server.url, "--worker-id", "w1", "--specialty", "python"]
        fixed += ["--dataset", str(data), "--state-dir", str(tmp_path / "w1"), "--dry-run"]
        assert said in fedmoe(*fixed).err
        assert said not in fedmoe(*fixed, "--device", "cpu").err
        assert f"[note   ] GPU: {said}" in fedmoe("doctor", "--coordinator-url", server.url).out
