"""`fedmoe arena`: the plan, a whole run with its charts, errors in one line, and the doors in demo/ (A9, E15)."""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import ROOT, Outcome, run_script
from structlog.testing import capture_logs

from fedmoe.runtime.files import lock_folder
from fedmoe.runtime.records import read_records

Run = Callable[..., Outcome]
TINY = """
base_model = "tiny"
task = { name = "committee:chain_sum", options = { examples = 0, min_terms = 2, max_terms = 2, max_digits = 2 } }
policies = { count = 4, rank = 2 }
learning = { groups = 2, samples = 2, learning_rate = 0.01 }
evaluation = { episodes = 4 }
"""
PHASES = """
[[phases]]
mode = "competitive"
iterations = 1
[[phases]]
mode = "team_battle"
iterations = 2
"""
CHARTS = (
    *("training_trends_line_chart", "model_performance_bar_chart", "model_capability_radar_chart"),
    *("3d_performance_heatmap", "performance_scatter_plot", "comprehensive_dashboard"),
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.toml"
    file.write_text(TINY + PHASES)
    return file


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs inside this process leave its signals, logs and environment alone."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr("fedmoe.cli.arena.configure", lambda: None)
    monkeypatch.setattr("fedmoe.runtime.stop_signals.StopOnSignal.install", lambda self: None)
    with capture_logs():
        yield


def assert_one_line(outcome: Outcome, *words: str) -> None:
    assert outcome.status != 0
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_check_prints_the_plan_of_the_demo(fedmoe: Run) -> None:
    from fedmoe.arena.config import read_config

    file = ROOT / "demo" / "arena.toml"
    config = read_config(file)
    outcome = fedmoe("arena", "check", str(file))
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == f"task       {config.task.name}, 1 to 16 seats"
    assert lines[1] == f"policies   {', '.join(config.policies.all_names)} (rank {config.policies.rank}) over smollm2"
    phases = [line for line in lines if line.startswith("phase ")]
    assert phases == [f"phase      {phase.mode}: {phase.iterations} iterations" for phase in config.phases]
    assert {phase.mode for phase in config.phases} == {"competitive", "cooperative", "team_battle", "mixed"}
    assert lines[-1] == "engine     transformers"


def test_check_as_json_has_the_configuration_that_a_run_would_have(fedmoe: Run, config: Path) -> None:
    said = json.loads(fedmoe("arena", "check", str(config), "--json").out)
    assert said.keys() == {"task", "seats", "base_model", "policies", "phases", "learning", "engine"}
    assert (said["task"], said["policies"]["count"]) == ("committee:chain_sum", 4)
    assert [phase["mode"] for phase in said["phases"]] == ["competitive", "team_battle"]


def test_check_says_how_many_actors_there_would_be(fedmoe: Run, config: Path) -> None:
    config.write_text(config.read_text() + "[engine]\nactors = 4\ngpus_per_actor = 0.5\n")
    outcome = fedmoe("arena", "check", str(config))
    assert outcome.out.splitlines()[-1] == "engine     transformers in 4 Ray actors with 0.5 GPUs each"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed = 1", ["speed", "there is no such key"]),
        ("learning = { rate = 1 }", ["learning.rate", "there is no such key"]),
        ("learning = { samples = 1 }", ["learning.samples", "greater than or equal to 2"]),
        ("learning = { loss = 'ppo' }", ["learning.loss", "decoupled", "'ppo'"]),
        ("policies = { count = 2, names = ['a', 'a'] }", ["policies", "count is 2", "different names"]),
        ("policies = { count = 2, names = ['a', 'b', 'b'] }", ["policies", "count is 2", "different names"]),
        ("policies = { count = 2, names = ['base', 'b'] }", ["policies", "base"]),
        ("policies = { rank = 8, max_rank = 4 }", ["policies", "max_rank 4 is below rank 8"]),
        ("[engine]\ngpus_per_actor = 1", ["engine", "gpus_per_actor is for Ray actors; set actors too"]),
        ("[engine]\nactors = 2\ngpus_per_actor = 1.5", ["engine", "gpus_per_actor is a share of one GPU", "got 1.5"]),
        (
            "[engine]\nactors = 2\nkind = 'vllm'\nurl = 'http://x'",
            ["engine", "each actor starts a vLLM server of its own"],
        ),
        ("phases = []", ["phases", "at least one phase"]),
        ("phases = [{ mode = 'solo', iterations = 1 }]", ["mode 'solo' is not known", "cooperative", "mixed"]),
        ("task = { name = 'chess:gcd' }", ["task kind 'chess' is not known", "committee"]),
        ("task = { name = 'committee:nothing' }", ["no data set 'nothing'", "chain_sum"]),
        ("task = { name = 'committee:gcd', options = { terms = 2 } }", ["gcd has no option 'terms'", "min_numbers"]),
        ("policies = { count = 3 }", ["mixed", "team_battle mode needs an even number", "got 3"]),
        ("speed =", ["is not TOML"]),
        ("chat_template = 'nowhere.jinja'", ["nowhere.jinja cannot be read"]),
        ("[chat_template_kwargs]\nmessages = 'x'", ["cannot set 'messages'"]),
    ],
)
def test_a_configuration_that_cannot_be_is_told_in_one_line(
    text: str, words: list[str], fedmoe: Run, tmp_path: Path
) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    outcome = fedmoe("arena", "check", str(file))
    wanted = [word for word in words if word != "mixed"]
    assert_one_line(outcome, *wanted)


