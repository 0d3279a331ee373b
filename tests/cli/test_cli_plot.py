"""`fedmoe plot` from folders of runs to files."""

from __future__ import annotations

import asyncio
import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command import Outcome
from live import House
from state_fixture import EXPECTED, unpacked
from support import make_body, make_push

from fedmoe.monitor.sample_records import sample_records
from fedmoe.runtime.records import RecordWriter
from fedmoe.server.storage.records import Statistic
from fedmoe.wire.contract.messages import HELD_OUT

Run = Callable[..., Outcome]


def write_sample(folder: Path) -> Path:
    folder.mkdir(parents=True)
    lines = [json.dumps(record) + "\n" for record in sample_records(2, 6)]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_an_arena_run_becomes_a_figure(fedmoe: Run, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run, file = write_sample(tmp_path / "run"), tmp_path / "figures" / "fig.SVG"
    said = fedmoe("plot", str(run), "-o", str(file))
    assert (said.status, said.out) == (0, f"drew {file}: 8 curves of 1 run(s)\n"), said.err
    assert "SAMPLE DATA" in file.read_text()


def test_a_running_federation_is_read_from_its_journal(house: House, fedmoe: Run, tmp_path: Path) -> None:
    """The coordinator goes on meanwhile, and its experts go by their present names."""
    with house.client() as api:
        assert api.post("/rename_expert", json={"expert": "python", "name": "code"}).status_code == 200
    for loss in (3.5, 2.5):
        values = {"step": 1.0, "loss": loss, "first": 3.5, "best": loss, "tokens": 10.0}
        house.journal.add_statistic(Statistic("python", "w1", HELD_OUT, values, 2e9))
    table = tmp_path / "table.csv"
    said = json.loads(fedmoe("plot", str(tmp_path / "house"), "-o", str(table), "--json").out)
    assert (said["kind"], said["sample"]) == ("federation", False)
    assert {(c["measure"], c["series"]): c["points"] for c in said["curves"]} == {
        ("held_out_loss", "code, w1"): 2,
        ("training_loss", "code, w1"): 2,
        ("training_loss", "code, w2"): 1,
    }
    with table.open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["measure"] == "held_out_loss"]
    assert [row["value"] for row in rows] == ["3.5", "2.5"]
    asyncio.run(house.service.intake.push(*make_push(make_body(9), 3, 9)))


def test_a_journal_of_an_earlier_schema_is_read(fedmoe: Run, tmp_path: Path) -> None:
    for name in EXPECTED:
        state = unpacked(tmp_path, name)
        said = fedmoe("plot", str(state), "-o", str(tmp_path / "table.csv"))
        assert said.status == 0 or "nothing to draw yet" in said.err


def test_a_demonstration_under_way_is_read_from_its_workers(fedmoe: Run, tmp_path: Path) -> None:
    for worker in ("w1", "w2"):
        writer = RecordWriter(tmp_path / "demo" / "workers" / worker / "metrics.jsonl")
        writer.write("step", worker=worker, expert=f"{worker}_expert", step=1, loss=2.0)
        writer.close()
    said = json.loads(fedmoe("plot", str(tmp_path / "demo"), "-o", str(tmp_path / "t.csv"), "--json").out)
    assert [curve["series"] for curve in said["curves"]] == ["w1_expert", "w2_expert"]


def test_runs_of_the_same_name_are_told_apart_by_their_folders(fedmoe: Run, tmp_path: Path) -> None:
    runs = [write_sample(tmp_path / name / "run") for name in ("a", "b")]
    said = json.loads(fedmoe("plot", *map(str, runs), "-o", str(tmp_path / "t.csv"), "--json").out)
    assert {curve["run"] for curve in said["curves"]} == {"a/run", "b/run"}


def test_what_cannot_be_drawn_is_an_error_and_writes_nothing(
    fedmoe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, empty, file = write_sample(tmp_path / "run"), tmp_path / "empty", tmp_path / "fig.svg"
    empty.mkdir()
    worker = tmp_path / "worker"
    (worker).mkdir()
    (worker / "metrics.jsonl").write_text('{"at": 1, "kind": "step", "worker": "w", "expert": "e", "loss": 1.5}\n')
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").write_text("")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "journal.sqlite").write_text("no database")
    cases = {
        "use one of .csv, .pdf, .png, .svg": [str(run), "-o", str(tmp_path / "fig.gif")],
        "neither metrics.jsonl": [str(empty), "-o", str(file)],
        "no such folder": [str(tmp_path / "nothing"), "-o", str(file)],
        "nothing to draw yet": [str(tmp_path / "begun"), "-o", str(file)],
        "cannot be opened": [str(tmp_path / "damaged"), "-o", str(file)],
        "do not share an axis": [str(run), str(worker), "-o", str(file)],
        "is named twice": [str(run), str(run), "-o", str(file)],
    }
    for message, arguments in cases.items():
        said = fedmoe("plot", *arguments)
        assert said.status != 0
        assert message in said.err
        assert said.err.count("\n") == 1
    for name in [name for name in sys.modules if name.startswith(("matplotlib", "fedmoe.monitor.charts"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = fedmoe("plot", str(run), "-o", str(file))
    assert "pip install 'fedmoe[charts]'" in said.err
    assert not file.exists()
    assert fedmoe("plot", str(run), "-o", str(tmp_path / "t.csv")).status == 0
