"""`fedmoe simulate` from a file to a report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from command import Outcome

Run = Callable[..., Outcome]
RECORDED = """
seconds = 60.0
[work]
kind = "recorded"
parameters = 256
[fleet]
workers = 20
slowness = [1, 1, 2, 4, 8]
[[schemes]]
name = "every ten seconds"
kind = "asynchronous"
[[schemes]]
name = "in rounds"
kind = "rounds"
local_steps = 5
"""
TRAINED = """
seconds = 25.0
[work]
kind = "training"
evaluate_every = 10.0
texts = 8
held_out_texts = 4
rank = 1
[fleet]
workers = 2
[report]
robustness = ["asynchronous"]
"""


def test_a_simulation_of_recorded_deltas(fedmoe: Run, tmp_path: Path) -> None:
    config = tmp_path / "simulation.toml"
    config.write_text(RECORDED)
    outcomes = [fedmoe("simulate", str(config), "--out", str(tmp_path / name)) for name in ("first", "second")]
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].err
    assert "every ten seconds" in outcomes[0].out
    assert "nothing was trained" in outcomes[0].out
    first, second = ((tmp_path / name / "report.json").read_bytes() for name in ("first", "second"))
    assert first == second
    report = json.loads(first)
    assert [scheme["name"] for scheme in report["schemes"]] == ["every ten seconds", "in rounds"]
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["report.json", "report.md"]


def test_a_simulation_that_trains_leaves_a_recording_for_one_that_does_not(fedmoe: Run, tmp_path: Path) -> None:
    config, out = tmp_path / "simulation.toml", tmp_path / "out"
    config.write_text(TRAINED)
    done = fedmoe("simulate", str(config), "--out", str(out))
    assert done.status == 0, done.err
    assert "Cost to Target" in done.out
    assert sorted(path.name for path in out.iterdir()) == [
        *("deltas.safetensors", "report.json", "report.md", "report.png")
    ]
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")
    config.write_text(f'seconds = 60.0\n[work]\nkind = "recorded"\nrecording = "{out / "deltas.safetensors"}"\n')
    done = fedmoe("simulate", str(config), "--out", str(tmp_path / "replayed"))
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "replayed" / "report.json").read_text())
    assert report["parameters"] == 2048
    assert report["schemes"][0]["updates"]["accepted"] > 400


def test_a_misspelt_key_is_an_error(fedmoe: Run, tmp_path: Path) -> None:
    config = tmp_path / "simulation.toml"
    config.write_text("[fleet]\nworkres = 3\n")
    done = fedmoe("simulate", str(config), "--out", str(tmp_path / "out"))
    assert (done.status, done.out) == (1, "")
    assert done.err.strip() == f"error: {config}: fleet.workres: there is no such key; did you mean workers?"
    assert not (tmp_path / "out").exists()