def test_a_configuration_that_is_not_there_is_told_in_one_line(fedmoe: Run, tmp_path: Path) -> None:
    for command in ("check", "train"):
        assert_one_line(
            fedmoe("arena", command, str(tmp_path / "none.toml")), "none.toml cannot be read", "No such file"
        )


def test_options_that_contradict_each_other_are_refused(fedmoe: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    outcome = fedmoe("arena", "train", str(config), "--out", str(out), "--resume", "--fresh")
    assert_one_line(outcome, "--resume goes on with a run and --fresh begins anew; pass one of them")
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--memory-limit-gb", "0.1"], ["--memory-limit-gb", "0.5"]),
        (["--dtype", "int4"], ["unknown dtype 'int4'"]),
        (["--learner-device", "abacus"], ["unknown device 'abacus'"]),
        (["--ray-address", "auto"], ["--ray-address is for rollouts by Ray actors", "set [engine] actors"]),
        (["--report-to", "wandb,comet"], ["comet: no such tracker to report to; there are trackio, wandb, mlflow"]),
    ],
)
@pytest.mark.usefixtures("quiet")
def test_a_wrong_option_of_train_is_told_in_one_line(
    options: list[str], words: list[str], fedmoe: Run, config: Path, tmp_path: Path
) -> None:
    outcome = fedmoe("arena", "train", str(config), "--out", str(tmp_path / "run"), *options)
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert outcome.status != 0
    assert len(errors) == 1
    assert all(word in errors[0] for word in words)
    assert "Traceback" not in outcome.err


@pytest.mark.usefixtures("quiet")
def test_a_mode_that_cannot_be_played_ends_train_too_and_the_folder_stays_usable(
    fedmoe: Run, config: Path, tmp_path: Path
) -> None:
    wrong, out = tmp_path / "wrong.toml", tmp_path / "run"
    wrong.write_text(TINY.replace("count = 4", "count = 3") + PHASES)
    outcome = fedmoe("arena", "train", str(wrong), "--out", str(out))
    assert outcome.status == 1
    assert outcome.err.startswith("error: team_battle mode needs an even number of policies")
    assert outcome.err.count("\n") == 1
    second = fedmoe("arena", "train", str(config), "--out", str(out), "--no-charts", "--no-tensorboard")
    assert second.status == 0, second.err


