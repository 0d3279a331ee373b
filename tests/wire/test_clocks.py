from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from live import JOIN, listening, open_house

from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.unreachable import clock_difference


@pytest.mark.parametrize(
    ("coordinator_time", "said"),
    [
        (1000.0, ""),
        (1000 - 59.0, ""),
        (1000 - 420, "This machine's clock is 7 min ahead of the coordinator's."),
        (1000 + 420.0, "This machine's clock is 7 min behind the coordinator's."),
        (1000 + 86_400, "This machine's clock is 24 h behind the coordinator's."),
        *[(odd, "") for odd in tuple[object, ...]((None, "1", True, [], float("nan"), float("inf"), float("-inf")))],
    ],
)
def test_a_worker_can_say_how_far_its_clock_is_off_53(coordinator_time: object, said: str) -> None:
    assert clock_difference(coordinator_time, 1000.0) == said


def test_a_token_that_expired_is_refused_with_the_clocks_beside_each_other_53(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_house(tmp_path, tokens=True) as house, listening(house.app) as server:
        house.gate.add("short-token-of-32-characters-000", "join", expires_in=0.001)
        monkeypatch.setattr("fedmoe.wire.client.time", SimpleNamespace(time=lambda: time.time() + 420))
        for token, words in (
            ("short-token-of-32-characters-000", "this token has expired. This machine's clock is 7 min ahead"),
            (None, "a token is needed and none was sent. This machine's clock is 7 min"),
        ):
            with CoordinatorClient(server.url, token) as client, pytest.raises(RefusedError, match=words):
                client.federation()
        with CoordinatorClient(server.url, JOIN) as client:
            client.federation()
