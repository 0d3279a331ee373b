"""The promises on the multi-model training (A9, E1 to E23) in one place, most of them looked for in one real run.

The run is started as a user would, by demo/start_training.sh in the background, with everything that can be plugged in
plugged in: a base model of another kind, and the task, mode, credit rule, metric and engine of an installed package.
"""

from __future__ import annotations

import json
import os
import runpy
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import arena_plug_in
import numpy as np
import pytest
from arena_plug_in import Letters

from fedmoe.arena import metrics
from fedmoe.record import Record, Value, read_records

ROOT = Path(__file__).parents[1]
NAMES = ("one", "two", "three", "four")
MODES = ("cooperative", "competitive", "team_battle", "mixed", "neighbours")
CONFIG = f"""\
base_model = "./llama"
[task]
name = "letters:lower"
[policies]
count = 4
names = {list(NAMES)}
rank = 2
[learning]
groups = 2
samples = 4
learning_rate = 5e-3
[evaluation]
episodes = 4
[checkpoint]
every = 1
keep = 2
[engine]
kind = "second_copy"
"""
CHARTS = {
    *("training_trends_line_chart.png", "model_performance_bar_chart.png", "model_capability_radar_chart.png"),
    *("3d_performance_heatmap.png", "performance_scatter_plot.png", "comprehensive_dashboard.png"),
}


@dataclass(frozen=True)
class Run:
    """A run that is over, in a folder that looks like a fresh clone."""

    folder: Path
    records: tuple[Record, ...]

    def of(self, kind: str, **wanted: Value) -> list[Record]:
        """The records of a kind with these values."""
        return [one for one in self.records if one["kind"] == kind and wanted.items() <= one.items()]

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").iterdir())

    def json(self, *names: str) -> dict[str, object]:
        read: dict[str, object] = json.loads(self.folder.joinpath(*names).read_text())
        return read


def save_llama(folder: Path) -> None:
    """A base model of another family than the one embedded."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedmoe.models.tiny import tiny_tokenizer

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=259, bos_token_id=None, eos_token_id=258, pad_token_id=256, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make_clone(folder: Path) -> dict[str, str]:
    """A clone with an environment, a configuration and an installed package; returns the environment variables.

    `make` only writes down what it was asked for: the environment is the one that runs the tests.
    """
    (folder / "demo").symlink_to(ROOT / "demo")
    executable(folder / "bin" / "make", f'echo "$@" >> {shlex.quote(str(folder / "made.txt"))}')
    executable(folder / ".venv" / "bin" / "python", f'exec {shlex.quote(sys.executable)} "$@"')
    information = folder / "site" / "arena_plug_in-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: arena-plug-in\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(arena_plug_in.ENTRY_POINTS)
    save_llama(folder / "llama")
    phases = "".join(f'[[phases]]\nmode = "{mode}"\niterations = 1\n' for mode in MODES)
    (folder / "run.toml").write_text(CONFIG + phases)
    paths = os.pathsep.join(map(str, (folder / "site", ROOT, ROOT / "tests")))
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FEDMOE_")}
    return kept | {"PYTHONPATH": paths, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of five modes by four policies, started in the background as the documents say, and over."""
    folder = tmp_path_factory.mktemp("clone")
    environment = make_clone(folder)
    command = "nohup ./demo/start_training.sh run.toml > training.log 2>&1 & wait $!"
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=environment, check=False, timeout=600)
    log = (folder / "training.log").read_text()
    assert done.returncode == 0, log
    return Run(folder, tuple(read_records(folder / "metrics.jsonl")))


def test_a9_the_training_starts_from_a_fresh_clone_in_the_background(run: Run) -> None:
    assert (run.folder / "made.txt").read_text() == "--no-print-directory arena-install\n"
    assert "\narena-install:" in (ROOT / "Makefile").read_text()
    assert (run.folder / "training.log").read_text().endswith("finished; everything is in .\n")
    assert run.json("run_report.json")["status"] == "finished"


