"""What a worker tells of its data reaches the coordinator, whatever happens on the way, and holds up nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest
from workers import Federation, blocks, tiny_base

from fedmoe.cli import main
from fedmoe.cli.worker_setup import statistics_to_send
from fedmoe.config import WorkerConfig
from fedmoe.datasets.tokens.packing import Block
from fedmoe.lora.moments import InputMoments
from fedmoe.lora.prompt_statistics import PromptStatistics
from fedmoe.models.base import LoadedBase
from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.stop_signals import StopOnSignal
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import DataStatisticsHeader
from fedmoe.worker.statistics import DataStatistics, StatisticsSender, data_statistics

BODIES = {"prompts": b"p", "moments": b"m"}
AWAY = CoordinatorUnavailableError("away")


@dataclass
class Scripted:
    """A coordinator whose answers to statistics fail as told, in turn, and then succeed."""

    failures: list[Exception] = field(default_factory=list)
    taken: list[tuple[str, bytes]] = field(default_factory=list)
    asked: threading.Event = field(default_factory=threading.Event)

    def push_data_statistics(self, header: DataStatisticsHeader, body: bytes) -> None:
        self.asked.set()
        if self.failures:
            raise self.failures.pop(0)
        self.taken.append((header.kind, body))

    def disclosure(self) -> StatisticsSender:
        started = StatisticsSender(cast(CoordinatorClient, self), "python", "w1", {"prompts": b"p", "moments": b"m"})
        started.start()
        return started


def logged(capsys: pytest.CaptureFixture[str]) -> str:
    """What was logged, wherever earlier tests have led the log."""
    return "".join(capsys.readouterr())


@pytest.fixture
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.wire.delivery.pause_seconds", lambda *_: 0.001)


@pytest.mark.usefixtures("_short_pauses")
@pytest.mark.parametrize(
    "failure", [AWAY, RefusedError("digest_mismatch", "damaged"), RefusedError("truncated", "cut")]
)
def test_what_passes_by_itself_is_tried_again(failure: Exception) -> None:
    scripted = Scripted([failure] * 3)
    scripted.disclosure().finish(30, lambda: False)
    assert scripted.taken == list(BODIES.items())


def test_a_refusal_ends_that_kind_and_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    scripted = Scripted([RefusedError("statistics_mismatch", "of another model")])
    scripted.disclosure().finish(30, lambda: False)
    assert scripted.taken == [("moments", b"m")]
    said = logged(capsys)
    assert "statistics_refused" in said
    assert "of another model" in said


def test_closing_gives_up_on_a_coordinator_that_stays_away() -> None:
    scripted = Scripted([AWAY] * 1000)
    disclosure = scripted.disclosure()
    assert scripted.asked.wait(30)
    disclosure.close()
    disclosure._thread.join(30)
    assert not disclosure._thread.is_alive()
    assert scripted.taken == []


def test_a_client_that_closes_under_a_call_shows_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    """What httpx raises then is of no kind that the client knows; a thread that died of it would fail this test."""
    waiting = threading.Event()

    class Closing(Scripted):
        def push_data_statistics(self, header: DataStatisticsHeader, body: bytes) -> None:
            self.asked.set()
            assert waiting.wait(30)
            raise RuntimeError("Cannot send a request, as the client has been closed.")

    scripted = Closing()
    disclosure = scripted.disclosure()
    assert scripted.asked.wait(30)
    disclosure.close()
    waiting.set()
    disclosure._thread.join(30)
    assert not disclosure._thread.is_alive()
    assert "client has been closed" not in logged(capsys)


def test_what_is_on_its_way_at_the_end_is_waited_for_and_what_is_not_taken_is_logged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    scripted = Scripted([AWAY] * 1000)
    disclosure = scripted.disclosure()
    disclosure.finish(0.0, lambda: False)
    assert "statistics_not_sent" in logged(capsys)
    disclosure._thread.join(30)
    assert not disclosure._thread.is_alive()


def test_who_was_told_to_stop_waits_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.worker.statistics._LAST_WAIT_SECONDS", 0.1)
    disclosure = Scripted([AWAY] * 1000).disclosure()
    began = time.monotonic()
    disclosure.finish(3600.0, lambda: True)
    assert time.monotonic() - began < 60


# What is disclosed.


def config(**others: object) -> WorkerConfig:
    fixed = {"coordinator_url": "http://h", "worker_id": "w1", "specialty": "python", "dataset": "d.jsonl"}
    return WorkerConfig(**fixed | others)  # type: ignore[arg-type]


def test_the_statistics_of_the_training_blocks_are_sent(tmp_path: Path) -> None:
    found = statistics_to_send(config(), tiny_base(), blocks(), tmp_path)
    assert found == data_statistics(tiny_base(), blocks(), "all-linear").to_bytes()


def test_nothing_is_made_where_it_is_not_wanted(tmp_path: Path) -> None:
    assert statistics_to_send(config(send_statistics=False), tiny_base(), blocks(), tmp_path) == {}


def test_too_little_data_is_logged_and_not_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert statistics_to_send(config(), tiny_base(), blocks(count=3), tmp_path) == {}
    assert "at least 16 samples" in logged(capsys)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks statistics were made of, each time."""
    counts: list[int] = []

    def counted(
        base: LoadedBase, found: Sequence[Block], targets: Sequence[str] | str, progress: Callable[[int, int], None]
    ) -> DataStatistics:
        counts.append(len(found))
        return data_statistics(base, found, targets, progress=progress)

    monkeypatch.setattr("fedmoe.cli.worker_setup.data_statistics", counted)
    return counts


