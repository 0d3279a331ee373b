"""Pages at replicas: they are told the owner's state, and end with its term or their replica; nobody waits for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from replica_pair import Pair, ReplicaOnSocket, open_pair

from fedmoe.server.replicas.ownership import steady_seconds


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with open_pair(tmp_path) as opened:
        opened.house.register("python")
        yield opened
        opened.house.app.state.parts.live.close()


@contextmanager
def listening_page(replica: ReplicaOnSocket) -> Iterator[Iterator[str]]:
    with httpx2.stream("GET", f"{replica.server.url}/live", trust_env=False, timeout=60) as answer:
        assert answer.status_code == 200
        yield answer.iter_lines()


def experts(lines: Iterator[str]) -> list[str]:
    state = json.loads(next(line for line in lines if line.startswith("data: ")).removeprefix("data: "))
    return [expert["name"] for expert in state["experts"]]


@pytest.mark.parametrize("place", ["a", "b"])
def test_a_page_at_any_replica_is_told_and_ends_when_its_replica_leaves(pair: Pair, place: str) -> None:
    replica: ReplicaOnSocket = getattr(pair, place)
    with listening_page(replica) as lines:
        assert experts(lines) == ["python"]
        pair.house.register("sql")
        assert experts(lines) == ["python", "sql"]
        loop = replica.app._loop
        assert loop is not None
        began = steady_seconds()
        asyncio.run_coroutine_threadsafe(replica.app.leave(1000.0), loop).result(60)
        assert steady_seconds() - began < 500, "a stop does not wait for pages"
        assert [line for line in lines if line.startswith("event: ")] == []


@pytest.mark.parametrize("place", ["a", "b"])
def test_a_page_ends_with_the_term_and_comes_again_to_the_next_owner(pair: Pair, place: str) -> None:
    replica: ReplicaOnSocket = getattr(pair, place)
    with listening_page(replica) as lines:
        assert experts(lines) == ["python"]
        pair.own(term=2)
        for _ in lines:
            pass
    with listening_page(replica) as again:
        assert experts(again) == ["python"]


def test_open_pages_leave_the_connections_for_pushes_alone(pair: Pair) -> None:
    with listening_page(pair.b) as lines:
        experts(lines)
        assert pair.b.app.client._http is None
