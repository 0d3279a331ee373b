"""The server of the page of runs: messages are made once for all and kept apart, and it is for this machine only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from fedmoe.monitor.sample_records import sample_records
from fedmoe.monitor.web.run_pages import RunPages, runs_app


def no_episodes(run: Path, policy: str | None, order: str) -> Sequence[Mapping[str, object]]:
    return [{"run": run.name, "policy": policy, "order": order}]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = "".join(json.dumps(record) + "\n" for record in sample_records(2, 6, 0, started=0.0))
    (tmp_path / "metrics.jsonl").write_text(lines)
    return tmp_path


def client_of(pages: RunPages) -> TestClient:
    return TestClient(runs_app(pages), base_url="http://127.0.0.1")


def events(pages: RunPages, last_id: str | None, count: int, after_first: Sequence[Path] = ()) -> list[str]:
    """The first events of a stream; each path is touched with a record once the first one came."""

    async def read() -> list[str]:
        got: list[str] = []
        async for text in pages.stream(last_id):
            got.append(text)
            if len(got) == 2:
                for path in after_first:
                    with path.open("a") as records:
                        records.write(
                            '{"kind": "policy", "policy": "newcomer-9", "iteration": 7, "reward": 1.0, "at": 9}\n'
                        )
            if len(got) == count:
                return got
        return got

    return asyncio.run(asyncio.wait_for(read(), 60))


def test_a_new_record_is_sent_to_an_open_page(run: Path) -> None:
    _, before, after = events(RunPages([run], no_episodes), None, 3, [run / "metrics.jsonl"])
    assert "newcomer-9" not in before
    assert "newcomer-9" in after


def test_who_has_the_newest_message_is_not_sent_it_again(run: Path) -> None:
    first = events(RunPages([run], no_episodes), None, 2)[1]
    name = first.split("\n")[0].removeprefix("id: ")
    pages = RunPages([run], no_episodes)
    looks = iter([False, False, True])
    pages.stopping = lambda: next(looks)
    assert events(pages, name, 9) == ["retry: 1000\n\n"]


def test_a_message_is_made_once_for_all_pages(run: Path) -> None:
    pages = RunPages([run], no_episodes)

    async def first_message() -> str:
        async for text in pages.stream(None):
            if text.startswith("id"):
                return text
        raise AssertionError

    async def read() -> set[str]:
        return set(await asyncio.gather(*(first_message() for _ in range(20))))

    assert len(asyncio.run(read())) == 1
    assert pages.made == 1


def test_a_folder_without_records_says_so_beside_the_others(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    text = events(RunPages([run, tmp_path / "empty"], no_episodes), None, 2)[1]
    full, empty = json.loads(text.split("data: ")[1])["runs"]
    assert full["policies"]
    assert "metrics.jsonl" in empty["problem"]


@pytest.mark.parametrize("path", ["/", "/runs.js", "/runs.css", "/plotly.js", "/episodes"])
def test_nothing_but_the_servers_own_files_may_run(run: Path, path: str) -> None:
    answer = client_of(RunPages([run], no_episodes)).get(path)
    assert answer.status_code == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "script-src" not in policy
    assert "unsafe-eval" not in policy


def test_another_sites_page_and_name_are_refused(run: Path) -> None:
    client = client_of(RunPages([run], no_episodes))
    assert client.get("/episodes", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.get("/live", headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 400


def test_episodes_are_chosen_by_run_policy_and_order(run: Path) -> None:
    client = client_of(RunPages([run], no_episodes))
    chosen = client.get("/episodes?run=0&policy=p&order=lowest").json()
    assert chosen == [{"run": run.name, "policy": "p", "order": "lowest"}]
    assert client.get("/episodes?run=1").status_code == 422
    assert client.get("/episodes?order=best").status_code == 422
