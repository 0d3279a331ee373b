"""The doors: sample data is made and marked, charts are drawn from the run that is there (A10, E15)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import forks
import pytest

from fedmoe.cli import arena_charts as arena_charts
from fedmoe.cli.arena_charts import choose_records, draw_charts, load_series, write_sample
from fedmoe.cli.output import CommandError
from fedmoe.monitor.arena_series import KINDS
from fedmoe.monitor.sample_records import sample_records
from fedmoe.runtime.records import RecordWriter, read_records

ROOT = Path(__file__).parents[2]
FILES = {
    *("training_trends_line_chart.png", "model_performance_bar_chart.png", "model_capability_radar_chart.png"),
    *("3d_performance_heatmap.png", "performance_scatter_plot.png", "comprehensive_dashboard.png"),
    "comprehensive_dashboard.html",
}


def door(name: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forks.run(str(ROOT / "demo" / name), *arguments, folder=folder)


def test_sample_data_then_charts(tmp_path: Path) -> None:
    """A10, E15."""
    made = door("generate_test_data.py", tmp_path, "--policies", "2", "--iterations", "6")
    assert (made.returncode, made.stderr) == (0, "")
    drawn = door("multi_model_visualization.py", tmp_path)
    assert (drawn.returncode, drawn.stderr) == (0, "")
    assert "runs/arena-sample/metrics.jsonl (SAMPLE DATA" in drawn.stdout
    assert {path.name for path in (tmp_path / "visualization_outputs").iterdir()} == FILES


def test_a_real_run_comes_before_sample_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match=r"neither .*generate_test_data\.py"):
        choose_records(None)
    write_sample(arena_charts.SAMPLE_RECORDS, 1, 2, 0)
    assert choose_records(None) == arena_charts.SAMPLE_RECORDS
    writer = RecordWriter(arena_charts.RUN_RECORDS[1])
    writer.write("policy", policy="a", iteration=0, reward=0.5, mode="cooperative")
    writer.close()
    assert choose_records(None) == arena_charts.RUN_RECORDS[1]
    assert not load_series(arena_charts.RUN_RECORDS[1]).facts.sample
    assert choose_records(arena_charts.SAMPLE_RECORDS) == arena_charts.SAMPLE_RECORDS
    with pytest.raises(CommandError, match="elsewhere is not there"):
        choose_records(Path("elsewhere"))


def test_the_records_of_a_real_run_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    writer = RecordWriter(path)
    writer.write("policy", policy="a", iteration=0)
    writer.close()
    before = path.read_bytes()
    with pytest.raises(CommandError, match="real run"):
        write_sample(path, 2, 3, 0)
    assert path.read_bytes() == before


def test_sample_data_replaces_sample_data(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert write_sample(path, 1, 2, 0) < write_sample(path, 3, 9, 0)
    assert len(list(read_records(path))) == len(sample_records(3, 9))


def test_nothing_to_draw_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"at": 1.0, "kind": "step"}\n')
    drawn = door("multi_model_visualization.py", tmp_path, "--records", "empty.jsonl")
    assert drawn.returncode == 1
    assert drawn.stderr.count("\n") == 1
    assert "no records of an arena run, got only records of kind step" in drawn.stderr


def test_charts_replace_older_ones_whole(tmp_path: Path) -> None:
    write_sample(tmp_path / "m.jsonl", 1, 2, 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "comprehensive_dashboard.png").write_bytes(b"old")
    written = list(draw_charts(load_series(tmp_path / "m.jsonl"), tmp_path / "out"))
    assert {path.name for path in written} == FILES
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    assert (tmp_path / "out" / "comprehensive_dashboard.png").read_bytes().startswith(b"\x89PNG")


def test_sample_records_have_every_kind_and_are_all_marked() -> None:
    records = sample_records(3, 25)
    assert {record["kind"] for record in records} == set(KINDS)
    assert all(record["sample"] is True for record in records)
    assert json.loads(json.dumps(records, allow_nan=False)) == records
    times = [float(str(record["at"])) for record in records]
    assert times == sorted(times)


def test_equal_seeds_give_equal_records_and_others_give_others() -> None:
    assert sample_records(2, 5, seed=1) == sample_records(2, 5, seed=1)
    assert sample_records(2, 5, seed=1) != sample_records(2, 5, seed=2)


@pytest.mark.parametrize(("policies", "iterations"), [(0, 5), (9, 5), (2, 0)])
def test_sizes_that_make_no_run_are_refused(policies: int, iterations: int) -> None:
    with pytest.raises(ValueError, match=f"got {policies} and {iterations}"):
        sample_records(policies, iterations)
