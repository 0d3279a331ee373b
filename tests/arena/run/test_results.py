"""The result files (E12), from the records of a run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from fedmoe.arena.run.checkpoint import config_digest
from fedmoe.arena.run.results import (
    REPORT,
    RESULTS,
    RunOutcome,
    RunRecords,
    build_metrics,
    build_report,
    build_results,
    sort_records,
    write_json,
)
from fedmoe.monitor.sample_records import sample_records
from fedmoe.runtime import machine as environment_module
from fedmoe.runtime.machine import environment, processor_name
from fedmoe.runtime.records import Record, RecordValue, RecordWriter, read_records

RUN: Record = {
    "kind": "run",
    "task": "reasoning:chain_sum",
    "mode": "mixed",
    "seed": 7,
    "policies": "solver,critic",
    "base_model": "smollm2",
    "sample": False,
}


def policy(iteration: int, name: str, **values: RecordValue) -> Record:
    record: dict[str, RecordValue] = {"kind": "policy", "iteration": iteration, "mode": "cooperative", "policy": name}
    return record | values


def evaluation(iteration: int, name: str, **values: RecordValue) -> Record:
    record: dict[str, RecordValue] = {
        "kind": "evaluation",
        "iteration": iteration,
        "mode": "cooperative",
        "policy": name,
    }
    return record | values


def timing(iteration: int, seconds: float, tokens: int) -> Record:
    return {
        "kind": "timing",
        "iteration": iteration,
        "rollout_seconds": seconds / 2,
        "learn_seconds": seconds / 4,
        "iteration_seconds": seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / seconds,
    }


def report(found: RunRecords, ending: RunOutcome | None = None) -> dict[str, object]:
    return build_report(
        found,
        config={"task": "t", "seed": 7},
        environment={"python": "3.11"},
        started=1_769_860_800.0,
        ended=1_769_860_890.5,
        ending=ending or RunOutcome("finished"),
        checkpoints=["checkpoint_20260131_120000"],
        resumed_from=None,
    )


def test_a_policys_scores_have_their_intervals_and_the_gain_between_first_and_last_e12() -> None:
    found = sort_records(
        [
            RUN,
            evaluation(0, "solver", score=0.25, low=0.2, high=0.31, base_score=0.24, base_low=0.2, base_high=0.3),
            evaluation(5, "solver", score=0.3, low=0.25, high=0.36, base_score=0.24, base_low=0.2, base_high=0.3),
            evaluation(9, "solver", score=0.5, low=0.44, high=0.56, base_score=0.24, base_low=0.2, base_high=0.3),
        ]
    )
    policies = build_results(found, {}, [])["policies"]
    assert isinstance(policies, dict)
    held_out = policies["solver"]["held_out"]
    assert (held_out["initial"]["iteration"], held_out["initial"]["score"]) == (0, 0.25)
    assert held_out["final"] == {
        "iteration": 9,
        "mode": "cooperative",
        "score": 0.5,
        "low": 0.44,
        "high": 0.56,
        "episodes": None,
        "questions": None,
    }
    assert held_out["base_model"] == {"base_score": 0.24, "base_low": 0.2, "base_high": 0.3}
    assert held_out["gain"] == 0.25
    assert [row["score"] for row in held_out["over_time"]] == [0.25, 0.3, 0.5]


def test_the_newest_result_against_each_opponent_counts_also_one_never_beaten() -> None:
    found = sort_records(
        [
            evaluation(0, "solver", opponent="base", win_rate=0.5, win_low=0.4, win_high=0.6, episodes=100),
            evaluation(9, "solver", opponent="base", win_rate=0.7, win_low=0.6, win_high=0.8, episodes=100),
            evaluation(9, "solver", opponent="champion", win_rate=0.0, win_low=0.0, win_high=0.1, episodes=100),
        ]
    )
    policies = build_results(found, {}, [])["policies"]
    assert isinstance(policies, dict)
    assert [(row["opponent"], row["win_rate"]) for row in policies["solver"]["against"]] == [
        ("base", 0.7),
        ("champion", 0.0),
    ]
    assert policies["solver"]["held_out"] is None


def test_curves_updates_versions_hashes_rating_lineage_and_cooperation_are_in_the_results_e12() -> None:
    found = sort_records(
        [
            RUN,
            policy(0, "solver", reward=0.1, accuracy=0.2, tokens=100, episodes=4, turns=8, version=1, weight_updates=1),
            policy(1, "solver", reward=0.3, accuracy=0.4, tokens=80, episodes=4, turns=8, version=2, weight_updates=2),
            {"kind": "rating", "iteration": 0, "policy": "solver", "mu": 25.0, "sigma": 8.0, "games": 1},
            {"kind": "rating", "iteration": 1, "policy": "solver", "mu": 27.0, "sigma": 7.0, "games": 9},
            {"kind": "credit", "iteration": 1, "policy": "solver", "shared": 0.5, "difference": 0.1},
            {"kind": "team", "iteration": 0, "mode": "cooperative", "cooperation": 0.2, "team_score": 0.4},
            {"kind": "decision", "iteration": 1, "policy": "", "what": "mode", "before": "a", "after": "b"},
        ]
    )
    hashes = {"solver@2": "ab" * 32, "critic@0": "cd" * 32, "solver2@9": "ef" * 32}
    lineage = [{"child": ["critic", 3], "parent": ["solver", 2]}]
    results = build_results(found, hashes, lineage)
    policies = results["policies"]
    assert isinstance(policies, dict)
    assert list(policies) == ["solver", "critic"]
    solver = policies["solver"]
    assert (solver["version"], solver["weight_updates"], solver["adapters"]) == (2, 2, {"solver@2": "ab" * 32})
    assert solver["rating"] == {"mu": 27.0, "sigma": 7.0, "games": 9}
    assert solver["credit"]["difference"] == 0.1
    assert solver["totals"] == {"episodes": 8, "turns": 16, "tokens": 180}
    assert solver["over_time"] == {
        "iteration": [0, 1],
        "mode": ["cooperative"] * 2,
        "reward": [0.1, 0.3],
        "accuracy": [0.2, 0.4],
    }
    assert policies["critic"]["adapters"] == {"critic@0": "cd" * 32}
    assert (policies["critic"]["rating"], policies["critic"]["version"]) == (None, None)
    assert results["cooperation"] == {
        "iteration": [0],
        "mode": ["cooperative"],
        "cooperation": [0.2],
        "team_score": [0.4],
    }
    assert results["decisions"] == [{"iteration": 1, "policy": "", "what": "mode", "before": "a", "after": "b"}]
    assert results["lineage"] == lineage
    assert (results["task"], results["base_model"], results["seed"]) == ("reasoning:chain_sum", "smollm2", 7)


def test_the_modes_a_run_went_through_are_stretches_of_iterations() -> None:
    modes = ["cooperative", "cooperative", "competitive", "cooperative"]
    records: list[Record] = [
        {"kind": "policy", "iteration": n, "mode": mode, "policy": name}
        for n, mode in enumerate(modes)
        for name in ("a", "b")
    ]
    assert build_results(sort_records(records), {}, [])["modes_run"] == [
        {"mode": "cooperative", "first": 0, "last": 1},
        {"mode": "competitive", "first": 2, "last": 2},
        {"mode": "cooperative", "first": 3, "last": 3},
    ]
    assert len(sort_records(records).steps) == 4


def test_a_repeated_iteration_counts_once_and_one_of_another_mode_for_itself() -> None:
    found = sort_records(
        [
            policy(0, "solver", tokens=10, reward=0.1),
            policy(0, "solver", tokens=20, reward=0.2),
            {**policy(0, "solver", tokens=5, reward=0.3), "mode": "competitive"},
        ]
    )
    assert found.policies["solver"].total("tokens") == 25
    assert len(found.steps) == 2


def test_the_report_says_when_on_what_how_much_how_fast_and_how_it_ended_e12() -> None:
    found = sort_records(
        [
            RUN,
            policy(0, "solver", tokens=100, episodes=4, weight_updates=1),
            policy(1, "solver", tokens=200, episodes=4, weight_updates=2),
            timing(0, 2.0, 100),
            timing(1, 4.0, 200),
            {"kind": "system", "process_bytes": 5, "cpu_percent": 10.0, "gpu_percent": None, "disk_free_bytes": 9},
            {"kind": "system", "process_bytes": 9, "cpu_percent": 4.0, "gpu_percent": None, "disk_free_bytes": 7},
        ]
    )
    built = report(found, RunOutcome("stopped", "asked to by a signal"))
    assert (built["status"], built["reason"]) == ("stopped", "asked to by a signal")
    assert (built["started"], built["ended"]) == ("2026-01-31T12:00:00+00:00", "2026-01-31T12:01:30+00:00")
    assert (built["seconds"], built["seed"]) == (90.5, 7)
    assert built["config_digest"] == config_digest({"seed": 7, "task": "t"})
    assert built["environment"] == {"python": "3.11"}
    assert built["work"] == {
        "iterations": 2,
        "episodes": 8,
        "skipped_episodes": 0,
        "weight_updates": 2,
        "rollout_seconds": 3.0,
        "learn_seconds": 1.5,
        "iteration_seconds": 6.0,
        "tokens": 300,
        "tokens_per_second": 50.0,
    }
    assert built["peaks"] == {"process_bytes": 9, "cpu_percent": 10.0, "disk_free_bytes": 7}
    assert built["checkpoints"] == ["checkpoint_20260131_120000"]


def test_a_run_that_still_goes_on_has_no_end() -> None:
    built = report(sort_records([RUN]), RunOutcome("running"))
    assert (built["status"], built["ended"]) == ("running", None)


def test_nothing_recorded_is_no_error_and_no_invented_number() -> None:
    found = sort_records([])
    assert build_results(found, {}, [])["policies"] == {}
    assert build_metrics(found)["iteration"] is None
    work = report(found)["work"]
    assert isinstance(work, dict)
    assert work["tokens_per_second"] is None


def test_the_metrics_of_a_checkpoint_are_the_newest_of_everything_e13() -> None:
    found = sort_records(
        [
            policy(0, "solver", reward=0.1, loss=2.0),
            policy(3, "solver", reward=0.4, loss=1.0),
            evaluation(3, "solver", score=0.5, low=0.4, high=0.6),
            {"kind": "rating", "iteration": 3, "policy": "solver", "mu": 26.0, "sigma": 7.0, "games": 3},
            {"kind": "team", "iteration": 3, "mode": "cooperative", "cooperation": 0.25},
            timing(3, 2.0, 50),
            {"kind": "system", "at": 5.0, "process_bytes": 5},
        ]
    )
    metrics = build_metrics(found)
    policies, team, timings = metrics["policies"], metrics["team"], metrics["timing"]
    assert isinstance(policies, dict)
    assert isinstance(team, dict)
    assert isinstance(timings, dict)
    assert (metrics["iteration"], metrics["mode"]) == (3, "cooperative")
    solver = policies["solver"]
    assert (solver["reward"], solver["loss"], solver["rating"]["mu"], solver["held_out"]["score"]) == (0.4, 1, 26, 0.5)
    assert (team["cooperation"], timings["tokens_per_second"]) == (0.25, 25.0)
    assert metrics["system"] == {"process_bytes": 5}


def test_a_whole_run_goes_through_the_file_into_json(tmp_path: Path) -> None:
    writer = RecordWriter(tmp_path / "metrics.jsonl")
    made = sample_records(policies=3, iterations=24, seed=1)
    writer.write_many(made)
    writer.close()
    found = sort_records(read_records(tmp_path / "metrics.jsonl"))
    write_json(tmp_path / RESULTS, build_results(found, {}, []))
    write_json(tmp_path / REPORT, report(found))
    results = json.loads((tmp_path / "multi_model_training_simple_results.json").read_text())
    assert (results["sample"], results["iterations"], len(results["policies"])) == (True, 24, 3)
    for values in results["policies"].values():
        assert len(values["over_time"]["reward"]) == 24
        assert values["held_out"]["final"]["low"] <= values["held_out"]["final"]["score"]
    work = json.loads((tmp_path / "run_report.json").read_text())["work"]
    assert work["tokens"] == sum(int(str(record["tokens"])) for record in made if record["kind"] == "timing")


def test_a_result_file_is_whole_or_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / RESULTS, {"done": 1})

    def full(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(tmp_path / RESULTS, {"done": 2})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / RESULTS, {"done": math.nan})
    assert json.loads((tmp_path / RESULTS).read_text()) == {"done": 1}
    assert [file.name for file in tmp_path.iterdir()] == [RESULTS]


def test_the_environment_names_versions_and_hardware_but_no_machine_and_no_person(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(environment_module, "_gpus", lambda: [{"name": "GPU", "memory_bytes": 8}])
    found = environment()
    packages = found["packages"]
    assert isinstance(packages, dict)
    assert {"numpy", "safetensors"} <= packages.keys()
    assert int(str(found["cores"])) >= 1
    text = json.dumps(found)
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text


def test_the_processor_is_named_or_else_its_architecture() -> None:
    assert processor_name("processor : 0\nmodel name\t: Fast CPU 9000\nflags: a b\n") == "Fast CPU 9000"
    assert processor_name("") != ""


def test_the_best_policy_has_a_name_only_where_it_is_apart() -> None:
    leader: Record = {"kind": "leader", "policy": "a", "rival": "b", "lead": 0.1, "lead_low": 0.02, "questions": 60}
    best = build_results(sort_records([{**leader, "apart": True}]), {}, [])["best"]
    assert isinstance(best, dict)
    assert (best["policy"], best["rival"], best["lead_low"]) == ("a", "b", 0.02)
    best = build_results(sort_records([{**leader, "apart": False}]), {}, [])["best"]
    assert isinstance(best, dict)
    assert (best["policy"], best["apart"]) == (None, False)
    assert build_results(sort_records([]), {}, [])["best"] is None


def test_the_report_warns_of_skipped_episodes_and_few_questions() -> None:
    skipped: Record = {"kind": "skipped", "where": "training", "episodes": 3, "reason": "a bug"}
    records = [skipped, {**skipped, "iteration": 1}, evaluation(0, "solver", score=0.5, questions=18)]
    report = build_report(
        sort_records(records),
        config={},
        environment={},
        started=0.0,
        ended=1.0,
        ending=RunOutcome("finished"),
        checkpoints=[],
        resumed_from=None,
    )
    warnings, work = report["warnings"], report["work"]
    assert isinstance(warnings, list)
    assert isinstance(work, dict)
    first, second = warnings
    assert first == "6 episodes of training failed and were left out, the last by a bug"
    assert "over 18 different questions only" in second
    assert work["skipped_episodes"] == 6
