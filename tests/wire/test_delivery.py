from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import LAYOUT, MANIFEST

from fedmoe.lora.manifest import Manifest
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import (
    CoordinatorClient,
    CoordinatorUnavailableError,
    ExpectedWeights,
    PulledExpert,
    PushResult,
    TooStaleError,
)
from fedmoe.wire.contract.messages import UpdateHeader, UpdateResult
from fedmoe.wire.delivery import Delivery, DeliveryOutcome, pause_seconds
from fedmoe.wire.outbox import PendingUpdate

HEADER = UpdateHeader(expert="python", worker="w1", epoch="e", sequence=3, base_version=1)
PENDING = PendingUpdate(HEADER, b"bytes", "0" * 64)
NEWEST = PulledExpert("python", 2, "a" * 64, MANIFEST, np.zeros(LAYOUT.size, np.float32), "etag")
RESULT = UpdateResult(
    expert="python", version=2, gateway_version=2, staleness=0, coefficient=1.0, digest="b" * 64, duplicate=False
)
AWAY = CoordinatorUnavailableError("away")


@dataclass
class Scripted:
    """A coordinator that answers what it was told to, in turn."""

    pushes: list[PushResult | Exception] = field(default_factory=list)
    pulls: list[PulledExpert | Exception] = field(default_factory=list)
    seen: list[tuple[UpdateHeader, bytes]] = field(default_factory=list)

    def push(self, header: UpdateHeader, body: bytes, manifest: Manifest | None, minimal: bool = False) -> PushResult:
        self.seen.append((header, body))
        answer = self.pushes.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def pull_expert(self, expert: str, expected: ExpectedWeights, dtype: str = "fp32") -> PulledExpert:
        answer = self.pulls.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def deliver(self) -> Delivery:
        return Delivery(cast(CoordinatorClient, self), PENDING)

    def answer(self) -> DeliveryOutcome | None:
        """What a delivery to it ends with."""
        delivery = self.deliver()
        assert delivery.wait(30)
        return delivery.answer()


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.wire.delivery._LONGEST_PAUSE", 0.001)


def too_stale(newest: PulledExpert | None) -> TooStaleError:
    error = TooStaleError("too_stale", "too old.")
    error.newest = newest
    return error


def test_the_same_bytes_are_sent_until_there_is_an_answer() -> None:
    there = Scripted([AWAY, AWAY, PushResult(RESULT, NEWEST)])
    answer = there.answer()
    assert answer is not None
    assert (answer.result, answer.newest, answer.returned, answer.poisoned) == (RESULT, NEWEST, False, False)
    assert there.seen == [(HEADER, b"bytes")] * 3


def test_an_answer_without_weights_is_completed_by_a_pull() -> None:
    answer = Scripted([PushResult(RESULT, None)], [AWAY, NEWEST]).answer()
    assert answer is not None
    assert answer.refused is None
    assert answer.newest is NEWEST


@pytest.mark.parametrize("refusal", [too_stale(None), RefusedError("unknown_version", "no such version.")])
def test_a_refusal_that_a_pull_cures_brings_the_newest_version(refusal: RefusedError) -> None:
    answer = Scripted([refusal], [AWAY, NEWEST]).answer()
    assert answer is not None
    assert (answer.returned, answer.refused, answer.newest) == (True, refusal, NEWEST)


def test_the_newest_version_in_the_refusal_itself_is_taken() -> None:
    answer = Scripted([too_stale(NEWEST)]).answer()
    assert answer is not None
    assert answer.newest is NEWEST


@pytest.mark.parametrize(("code", "poisoned"), [("forbidden", False), ("norm_too_large", True), ("not_finite", True)])
def test_a_refusal_that_no_pull_cures_ends_the_delivery(code: str, poisoned: bool) -> None:
    answer = Scripted([RefusedError(code, "no.")]).answer()
    assert answer is not None
    assert (answer.returned, answer.newest, answer.poisoned) == (False, None, poisoned)


@pytest.mark.parametrize("code", ["digest_mismatch", "truncated"])
def test_bytes_damaged_on_the_way_are_sent_again(code: str) -> None:
    there = Scripted([RefusedError(code, "damaged."), PushResult(RESULT, NEWEST)])
    answer = there.answer()
    assert answer is not None
    assert answer.refused is None


def test_a_fault_of_our_own_comes_out_where_the_answer_is_asked_for() -> None:
    delivery = Scripted([ZeroDivisionError("bug")]).deliver()
    assert delivery.wait(30)
    with pytest.raises(ZeroDivisionError):
        delivery.answer()
    assert delivery.over


def test_a_closed_delivery_ends_soon_without_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.wire.delivery._LONGEST_PAUSE", 60.0)
    monkeypatch.setattr("fedmoe.wire.delivery._FIRST_PAUSE", 60.0)
    tried = threading.Event()
    there = Scripted([AWAY])
    delivery = Delivery(cast(CoordinatorClient, there), PENDING, lambda error: tried.set())
    assert tried.wait(30)
    assert delivery.answer() is None
    delivery.close()
    started = time.monotonic()
    assert delivery.wait(10)
    assert delivery.answer() is None
    assert time.monotonic() - started < 5


@given(st.integers(1, 10**6), st.none() | st.floats(0, 1e6), st.floats(0, 1, exclude_max=True))
def test_pauses_grow_to_a_bound_and_obey_what_was_asked(tries: int, retry_after: float | None, chance: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmoe.wire.delivery._LONGEST_PAUSE", 15.0)
        pause = pause_seconds(tries, retry_after, chance)
        assert 0.25 <= pause <= 90
        if retry_after is None:
            assert pause <= 15
            assert pause_seconds(tries + 1, None, chance) >= pause
        else:
            assert pause >= min(retry_after, 60)


@pytest.mark.parametrize("retry_after", [None, 2.0])
def test_workers_that_failed_together_do_not_come_back_together(
    retry_after: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 workers after an hour without a coordinator: no second gets more than a fair share of them."""
    monkeypatch.setattr("fedmoe.wire.delivery._LONGEST_PAUSE", 15.0)
    chances = random.Random(1)
    pauses = [pause_seconds(200, retry_after, chances.random()) for _ in range(500)]
    spread = max(pauses) - min(pauses)
    assert spread > (0.9 if retry_after else 7)
    counts, _ = np.histogram(pauses, bins=10)
    assert counts.max() < 100
