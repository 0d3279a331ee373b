"""The server of the page of runs: what it says of records, which episodes it gives, and that it is for this machine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from fedmoe.monitor.sample_records import sample_records
from fedmoe.monitor.web.run_messages import RunMessages, thinned
from fedmoe.monitor.web.run_pages import MOST_LISTED, EpisodeFilter, RunPages, runs_app
from fedmoe.runtime.records import RecordFile


def episodes(run: Path, asked: EpisodeFilter) -> Sequence[Mapping[str, object]]:
    shown = {"run": run.name, "policy": asked.policy, "order": asked.order}
    return [shown | {"least": asked.least, "most": asked.most, "limit": asked.limit}]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in sample_records(2, 6, 0, started=0.0))
    (tmp_path / "metrics.jsonl").write_text(lines)
    return tmp_path


def client_of(*folders: Path) -> TestClient:
    return TestClient(runs_app(RunPages(folders, episodes)), base_url="http://127.0.0.1")


def told(messages: RunMessages) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = json.loads(messages.text())["runs"]
    return runs


def test_a_new_record_changes_the_fingerprint_and_the_text(run: Path) -> None:
    messages = RunMessages([run])
    before, name = told(messages)[0], messages.fingerprint()
    with (run / "metrics.jsonl").open("a") as records:
        records.write('{"kind": "policy", "policy": "newcomer-9", "iteration": 7, "reward": 1.0, "at": 9}\n')
    assert messages.fingerprint() != name
    after = told(messages)[0]
    assert {row["policy"] for row in after["policies"]} - {row["policy"] for row in before["policies"]} == {
        "newcomer-9"
    }


def test_a_run_says_scores_with_intervals_trends_wins_and_the_machine(run: Path) -> None:
    shown = told(RunMessages([run]))[0]
    policy = shown["policies"][0]
    assert policy["score"][1] <= policy["score"][0] <= policy["score"][2]
    assert all(isinstance(policy[name], float) for name in ("reward", "kl", "entropy", "staleness", "rating", "sigma"))
    assert {(win["policy"], len(win["win"])) for win in shown["wins"]} == {("solver", 3), ("checker", 3)}
    machine = shown["machine"]
    assert 0 <= machine["cpu_percent"] <= 100
    assert machine["process_bytes"] > 1e9
    assert machine["tokens_per_second"] > 0
    assert shown["iterations"] == [0, 5]
    assert {"reward", "kl", "entropy", "system", "credit"} <= {figure["name"] for figure in shown["figures"]}


def test_a_folder_without_records_says_so_beside_the_others_and_equal_names_are_told_apart(run: Path) -> None:
    for folder in ("a/arena", "b/arena"):
        (run / folder).mkdir(parents=True)
    full, one, two = told(RunMessages([run, run / "a/arena", run / "b/arena"]))
    assert full["policies"]
    assert full["name"] == run.name
    assert one["problem"] == two["problem"] == "there are no records yet"
    assert (one["name"], two["name"]) == (str(run / "a/arena"), str(run / "b/arena"))


def test_a_file_of_records_is_read_on_and_anew_where_it_was_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "run"}\n{"kind": "half')
    records = RecordFile(path)
    assert [record["kind"] for record in records.all()] == ["run"]
    with path.open("a") as file:
        file.write(' a word"}\nno record\n{"kind": "team"}\n')
    assert [record["kind"] for record in records.all()] == ["run", "half a word", "team"]
    path.write_text('{"kind": "new"}\n')
    assert [record["kind"] for record in records.all()] == ["new"]


def test_long_curves_are_thinned_with_all_that_belongs_to_a_point() -> None:
    count = 10_001
    trace: dict[str, object] = {"type": "scatter", "x": list(range(count)), "y": list(range(count)), "name": "a"}
    trace |= {"marker": {"size": list(range(count)), "color": "#000000"}}
    short = thinned(trace)
    x: Any = short["x"]
    assert 250 <= len(x) <= 502
    assert (x[0], x[-1]) == (0, count - 1)
    assert short["y"] == x
    marker: Any = short["marker"]
    assert marker == {"size": x, "color": "#000000"}
    assert thinned({"type": "bar", "x": list(range(count))})["x"] == list(range(count))


@pytest.mark.parametrize("path", ["/", "/runs.js", "/figures.js", "/runs.css", "/base.js", "/plotly.js", "/episodes"])
def test_nothing_but_the_servers_own_files_may_run(run: Path, path: str) -> None:
    answer = client_of(run).get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "script-src" not in policy
    assert "unsafe-eval" not in policy


def test_another_sites_page_and_name_are_refused_but_a_link_may_open_the_page(run: Path) -> None:
    client = client_of(run)
    assert client.get("/episodes", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.get("/runs.js", headers={"Sec-Fetch-Site": "same-site"}).status_code == 403
    assert client.get("/live", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400
    assert client.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200


def test_episodes_are_chosen_by_run_policy_reward_and_order(run: Path) -> None:
    client = client_of(run)
    chosen = client.get("/episodes?run=0&policy=p&order=lowest&least=-0.5&most=").json()
    expected = {"run": run.name, "policy": "p", "order": "lowest", "least": -0.5, "most": None, "limit": MOST_LISTED}
    assert chosen == [expected]
    for wrong in ("run=1", "run=²", "run=-1", "order=best", "least=much", "most=nan", "run=" + "9" * 5000):
        answer = client.get(f"/episodes?{wrong}")
        assert answer.status_code == 422, wrong
        assert len(answer.json()["detail"]) < 100


def test_all_episodes_that_the_filter_takes_can_be_kept_as_a_file(run: Path) -> None:
    answer = client_of(run).get("/episodes?order=highest&form=jsonl")
    assert 'filename="episodes.jsonl"' in answer.headers["content-disposition"]
    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert [(row["order"], row["limit"]) for row in rows] == [("highest", None)]
