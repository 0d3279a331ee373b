"""A coordinator that publishes what evaluators scored, and what evaluators and tests ask of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from live import House, open_house, push_headers, push_parameters
from starlette.testclient import TestClient
from support import make_body

from fedmoe.coordinator import Aggregation
from fedmoe.server.gate.gate import EvaluationGate, GatePolicy

GATED = Aggregation(evaluation_gate=True)
Told = Mapping[str, Any]
T = TypeVar("T")


@dataclass
class Clock:
    """Time that passes when told to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def push(client: TestClient, expert: str, sequence: int, seed: int) -> None:
    body = make_body(seed)
    parameters = push_parameters(sequence, expert=expert, worker=f"w-{expert}")
    answer = client.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))
    assert answer.is_success, answer.text


def ask(client: TestClient, expert: str, evaluator: str | None = None) -> dict[str, Any]:
    answer = client.post("/gateway_candidates", json={"evaluator": evaluator or f"e-{expert}", "expert": expert})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def eventually(condition: Callable[[], T], what: str) -> T:
    deadline = time.monotonic() + 10
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} did not come"
        time.sleep(0.01)
    return found


def open_set(client: TestClient, expert: str) -> dict[str, Any]:
    """The set that waits for this expert's evaluator, once it has been made."""
    return dict(eventually(lambda: ask(client, expert)["open"], "a set of candidates"))


def scores(offer: Told, expert: str, best: str = "", kept: float = 0.5, published: float = 0.5) -> dict[str, object]:
    """Losses that keep a share of a gain of 1 nat; the candidate `best` keeps 0.1 more."""
    names = [str(candidate["name"]) for candidate in offer["candidates"]]
    return {
        "set": offer["id"],
        "evaluator": f"e-{expert}",
        "expert": expert,
        "tokens": 1000,
        "base": 3.0,
        "own": 2.0,
        "published": None if offer["published"] is None else 3.0 - published,
        "candidates": {name: 3.0 - kept - 0.1 * (name == best) for name in names},
    }


def judged(client: TestClient, before: int = 0) -> dict[str, object]:
    """The verdict that follows `before` earlier ones."""

    def newest() -> list[dict[str, object]]:
        found = client.get("/gateway_verdicts").json()["verdicts"]
        return list(found) if len(found) > before else []

    return dict(eventually(newest, "a verdict")[0])


@contextmanager
def trained(folder: Path, aggregation: Aggregation = GATED) -> Iterator[tuple[House, TestClient]]:
    """Two experts with an update each."""
    with open_house(folder, aggregation) as house, house.client() as client:
        house.register("python", "sql")
        for seed, expert in enumerate(["python", "sql"]):
            push(client, expert, 0, seed)
        yield house, client


def gate_of(house: House) -> EvaluationGate:
    gate = house.service.evaluation_gate
    assert gate is not None
    return gate


@contextmanager
def timed(folder: Path, clock: Clock) -> Iterator[tuple[House, TestClient]]:
    with trained(folder) as (house, client):
        gate = gate_of(house)
        gate._clock, gate._policy = clock, GatePolicy(seconds=30.0)
        yield house, client
