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
from dataclasses import dataclass
from pathlib import Path

import arena_plug_in
import numpy as np
import pytest
from arena_plug_in import Letters

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.learning.adapt import AdaptRules
from fedmoe.arena.learning.config import LearningConfig
from fedmoe.arena.learning.learner import Learner, PolicyUpdate
from fedmoe.arena.learning.policies import Policies
from fedmoe.arena.modes import competitive, cooperative, team_battle
from fedmoe.arena.rollout.episodes import Example, PlayedTurn, Player
from fedmoe.arena.run.options import RunOptions, Stop
from fedmoe.arena.run.run import run_arena
from fedmoe.inference.engine import SampleRequest
from fedmoe.inference.transformers_engine import TransformersEngine
from fedmoe.lora.adapter import initial_adapter
from fedmoe.models.base import load_base
from fedmoe.models.multilora import MultiLora
from fedmoe.runtime import placement as placement
from fedmoe.runtime.placement import Mount, PlacementError
from fedmoe.runtime.records import Record, RecordValue, read_records

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

    def of(self, kind: str, **wanted: RecordValue) -> list[Record]:
        """The records of a kind with these values."""
        return [one for one in self.records if one["kind"] == kind and wanted.items() <= one.items()]

    def checkpoints(self) -> list[Path]:
        return sorted((self.folder / "checkpoints").iterdir())

    def json(self, *names: str) -> dict[str, object]:
        read: dict[str, object] = json.loads(self.folder.joinpath(*names).read_text())
        return read


