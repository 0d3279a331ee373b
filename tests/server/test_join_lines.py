"""Join lines over HTTP: each works once, for one token, whoever asks at the same time and whatever is guessed."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from live import ADMIN, JOIN, House, open_house

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.tokens import JOINED, TokenGate
from fedmoe.server.access.turns import RequestTurns
from fedmoe.wire.http.bearer import hash_token, new_token

OWN = new_token()


def line_of(house: House, **narrowed: object) -> str:
    """The token of a new join line."""
    answer = house.client(ADMIN).post("/tokens", json={"role": "invite", **narrowed})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["token"])


def exchanged(house: House, line: str, token: str = OWN, worker: str = "w1") -> Any:
    return house.client(line).post("/join", json={"token_hash": hash_token(token), "worker": worker})


def test_a_line_is_exchanged_once_and_again_only_for_the_same_token(tmp_path: Path) -> None:
    with open_house(tmp_path, tokens=True) as house:
        line = line_of(house, experts=["python"])
        assert line.startswith("fmj_")
        first, same, other = exchanged(house, line), exchanged(house, line), exchanged(house, line, new_token())
        assert (first.status_code, first.json()) == (200, {"worker": "w1", "experts": ["python"]})
        assert (same.status_code, same.json()) == (200, first.json())
        assert (other.status_code, other.json()["code"]) == (409, "join_line_used")
        assert exchanged(house, line, worker="w2").status_code == 403, "the token belongs to the worker it was made for"
        listed = {info.hash: info for info in house.gate.listed()}
        made = listed[hash_token(OWN)]
        assert (made.role, made.worker, made.experts, made.origin) == ("worker", "w1", ["python"], "joined")
        assert not listed[hash_token(line)].usable


def test_of_two_that_join_at_once_one_wins(tmp_path: Path) -> None:
    with open_house(tmp_path, tokens=True) as house, ThreadPoolExecutor(8) as pool:
        line, tokens = line_of(house), [new_token() for _ in range(8)]
        answers = list(pool.map(lambda token: exchanged(house, line, token).status_code, tokens))
        assert sorted(answers) == [200] + [409] * 7
        workers = [info for info in house.gate.listed() if info.role == "worker"]
        assert [info.hash for info in workers] == [hash_token(tokens[answers.index(200)])]


def test_the_token_of_a_line_is_good_for_nothing_else(tmp_path: Path) -> None:
    with open_house(tmp_path, tokens=True) as house:
        client = house.client(line_of(house))
        for path in ("/federation", "/list_experts", "/tokens", "/metrics"):
            assert client.get(path).status_code == 403, path
        for token in (ADMIN, JOIN):
            assert exchanged(house, token).status_code == 403, "only the token of a line is exchanged"


def test_a_line_that_ended_or_was_revoked_is_refused_in_words(tmp_path: Path) -> None:
    with open_house(tmp_path, tokens=True) as house:
        ended, revoked = line_of(house, expires_in=0.001), line_of(house)
        house.gate.revoke(hash_token(revoked))
        time.sleep(0.002)
        for line, word in ((ended, "this join line has expired"), (revoked, "this join line was revoked")):
            answer = exchanged(house, line, new_token())
            assert (answer.status_code, word in answer.json()["detail"]) == (401, True)
            assert "fedmoe token create --join" in answer.json()["fix"]


def test_an_answer_that_was_lost_is_had_after_the_end_of_the_line_too_but_not_after_revocation(tmp_path: Path) -> None:
    with open_house(tmp_path, tokens=True) as house:
        line = line_of(house, expires_in=60)
        assert exchanged(house, line).status_code == 200
        gate = TokenGate(house.journal, True, lambda: time.time() + 120)
        assert gate.admit(f"Bearer {line}").role == "invite"
        assert gate.exchange(hash_token(line), hash_token(OWN), "w1").worker == "w1"
        with pytest.raises(RefusedError, match="was used before"):
            gate.exchange(hash_token(line), hash_token(new_token()), "w1")
        gate.revoke(hash_token(OWN))
        with pytest.raises(RefusedError, match="this token was revoked"):
            gate.exchange(hash_token(line), hash_token(OWN), "w1")


def test_no_token_that_is_known_can_be_claimed(tmp_path: Path) -> None:
    """Whoever learns a hash does not get the token it is of narrowed, renamed or brought back."""
    with open_house(tmp_path, tokens=True) as house:
        line = line_of(house)
        for token in (ADMIN, JOIN, line):
            answer = exchanged(house, line, token)
            assert (answer.status_code, answer.json()["code"]) == (409, "token_mismatch")
        assert exchanged(house, line).status_code == 200, "nothing was used up"


def test_what_was_used_before_a_crash_is_used_after_it(tmp_path: Path) -> None:
    """As after a SIGKILL between the two writes: the line names a token that is not there yet."""
    with open_house(tmp_path, tokens=True) as house:
        line = line_of(house)
        house.journal.set_meta(JOINED + hash_token(line), hash_token(OWN))
        gate = TokenGate(house.journal, True, time.time)
        assert not next(info for info in gate.listed() if info.hash == hash_token(line)).usable
        with pytest.raises(RefusedError, match="was used before"):
            gate.exchange(hash_token(line), hash_token(new_token()), "w1")
        assert gate.exchange(hash_token(line), hash_token(OWN), "w1").hash == hash_token(OWN)
        assert TokenGate(house.journal, True, time.time).admit(f"Bearer {OWN}").worker == "w1"


def test_whoever_guesses_lines_is_slowed_down_as_every_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowed: list[str | None] = []

    async def stranger(turns: RequestTurns, address: str | None) -> None:
        slowed.append(address)

    monkeypatch.setattr(RequestTurns, "stranger", stranger)
    with open_house(tmp_path, tokens=True) as house:
        used = line_of(house)
        assert exchanged(house, used).status_code == 200
        for _ in range(3):
            assert exchanged(house, new_token("fmj")).status_code == 401
        assert len(slowed) == 3
        assert house.client(used).get("/federation").status_code == 403
        assert len(slowed) == 4


def test_where_no_token_is_asked_for_nothing_is_exchanged(tmp_path: Path) -> None:
    with open_house(tmp_path) as house:
        answer = house.client().post("/join", json={"token_hash": hash_token(OWN), "worker": "w1"})
        assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