@pytest.mark.parametrize(
    ("arguments", "passed"),
    [
        ([], [str(ROOT / "demo" / "arena.toml"), "--resume", "--out", "."]),
        (["my.toml", "--fresh"], ["my.toml", "--fresh", "--out", "."]),
        (["my.toml", "--out", "runs/mine"], ["my.toml", "--out", "runs/mine"]),
    ],
)
def test_a9_the_training_server_is_the_command_with_the_demonstrations_configuration(
    arguments: list[str], passed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("fedmoe.cli.main", called.append)
    monkeypatch.setattr(sys, "argv", ["run_training_server.py", *arguments])
    runpy.run_path(str(ROOT / "demo" / "run_training_server.py"), run_name="__main__")
    assert called == [["arena", "train", *passed]]


def test_e1_several_models_learn_at_once_in_one_environment(run: Run) -> None:
    for iteration, _ in enumerate(MODES):
        assert {one["policy"] for one in run.of("policy", iteration=iteration)} == set(NAMES)
    assert [one["task"] for one in run.of("run")] == ["letters:lower"]
    updates = {one["policy"]: one["weight_updates"] for one in run.of("policy", iteration=len(MODES) - 1)}
    assert min(int(str(count)) for count in updates.values()) >= 3
    results = run.json("multi_model_training_simple_results.json")["policies"]
    assert isinstance(results, dict)
    hashes = [digest for one in results.values() for digest in one["adapters"].values()]
    assert len(set(hashes)) == len(hashes) >= len(NAMES)


def test_e2_e3_e4_e5_every_mode_is_played_and_pays_in_its_own_way(run: Run) -> None:
    played = [str(run.of("team", iteration=iteration)[0]["mode"]) for iteration, _ in enumerate(MODES)]
    assert played == ["cooperative", "competitive", "team_battle", "mixed: cooperative", "neighbours"]

    def credit(mode: str) -> list[Record]:
        return run.of("credit", iteration=MODES.index(mode))

    # One team: the same for all, and nobody to be ahead of. Rivals: the leads add up to nothing.
    assert len({one["shared"] for one in credit("cooperative")}) == 1
    assert {one["versus"] for one in credit("cooperative")} == {None}
    assert abs(sum(float(str(one["versus"])) for one in credit("competitive"))) < 0.5
    assert all(int(str(one["games"])) > 0 for one in run.of("rating", iteration=1))
    choices = run.of("decision", what="strategy", iteration=2)
    assert {str(one["policy"]).count("+") for one in choices} == {1}
    assert len(choices) == 4
    assert {str(one["after"]).partition(",")[0] for one in choices} <= {"plain", "aloud"}


def test_e9_e10_e11_every_metric_is_measured(run: Run) -> None:
    """E9, E10, E11: fields are those of docs/metrics.md; only what this machine or task lacks is empty."""
    system = run.of("system")[-1]
    assert min(float(str(system[name])) for name in ("memory_percent", "process_bytes", "disk_free_bytes")) > 0
    assert {"cpu_percent", "gpu_percent", "gpu_memory_bytes", "disk_percent", "memory_limit_bytes"} <= set(system)
    for one in run.of("policy", mode="cooperative"):
        assert 0 <= float(str(one["accuracy"])) <= 1
        assert None not in (one["reward"], one["efficiency_second"], one["efficiency_token"], one["weight_updates"])
    for one in run.of("team"):
        assert None not in (one["cooperation"], one["utilisation"], one["team_score"])
        assert one["completion"] == 1


def test_e12_e13_e14_e15_the_promised_files_are_left(run: Run) -> None:
    """E12, E13, E14, E15, by their specified names."""
    assert run.json("multi_model_training_simple_results.json")["iterations"] == len(MODES)
    newest = run.checkpoints()[-1]
    assert [path.name[:11] for path in run.checkpoints()] == ["checkpoint_"] * 2  # E20: older ones are gone
    inside = {str(path.relative_to(newest)) for path in newest.rglob("*") if path.is_file()}
    logs = {"logs/training_runner.log.gz", "logs/training.log.gz"}
    results = {"multi_model_training_simple_results.json.gz", "run_report.json.gz"}
    assert {"config.json", "performance_metrics.json"} | results | logs <= inside
    assert "run_ends" in (run.folder / "logs" / "training_runner.log").read_text()
    assert (run.folder / "logs" / "training.log").read_text().count(" iteration ") == len(MODES)
    assert {path.name for path in (run.folder / "visualization_outputs").glob("*.png")} == CHARTS
    assert not (run.folder / "tmp").exists()  # E17: made and removed by itself


def test_e21_a_package_adds_a_mode_a_metric_a_credit_rule_and_a_task(run: Run) -> None:
    from fedmoe.arena.tasks.conformance import check_task

    check_task(Letters())
    measured = run.of("metric", metric="letters_said")
    assert [one["iteration"] for one in measured] == list(range(len(MODES)))
    assert all(0 < float(str(one["value"])) <= 4 * Letters.max_action_tokens for one in measured)
    # The rule `generous` pays all alike, which none of our own does at a table of rivals.
    paid = {one["reward"] for one in run.of("policy", mode="neighbours")}
    assert len(paid) == 1


def test_e22_a_package_adds_a_lora_engine_and_a_folder_another_kind_of_model(run: Run) -> None:
    asked = (run.folder / "asked.txt").read_text().split("\n")
    assert {name.partition("@")[0] for name in asked} >= set(NAMES)
    assert {"one@0", "one@1", "one@2"} <= set(asked)  # E8: versions follow each other while it runs
    assert run.of("run")[0]["base_model"] == "llama"
    assert json.loads((run.folder / "llama" / "config.json").read_text())["model_type"] == "llama"