def test_the_same_data_are_looked_at_once(tmp_path: Path, made: list[int]) -> None:
    folder = tmp_path / "statistics"
    first = statistics_to_send(config(), tiny_base(), blocks(), folder)
    assert statistics_to_send(config(), tiny_base(), blocks(), folder) == first
    assert len(made) == 1


def test_other_data_or_other_modules_are_looked_at_and_only_the_newest_are_kept(
    tmp_path: Path, made: list[int]
) -> None:
    folder = tmp_path / "statistics"
    first = statistics_to_send(config(), tiny_base(), blocks(), folder)
    fewer = statistics_to_send(config(), tiny_base(), blocks()[1:], folder)
    assert fewer != first
    statistics_to_send(config(target_modules=("q_proj",)), tiny_base(), blocks(), folder)
    assert len(made) == 3
    assert len(list(folder.iterdir())) == 2


def test_the_log_says_what_the_statistics_rest_on_and_that_they_are_thin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    statistics_to_send(config(), tiny_base(), blocks(), tmp_path)
    lines = logged(capsys)
    assert "of_samples=24" in lines
    assert "of_tokens=480" in lines
    assert "fewer than 1,024" in lines
    for _ in ("of a first start", "of one that finds them kept"):
        assert "thin_statistics" in lines
        statistics_to_send(config(), tiny_base(), blocks(), tmp_path)
        lines = logged(capsys)


def test_enough_tokens_are_not_called_thin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    statistics_to_send(config(), tiny_base(), blocks(count=120), tmp_path)
    assert "thin_statistics" not in logged(capsys)


def test_kept_statistics_that_were_damaged_are_made_anew(
    tmp_path: Path, made: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = statistics_to_send(config(), tiny_base(), blocks(), tmp_path)
    damaged = min(tmp_path.glob("moments-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    assert statistics_to_send(config(), tiny_base(), blocks(), tmp_path) == first
    assert len(made) == 2
    assert "kept_statistics_damaged" in logged(capsys)


def test_kept_statistics_that_cannot_be_read_are_made_anew(
    tmp_path: Path, made: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = statistics_to_send(config(), tiny_base(), blocks(), tmp_path)
    unreadable = min(tmp_path.glob("prompts-*"))
    unreadable.unlink()
    unreadable.mkdir()
    assert statistics_to_send(config(), tiny_base(), blocks(), tmp_path) == first
    assert len(made) == 2
    assert "kept_statistics_unreadable" in logged(capsys)


def test_a_folder_that_cannot_be_written_is_logged_and_not_fatal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert statistics_to_send(config(), tiny_base(), blocks(), tmp_path / "file") != {}
    assert "statistics_not_kept" in logged(capsys)


# A whole worker.


@pytest.fixture
def worked(tmp_path: Path, house: Federation, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs `fedmoe worker` for two steps on so many samples."""
    monkeypatch.setattr("fedmoe.cli.worker.configure", lambda: None)
    monkeypatch.setattr(StopOnSignal, "install", lambda self: None)
    monkeypatch.delenv("FEDMOE_TOKEN", raising=False)

    def run(samples: int, *options: str) -> None:
        rows = [f'{{"prompt": "{n} and one is ", "completion": "{n + 1}"}}\n' for n in range(samples)]
        (tmp_path / "d.jsonl").write_text("".join(rows))
        fixed = ["--coordinator-url", house.url, "--worker-id", "w1", "--specialty", "python", "--base-model", "tiny"]
        state = ["--state-dir", str(tmp_path / "w1"), "--dtype", "fp32", "--device", "cpu", "--max-steps", "2"]
        main(["worker", *fixed, *state, "--lora-r", "4", "--dataset", str(tmp_path / "d.jsonl"), *options])

    return run


def kinds(house: Federation) -> list[str]:
    assert house.house is not None
    return [found.kind for found in house.house.service.journal.data_statistics()]


def test_a_worker_sends_its_statistics_once_and_the_coordinator_can_use_them(
    worked: Callable[..., None], house: Federation
) -> None:
    worked(20)
    assert [update.info["steps"] for update in house.updates()] == [2]
    assert kinds(house) == ["prompts", "moments"]
    with CoordinatorClient(house.url) as client:
        prompts, moments = client.data_statistics("python", "prompts"), client.data_statistics("python", "moments")
    assert prompts is not None
    assert moments is not None
    assert PromptStatistics.from_bytes(prompts).count == 20
    assert set(InputMoments.from_bytes(moments).modules) == {m.name for m in house.expert.manifest.layout.modules}
    worked(20)
    assert kinds(house) == ["prompts", "moments"]


@pytest.mark.parametrize(("samples", "options"), [(20, ["--no-send-statistics"]), (5, [])])
def test_a_worker_trains_without_statistics(
    worked: Callable[..., None], house: Federation, samples: int, options: list[str]
) -> None:
    worked(samples, *options)
    assert [update.info["steps"] for update in house.updates()] == [2]
    assert kinds(house) == []


def test_a_worker_trains_on_while_its_statistics_find_no_way(
    worked: Callable[..., None], house: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise AWAY

    monkeypatch.setattr(CoordinatorClient, "push_data_statistics", away)
    began = time.monotonic()
    worked(20, "--max-unsynced", "1")
    assert time.monotonic() - began < 20
    assert [update.info["steps"] for update in house.updates()] == [2]
    assert kinds(house) == []
