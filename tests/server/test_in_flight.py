"""A body whose processing kills the coordinator is named, counted, and at last held unread."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs
from support import MANIFEST, CoordinatorProcess, make_body, sha256

from fedmoe.lora.prompt_statistics import PromptStatistics
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.updates.in_flight import MOST_CRASHES, CrashMarkers, InFlightBody
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import DataStatisticsHeader, UpdateHeader

BODY = InFlightBody("a" * 64, "python", "w1", 7, 123)
OTHER = InFlightBody("b" * 64, "python", "w2", 8, 456)


NEVER_LEFT: list[AbstractContextManager[None]] = []


class Killed(BaseException):
    """The end of the process in the middle of processing: nothing is cleaned up."""


def crash(folder: Path, body: InFlightBody) -> None:
    """A process that ends while it processes a body."""
    entered = CrashMarkers(folder).processing(body)
    entered.__enter__()
    NEVER_LEFT.append(entered)


def test_what_was_in_flight_is_named_and_after_some_ends_suspicious_16(tmp_path: Path) -> None:
    for number in range(MOST_CRASHES):
        assert CrashMarkers(tmp_path).suspicion(BODY.digest) == ""
        crash(tmp_path, BODY)
        with capture_logs() as logs:
            CrashMarkers(tmp_path)
        (line,) = [line for line in logs if line["event"] == "was_in_flight"]
        assert (line["worker"], line["sequence"], line["crashes"]) == ("w1", 7, number + 1)
    again = CrashMarkers(tmp_path)
    assert f"killed {MOST_CRASHES} times" in again.suspicion(BODY.digest)
    # A start alone counts nothing, and other bodies are not suspected.
    assert CrashMarkers(tmp_path).suspicion(BODY.digest) == again.suspicion(BODY.digest)
    assert again.suspicion(OTHER.digest) == ""
    with again.processing(BODY):
        pass
    assert CrashMarkers(tmp_path).suspicion(BODY.digest)


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_body_that_was_answered_begins_anew_whatever_the_answer_16(
    tmp_path: Path, error: type[Exception] | None
) -> None:
    for _ in range(MOST_CRASHES - 1):
        crash(tmp_path, BODY)
        running = CrashMarkers(tmp_path)
    try:
        with running.processing(BODY):
            if error is not None:
                raise error
    except ValueError:
        pass
    assert list(tmp_path.iterdir()) == []
    crash(tmp_path, BODY)
    assert CrashMarkers(tmp_path).suspicion(BODY.digest) == ""


def test_the_same_bytes_twice_at_once_are_marked_until_both_are_answered_16(tmp_path: Path) -> None:
    running = CrashMarkers(tmp_path)
    with running.processing(BODY):
        with running.processing(BODY):
            pass
        assert [path.name for path in tmp_path.iterdir()] == [BODY.digest]
    assert list(tmp_path.iterdir()) == []


def test_damaged_and_foreign_files_stop_no_start_16(tmp_path: Path) -> None:
    (tmp_path / BODY.digest).write_bytes(b"")
    (tmp_path / OTHER.digest).write_bytes(b"[1]")
    (tmp_path / "notes.txt").write_text("mine")
    found = CrashMarkers(tmp_path)
    assert json.loads((tmp_path / BODY.digest).read_text())["crashes"] == 1
    assert (found.suspicion(BODY.digest), (tmp_path / "notes.txt").read_text()) == ("", "mine")


def test_an_update_that_kills_the_coordinator_is_held_and_everybody_else_goes_on_16(tmp_path: Path) -> None:
    process = CoordinatorProcess(tmp_path / "state")
    process.start()
    with CoordinatorClient(process.url, attempts=1) as client:
        client.register("python", "w1", MANIFEST)
        process.kill()
        header = UpdateHeader(expert="python", worker="w1", epoch="e1", sequence=0, base_version=0)
        for _ in range(MOST_CRASHES):
            process.start("push.checking=1")
            with pytest.raises(CoordinatorUnavailableError):
                client.push(header, make_body(1))
            assert process.wait() == -9
        process.start("push.checking=1")
        assert process.log.read_text().count("was_in_flight") == MOST_CRASHES
        result = client.push(header, make_body(1)).result
        assert (result.status, result.version) == ("quarantined", 0)
        assert f"killed {MOST_CRASHES} times" in result.note
        (held,) = client.quarantine()
        assert (held.digest, held.norm) == (sha256(make_body(1)), None)
        process.stop()
        process.start()
        assert client.push(header, make_body(1)).result.duplicate
        other = UpdateHeader(expert="python", worker="w2", epoch="e1", sequence=0, base_version=0)
        assert client.push(other, make_body(2)).result.version == 1
        assert client.release_held(held.number).version == 2
        assert process.stop() == 0
        assert list((tmp_path / "state" / "in_flight").iterdir()) == []


def test_statistics_that_kill_the_coordinator_are_refused_at_last_and_others_are_taken_16(tmp_path: Path) -> None:
    process = CoordinatorProcess(tmp_path / "state")
    process.start()
    header = DataStatisticsHeader(expert="python", worker="w1", kind="prompts")
    killing, other = (PromptStatistics.of(np.full((20, 5), n, np.float32)).to_bytes() for n in (1, 2))
    with CoordinatorClient(process.url, attempts=1) as client:
        client.register("python", "w1", MANIFEST)
        process.kill()
        for _ in range(MOST_CRASHES):
            process.start("statistics.checking=1")
            with pytest.raises(CoordinatorUnavailableError):
                client.push_data_statistics(header, killing)
            assert process.wait() == -9
        process.start("statistics.checking=2")
        with pytest.raises(RefusedError, match=f"killed {MOST_CRASHES} times") as refused:
            client.push_data_statistics(header, killing)
        assert refused.value.code == "statistics_mismatch"
        assert not client.push_data_statistics(header, other).duplicate
        assert process.stop() == 0