def number(value: RecordValue) -> float:
    """A value that must be a number."""
    assert isinstance(value, int | float)
    return value


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
    command = "nohup ./demo/start_training.sh run.toml --dtype fp32 > training.log 2>&1 & wait $!"
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
        (["my.toml", "--out=runs/mine"], ["my.toml", "--out=runs/mine", "--resume"]),
    ],
)
def test_a9_the_training_server_is_the_command_and_goes_on_where_it_stopped(
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
    assert min(number(count) for count in updates.values()) >= 2
    results = run.json("multi_model_training_simple_results.json")["policies"]
    assert isinstance(results, dict)
    hashes = [digest for one in results.values() for digest in one["adapters"].values()]
    assert len(set(hashes)) == len(hashes) >= len(NAMES)


def test_e2_e3_e4_e5_every_mode_is_played_and_pays_in_its_own_way(run: Run) -> None:
    played = [str(run.of("team", iteration=iteration)[0]["mode"]) for iteration, _ in enumerate(MODES)]
    assert played == ["cooperative", "competitive", "team_battle", "mixed: cooperative", "neighbours"]

    for mode, weights in {"cooperative": cooperative, "competitive": competitive, "team_battle": team_battle}.items():
        records = {one["policy"]: one for one in run.of("policy", mode=mode)}
        for credit in run.of("credit", iteration=MODES.index(mode)):
            parts = [(weight, credit[part]) for part, weight in weights.WEIGHTS.parts().items() if weight]
            earned = sum(number(weight) * number(value) for weight, value in parts)
            record = records[credit["policy"]]
            lost = 0.5 * (1 - number(record["valid"])) + 0.5 * (1 - number(record["ended"]))
            assert number(record["reward"]) == pytest.approx(earned - lost, abs=1e-9)
    # One team has nobody to be ahead of; teams are rated, and choose how they work and who speaks first.
    assert {one["versus"] for one in run.of("credit", iteration=0)} == {None}
    assert all(number(one["games"]) > 0 for one in run.of("rating", iteration=1))
    choices = run.of("decision", what="strategy", iteration=2)
    assert {str(one["policy"]).count("+") for one in choices} == {1}
    assert len(choices) == 4
    assert {str(one["after"]).partition(",")[0] for one in choices} <= {"plain", "aloud"}


def test_e9_e10_e11_every_metric_is_measured(run: Run) -> None:
    """E9, E10, E11: fields are those of docs/metrics.md; only what this machine or task lacks is empty."""
    system = run.of("system")[-1]
    assert min(number(system[name]) for name in ("memory_percent", "process_bytes", "disk_free_bytes")) > 0
    assert {"cpu_percent", "gpu_percent", "gpu_memory_bytes", "disk_percent", "memory_limit_bytes"} <= set(system)
    for one in run.of("policy", mode="cooperative"):
        assert 0 <= number(one["accuracy"]) <= 1
        assert None not in (one["reward"], one["efficiency_second"], one["efficiency_token"], one["weight_updates"])
    for one in run.of("team"):
        assert None not in (one["utilisation"], one["team_score"])
        assert one["completion"] == 1
        # Who is alone cannot be missed by a team.
        assert (one["cooperation"] is None) == (one["mode"] in ("competitive", "neighbours"))


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
    assert all(0 < number(one["value"]) <= 4 * Letters.max_action_tokens for one in measured)
    # The rule `generous` pays all alike, which none of our own does at a table of rivals.
    paid = {one["reward"] for one in run.of("policy", mode="neighbours")}
    assert len(paid) == 1


def test_e22_a_package_adds_a_lora_engine_and_a_folder_another_kind_of_model(run: Run) -> None:
    asked = (run.folder / "asked.txt").read_text().split("\n")
    assert {name.partition("@")[0] for name in asked} >= set(NAMES)
    assert {"one@0", "one@1", "one@2"} <= set(asked)  # E8: versions follow each other while it runs
    assert run.of("run")[0]["base_model"] == "llama"
    assert json.loads((run.folder / "llama" / "config.json").read_text())["model_type"] == "llama"


def make_policies(rules: AdaptRules, *names: str) -> Policies:
    base = load_base("tiny", "cpu", "fp32")
    multi = MultiLora(base.model)
    learner = Learner(base, multi, LearningConfig(learning_rate=1e-3, warmup_steps=0))
    policies = Policies(learner, TransformersEngine(base, multi), 1, rules)
    for seed, name in enumerate(names):
        policies.add(name, initial_adapter(learner.layout(2), 4.0, seed))
    return policies


PROMPT = tuple(b"Say letters.")


def learn_once(policies: Policies, name: str) -> dict[str, PolicyUpdate]:
    """Four answers of the newest version, every second one rewarded."""
    key = policies.key(name)
    found = policies.engine.sample([SampleRequest(key, PROMPT, 4, 1.0, seed) for seed in range(4)])
    turns = [PlayedTurn(0, Player(name, key, True), PROMPT, one.tokens, "", one.logprobs, one.stopped) for one in found]
    return policies.learner.update([Example(name, turn, (-1.0) ** i, 0.0) for i, turn in enumerate(turns)], 4)


def test_e8_new_weights_are_served_beside_the_old_ones_and_lora_parameters_adapt() -> None:
    """A reward that stands still, with rate and scale at their limits: the rank grows, live in the engine."""
    rules = AdaptRules(max_rate=1e-3, max_scale=2.0, max_rank=4, patience=1, cooldown=0)
    policies = make_policies(rules, "one")
    first, engine = policies.key("one"), policies.engine
    before = engine.score(first, PROMPT, PROMPT)
    changes = [policies.learned(learn_once(policies, "one"), {"one": 0.5}, {"one": 0})["one"] for _ in range(2)]
    newest = policies.key("one")
    assert (first.version, newest.version) == (0, 2)
    assert [(one.what, one.before, one.after) for made in changes for one in made] == [("rank", 2, 4)]
    assert policies.adapter("one").rank == 4
    served = engine.score(newest, PROMPT, PROMPT)
    np.testing.assert_allclose(served, policies.learner.score("one", PROMPT, PROMPT), atol=1e-5)
    assert np.abs(served - before).max() > 1e-3
    np.testing.assert_array_equal(engine.score(first, PROMPT, PROMPT), before)
    policies.let_go([])
    assert engine.loaded() == {newest}


def test_e17_a_run_never_begins_on_nas(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "read_mounts", lambda: [Mount("/", "nfs4", "server:/share")])
    with pytest.raises(PlacementError, match="network file system nfs4"):
        run_arena(ArenaConfig(base_model="tiny"), RunOptions(tmp_path / "run"), Stop())
    assert list(tmp_path.iterdir()) == []
