"""Many requests to `auto` at once: they are routed together, within bounds, and nobody routes for who has gone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import openai
import pytest
from builders import wait_until
from serve_house import EXPERTS, Served, serving

from fedmoe.gateway.routers import ExpertCandidates
from fedmoe.gateway.serve.service import Limits
from fedmoe.inference.backend import ServedModel


class Waiting:
    """Routes to `python` once it is let, and counts who is routed, and how many at once."""

    experts = EXPERTS

    def __init__(self) -> None:
        self.go = threading.Event()
        self.routed = self.most = self._now = 0
        self.batches: list[int] = []
        self._lock = threading.Lock()

    def candidates(self, prompts: Sequence[Sequence[int]]) -> list[ExpertCandidates] | None:
        with self._lock:
            self.routed += len(prompts)
            self.batches.append(len(prompts))
            self._now += 1
            self.most = max(self.most, self._now)
        assert self.go.wait(20)
        time.sleep(0.01)
        with self._lock:
            self._now -= 1
        return [ExpertCandidates(tuple(prompt), {"python": 1e6}) for prompt in prompts]

    def follow(self, listed: Mapping[str, str], fetch: Callable[[str], bytes]) -> Mapping[str, str]:
        return {}


@pytest.fixture
def router() -> Iterator[Waiting]:
    made = Waiting()
    yield made
    made.go.set()


@pytest.fixture
def served(tmp_path: Path, router: Waiting) -> Iterator[Served]:
    with serving(tmp_path, Limits(prompt_tokens=64, output_tokens=64, generations=8), router=router) as running:
        yield running


def ask(served: Served) -> str:
    with served.client() as client:
        return str(client.completions.create(model="auto", prompt="abc", max_tokens=2).model)


def test_prompts_that_wait_in_the_places_of_their_requests_are_routed_together(served: Served, router: Waiting) -> None:
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(ask, served) for _ in range(8)]
        wait_until(lambda: served.service._admitted == 8)
        with pytest.raises(openai.RateLimitError):
            ask(served)
        with served.client() as client:
            client.models.list()  # the event loop waits for none of them
        router.go.set()
        assert {one.result() for one in asked} == {"python"}
    # The first batch is who was there when the thread was free, the second all who came while it was looked at.
    assert (router.routed, router.most) == (8, 1)
    assert len(router.batches) <= 2


def test_nobody_is_routed_who_went_away_before_it_was_his_turn(served: Served, router: Waiting) -> None:
    body = {"model": "auto", "prompt": "abc", "max_tokens": 64}
    with httpx2.Client(base_url=served.url, timeout=0.2) as impatient:
        for _ in range(3):
            with pytest.raises(httpx2.ReadTimeout):
                impatient.post("/v1/completions", json=body)
    wait_until(lambda: served.service._admitted == 0)
    assert served.service.counters.refused == {"client_gone": 3}
    router.go.set()
    assert ask(served) == "python"
    # The first was being looked at when its client went.
    assert router.routed == 2


def test_a_prompt_that_cannot_be_routed_is_told_and_counted(
    served: Served, router: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    router.go.set()

    def overflowed(pairs: Sequence[tuple[Sequence[int], ServedModel]]) -> list[float]:
        return [float(np.nan)] * len(pairs)

    monkeypatch.setattr(served.backend, "log_likelihoods", overflowed)
    with pytest.raises(openai.InternalServerError, match=r"there is none of .*gateway.*overflowed"):
        ask(served)
    assert served.service.counters.refused == {"generation_failed": 1}
    assert served.service._admitted == 0


def test_who_is_routed_to_an_expert_that_has_just_gone_may_ask_again(
    served: Served, router: Waiting, monkeypatch: pytest.MonkeyPatch
) -> None:
    router.go.set()
    served.watcher.close()
    catalogue = served.service.catalogue

    def gone(pairs: Sequence[tuple[Sequence[int], ServedModel]]) -> list[float]:
        left = {name: model for name, model in catalogue.snapshot.models.items() if name != "python"}
        catalogue.publish(left, 1.0)
        return [0.0] * len(pairs)

    monkeypatch.setattr(served.backend, "log_likelihoods", gone)
    with pytest.raises(openai.InternalServerError, match="'python', which is not served now") as error:
        ask(served)
    assert (error.value.status_code, error.value.code) == (503, "routed_model_missing")
    assert served.service._admitted == 0
