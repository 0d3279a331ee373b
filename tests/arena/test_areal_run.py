"""AReaL as the learner of an arena run (E7), with a process that stands in for AReaL's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from letters import LettersTask

from fedmoe.areal.config import ArealError
from fedmoe.areal.run_learner import areal_config, areal_learner, check_environment
from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run.checkpoint import load_newest
from fedmoe.arena.run.options import RunError, RunOptions, Stop
from fedmoe.arena.run.run import METRICS, run_arena
from fedmoe.models.lora_layers import find_targets
from fedmoe.models.tiny import tiny_model
from fedmoe.runtime.records import read_records

STAND_IN = '''
import sys
if sys.argv[1] == "-c":
    sys.exit(0)  # "is AReaL there?"
import types
import numpy as np
from fedmoe.areal import process
from fedmoe.areal.statistics import ArealUpdate
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.formats import peft_files

SHAPES = [line.split() for line in open(MODULES).read().splitlines()]


class StandIn:
    """Adds the sum of rewards, times the learning rate, to every weight; its moments count the updates."""

    def __init__(self, config, version):
        self.version, self.steps, self.rate = version, 0, config.learning_rate
        modules = tuple(ModuleShape(name, int(inner), int(outer)) for name, inner, outer in SHAPES)
        self.now = Adapter.zeros(Layout(modules, config.rank), float(config.alpha))

    def adapter(self):
        return self.now

    def load(self, adapter, version):
        self.now, self.version, self.steps = adapter, version, 0

    def update(self, batch):
        flat = self.now.flat + np.float32(self.rate * (1 + abs(float(batch.rewards.sum()))))
        self.now = Adapter(self.now.layout, self.now.alpha, flat)
        self.version, self.steps = self.version + 1, self.steps + 1
        tokens = len(batch.behaviour)
        return ArealUpdate(
            self.version - 1, len(batch.rewards), tokens, 1, 0, loss=0.5, gradient_norm=1.0, learning_rate=self.rate,
            clip_fraction=0.0, importance_weight=1.0, masked_fraction=0.0, entropy=1.0, kl_k1=0.0, gap_mean=0.01,
            gap_max=0.02, moved=0.001,
        )

    def save(self, folder):
        for name, data in peft_files(self.now, "tiny").items():
            (folder / name).write_bytes(data)

    def score(self, sequences):
        return [np.zeros(length, np.float32) for length in sequences.token_lengths.tolist()]

    def state(self):
        moment = np.full(self.now.layout.size, self.steps, np.float32)
        return {"first_moment": moment, "second_moment": moment, "steps": np.array([self.steps], np.float32)}

    def restore(self, state):
        self.steps = int(state["steps"][0])

    def set_learning_rate(self, rate):
        self.rate = rate

    def close(self):
        pass


sys.modules["fedmoe.areal.actor"] = types.ModuleType("fedmoe.areal.actor")
sys.modules["fedmoe.areal.actor"].ArealActor = StandIn
sys.argv = ["process", *sys.argv[3:]]
process.main()
'''


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter in whose environment AReaL seems to be."""
    modules, program = tmp_path / "modules.txt", tmp_path / "python"
    shapes = sorted(find_targets(tiny_model(), "all-linear"))
    modules.write_text("\n".join(f"{name} {layer.in_features} {layer.out_features}" for name, layer in shapes))
    program.write_text(f"#!{sys.executable}\nMODULES = {str(modules)!r}\n{STAND_IN}")
    program.chmod(0o755)
    return program


def config(python: Path | None, iterations: int = 2) -> ArenaConfig:
    values = {"kind": "areal", "groups": 2, "samples": 4, "learning_rate": 0.001, "warmup_steps": 2, "adapt": False}
    return ArenaConfig.model_validate(
        {
            "base_model": "tiny",
            "phases": [{"mode": "independent", "iterations": iterations}],
            "policies": {"count": 1, "rank": 2, "alpha": 2.0},
            "learning": values | ({"python": str(python)} if python else {}),
            "evaluation": {"episodes": 2},
            "checkpoint": {"every": 1, "keep": 2},
        }
    )


def test_a_run_learns_by_areal_and_goes_on_from_its_checkpoint(
    python: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.arena.run.run.make_task", lambda name, options: LettersTask())
    learners, out = {"areal": areal_learner}, tmp_path / "run"
    options = RunOptions(out, rollout_device="cpu", learner_device="cpu", dtype="fp32")
    assert run_arena(config(python), options, Stop(), learners=learners).status == "finished"
    records = [record for record in read_records(out / METRICS) if record["kind"] == "policy"]
    assert [(record.get("loss"), record.get("gap"), record.get("kl")) for record in records] == [(0.5, 0.01, 0.001)] * 2
    saved = load_newest(out / "checkpoints")
    assert saved is not None
    moments = saved.state.arrays["policy_1/first_moment"]
    assert (moments == 2).all(), "two steps"
    longer = config(python, iterations=3)
    resumed = RunOptions(out, resume=True, rollout_device="cpu", learner_device="cpu", dtype="fp32")
    assert run_arena(longer, resumed, Stop(), learners=learners).status == "finished"
    after = load_newest(out / "checkpoints")
    assert after is not None
    assert (after.state.arrays["policy_1/first_moment"] == 3).all()
    (before,) = (adapter for key, adapter in saved.state.adapters.items() if key == "policy_1@2")
    (now,) = (adapter for key, adapter in after.state.adapters.items() if key == "policy_1@3")
    assert np.ptp(now.flat - before.flat) < 1e-6
    assert (now.flat - before.flat).min() >= 0.001 * 0.99


def test_a_kind_of_learner_that_nobody_offers_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="learner 'areal' is not known; there are: multilora"):
        run_arena(config(None), RunOptions(tmp_path / "run"), Stop())
    assert not (tmp_path / "run").exists()


def test_an_interpreter_without_areal_is_refused_with_the_way_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ArealError, match=r"no AReaL.*scripts/setup_areal\.sh \.venv-areal"):
        check_environment(None)
    with pytest.raises(ArealError, match="cannot be started"):
        check_environment(str(tmp_path / "no-python"))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"learning": {"loss": "clipped"}}, "computes the loss decoupled"),
        ({"policies": {"alpha": 2.5}}, "whole number"),
        ({"engine": {"kind": "vllm", "url": "http://x"}, "learning": {"temperature": 0.7}}, r"set temperature = 1\.0"),
    ],
)
def test_settings_that_areal_has_no_equal_of_are_refused(section: dict[str, object], words: str) -> None:
    with pytest.raises(ArealError, match=words):
        areal_config(ArenaConfig.model_validate({"base_model": "tiny", **section}))