@pytest.mark.usefixtures("quiet")
def test_a_tiny_run_from_end_to_end_with_charts_and_then_a_fresh_one_e15(
    fedmoe: Run, config: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    train = ("arena", "train", str(config), "--out", str(out))
    first = run_script("-m", "fedmoe", *train)
    assert first.status == 0, first.err[-3000:]
    assert first.out.rstrip().endswith(f"finished; everything is in {out}")
    assert "Traceback" not in first.err
    for name in CHARTS:
        picture = (out / "visualization_outputs" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 10_000
    assert json.loads((out / "run_report.json").read_text())["status"] == "finished"
    before = (out / "metrics.jsonl").read_bytes()
    assert before.count(b'"kind": "policy"') == 3 * 4

    again = fedmoe(*train, "--no-charts")
    assert (again.status, again.err) == (
        1,
        f"error: {out} holds a run already: pass --resume, --fresh or another --out\n",
    )
    (out / "notes.txt").write_text("mine")
    fresh = fedmoe(*train, "--fresh", "--no-charts", "--no-tensorboard", "--json")
    assert fresh.status == 0, fresh.err
    (aside,) = (out / "earlier").iterdir()
    assert f"moved the earlier run to {aside}" in fresh.err.replace("\n", "")
    # Lines of progress are no part of the document.
    assert json.loads(fresh.out) == {"status": "finished", "reason": "", "folder": str(out), "charts": []}
    assert (aside / "metrics.jsonl").read_bytes() == before
    assert (aside / "visualization_outputs" / f"{CHARTS[0]}.png").is_file()
    assert (out / "notes.txt").read_text() == "mine", "what does not belong to a run stays"
    assert not (out / "visualization_outputs").exists()
    kinds = [record["kind"] for record in read_records(out / "metrics.jsonl")]
    assert kinds.count("run") == 1
    assert kinds.count("policy") == 3 * 4
    drawn = json.loads(fedmoe("arena", "charts", str(out), "--json").out)
    assert drawn["folder"] == str(out)
    assert {f"{name}.png" for name in CHARTS} <= {Path(file).name for file in drawn["charts"]}


@pytest.mark.usefixtures("quiet")
def test_a_run_that_is_going_on_is_not_moved_aside(fedmoe: Run, config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "metrics.jsonl").write_text('{"at": 1, "kind": "run"}\n')
    lock = lock_folder(out)
    try:
        outcome = fedmoe("arena", "train", str(config), "--out", str(out), "--fresh")
    finally:
        lock.close()
    assert_one_line(outcome, f"{out} is in use by the process with id {os.getpid()}")
    assert (out / "metrics.jsonl").exists()
    assert not (out / "earlier").exists()


def test_charts_of_a_folder_without_a_run_are_refused(fedmoe: Run, tmp_path: Path) -> None:
    assert_one_line(fedmoe("arena", "charts", str(tmp_path)), "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text("")
    assert_one_line(fedmoe("arena", "charts", str(tmp_path)), "metrics.jsonl")


@pytest.mark.parametrize(
    "door", ["run_training_server", "multi_model_single_env_simple", "generate_test_data", "multi_model_visualization"]
)
def test_the_doors_in_demo_open_a9(door: str) -> None:
    outcome = run_script(f"demo/{door}.py", "--help")
    assert outcome.status == 0, outcome.err
    assert "Usage:" in outcome.out
    assert "Traceback" not in outcome.err


DEMO = str(ROOT / "demo" / "arena.toml")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], [DEMO, "--resume", "--out", "."]),
        (["--fresh"], [DEMO, "--fresh", "--out", "."]),
        (["my.toml"], ["my.toml", "--resume", "--out", "."]),
        (["my.toml", "--out=there", "--resume"], ["my.toml", "--out=there", "--resume"]),
        (["--out", "there", "--memory-limit-gb", "8"], [DEMO, "--out", "there", "--memory-limit-gb", "8", "--resume"]),
    ],
)
def test_the_training_server_goes_on_with_the_demo_in_the_current_folder_unless_told_otherwise(
    given: list[str], expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr("fedmoe.cli.main", called.append)
    monkeypatch.setattr(sys, "argv", ["run_training_server.py", *given])
    runpy.run_path(str(ROOT / "demo" / "run_training_server.py"), run_name="__main__")
    assert called == [["arena", "train", *expected]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the tiny model that is over."""
    folder = tmp_path_factory.mktemp("arena")
    (folder / "tiny.toml").write_text(TINY + PHASES)
    done = run_script(
        *("-m", "fedmoe", "arena", "train", str(folder / "tiny.toml"), "--out", str(folder / "run")),
        *("--no-charts", "--no-tensorboard"),
    )
    assert done.status == 0, done.err
    return folder / "run"


def test_episodes_are_shown_and_given_as_json(fedmoe: Run, trained: Path) -> None:
    shown = fedmoe("arena", "episodes", str(trained), "--policy", "policy_2", "--lowest-reward", "--limit", "2")
    assert shown.status == 0, shown.err
    assert shown.out.count("iteration ") == 2
    assert "policy_2@" in shown.out
    found = json.loads(fedmoe("arena", "episodes", str(trained), "--iteration", "1", "--limit", "9", "--json").out)
    assert {row["iteration"] for row in found} == {1}
    assert len(found) == 4
    assert {"policy", "score", "reward", "valid", "version"} <= found[0]["seats"][0].keys()
    assert found[0]["seats"][0]["turns"][0]["saw"]


def test_what_a_model_says_never_reaches_the_terminal_as_control_characters(fedmoe: Run, tmp_path: Path) -> None:
    text = "\x1b[2Jgone\x07\u202e\x9b\r\x7f 东京\nnext"
    turn = {"saw": text, "said": text, "tokens": 3, "ended": True, "cut": False}
    seat = {"policy": "ann", "version": 1, "team": 0, "strategy": "", "score": 1.0, "valid": 1.0, "reward": 1.0}
    row = {"iteration": 0, "mode": "mixed", "episode": 0, "chosen": "drawn", "question": text, "completed": True}
    (tmp_path / "episodes.jsonl").write_text(json.dumps({**row, "seats": [{**seat, "turns": [turn]}]}) + "\n")
    for extra in ((), ("--json",)):
        shown = fedmoe("arena", "episodes", str(tmp_path), *extra)
        assert shown.status == 0, shown.err
        assert not [char for char in shown.out if not char.isprintable() and char != "\n"]
    assert json.loads(shown.out)[0]["seats"][0]["turns"][0]["said"] == text
    plain = fedmoe("arena", "episodes", str(tmp_path)).out
    assert "\\x1b[2Jgone" in plain
    assert "东京" in plain


def test_episodes_that_are_not_there_are_refused_with_what_is(fedmoe: Run, trained: Path, tmp_path: Path) -> None:
    assert_one_line(fedmoe("arena", "episodes", str(tmp_path)), "has no episodes.jsonl", "per_iteration = 0")
    assert_one_line(fedmoe("arena", "episodes", str(trained), "--policy", "nobody"), "'nobody'", "policy_1, policy_2")
    assert_one_line(fedmoe("arena", "episodes", str(trained), "--iteration", "9"), "iteration 9", "0 to 2")
    both = fedmoe("arena", "episodes", str(trained), "--lowest-reward", "--highest-reward")
    assert_one_line(both, "opposites", "pass one of them")


def test_a_tournament_gives_the_same_table_twice_and_leaves_the_runs_alone(fedmoe: Run, trained: Path) -> None:
    before = {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()}
    pool = next((trained / "checkpoints").iterdir())
    arguments = ("arena", "tournament", str(trained), "--pool", str(pool), "--deals", "5", "--json")
    first = fedmoe(*arguments)
    assert first.status == 0, first.err
    again = run_script("-m", "fedmoe", *arguments, environment={"OMP_NUM_THREADS": "2"})
    assert again.out == first.out, "however many threads there are"
    found = json.loads(first.out)
    names = {row["player"] for row in found["rows"]}
    assert {"base", "random", "run/policy_1@3", f"{pool.name}/policy_1@{_version(pool)}"} <= names
    assert len(found["pairs"]) == len(names) * (len(names) - 1) // 2
    assert {"wins_by_play", "wins_by_errors"} <= found["rows"][0]["tally"].keys()
    assert {path: path.read_bytes() for path in trained.rglob("*") if path.is_file()} == before
    shown = fedmoe("arena", "tournament", str(trained), "--deals", "3", "--seed", "4")
    assert shown.status == 0, shown.err
    assert sum(line.split()[0] == "policy_1@3" for line in shown.out.splitlines()) == 1
    assert "raise --deals" in shown.out


def _version(found: Path) -> int:
    from fedmoe.arena.run.checkpoint import load

    policies = load(found).state["policies"]
    assert isinstance(policies, dict)
    return int(policies["policy_1"]["version"])


def test_a_tournament_of_nobody_is_refused(fedmoe: Run, tmp_path: Path) -> None:
    assert_one_line(fedmoe("arena", "tournament", str(tmp_path)), "holds no checkpoint of a run", "--pool")
