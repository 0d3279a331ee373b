"""What a worker tells of its data reaches the coordinator, whatever happens on the way, and holds up nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from workers import Federation, blocks, tiny_base

from fedmoe.cli import main
from fedmoe.datasets.tokens.packing import Block, collate
from fedmoe.lora.moments import InputMoments
from fedmoe.lora.prompt_statistics import PromptStatistics
from fedmoe.models.base import LoadedBase
from fedmoe.models.training_config import LoraConfig, TrainingConfig
from fedmoe.qwen_finetune import QwenLoRAExpert
from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.stop_signals import StopOnSignal
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import DataStatisticsHeader, StatisticsKind
from fedmoe.worker.disclosure import Disclosure, StatisticsSender
from fedmoe.worker.statistics import StatisticsPass, data_statistics

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
    monkeypatch.setattr("fedmoe.worker.disclosure._LAST_WAIT_SECONDS", 0.1)
    disclosure = Scripted([AWAY] * 1000).disclosure()
    began = time.monotonic()
    disclosure.finish(3600.0, lambda: True)
    assert time.monotonic() - began < 60


# What is disclosed.


class Recorder:
    """Stands for the sender: what was to be sent, if anything."""

    def __init__(self) -> None:
        self.bodies: Mapping[StatisticsKind, bytes] = {}

    def send(self, bodies: Mapping[StatisticsKind, bytes]) -> StatisticsSender:
        assert not self.bodies, "sent once"
        self.bodies = bodies
        return cast(StatisticsSender, SimpleNamespace(start=lambda: None, finish=lambda *_: None, close=lambda: None))


def disclosed(
    folder: Path, found: list[Block], targets: str | tuple[str, ...] = "all-linear"
) -> Mapping[StatisticsKind, bytes]:
    """What a worker with these data has sent by its end."""
    recorder = Recorder()
    disclosure = Disclosure(tiny_base(), found, targets, folder, recorder.send)
    disclosure.registered()
    disclosure.finish(nullcontext, 30.0, lambda: False)
    return recorder.bodies


def test_the_statistics_of_the_training_blocks_are_sent(tmp_path: Path) -> None:
    assert disclosed(tmp_path, blocks()) == data_statistics(tiny_base(), blocks(), "all-linear").to_bytes()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_made_between_training_steps_they_are_the_same_and_so_is_the_training(
    tmp_path: Path, checkpointing: bool
) -> None:
    lora, training = LoraConfig(lora_dropout=0.1), TrainingConfig(gradient_checkpointing=checkpointing)
    recorder, base, weights = Recorder(), tiny_base(), []
    disclosure = Disclosure(base, blocks(), "all-linear", tmp_path, recorder.send)
    for trained_on, tells in ((base, True), (tiny_base(), False)):
        torch.manual_seed(0)
        expert = QwenLoRAExpert(trained_on, lora, training)
        for step in range(12):
            expert.train_step([collate(blocks()[step % 3 : step % 3 + 2])])
            if tells:
                disclosure.advance(expert.bare_base, 60)
        weights.append(expert.weights())
    assert recorder.bodies == data_statistics(tiny_base(), blocks(), "all-linear").to_bytes()
    np.testing.assert_array_equal(weights[0], weights[1])


def test_a_part_is_about_as_much_work_as_it_is_told_and_there_is_an_end(tmp_path: Path) -> None:
    recorder = Recorder()
    disclosure = Disclosure(tiny_base(), blocks(count=120), "all-linear", tmp_path, recorder.send)
    counts = []
    for tokens in (1, 10_000):
        count = 0
        while not recorder.bodies:
            disclosure.advance(nullcontext, tokens)
            count += 1
        counts.append(count)
        recorder = Recorder()
        for file in tmp_path.iterdir():
            file.unlink()
        disclosure = Disclosure(tiny_base(), blocks(count=120), "all-linear", tmp_path, recorder.send)
    assert counts[0] > 4
    assert counts[1] == 1


def test_who_was_told_to_stop_makes_them_at_the_next_start(tmp_path: Path) -> None:
    recorder = Recorder()
    disclosure = Disclosure(tiny_base(), blocks(), "all-linear", tmp_path, recorder.send)
    disclosure.registered()
    disclosure.advance(nullcontext, 1)
    disclosure.finish(nullcontext, 30.0, lambda: True)
    assert (recorder.bodies, list(tmp_path.iterdir())) == ({}, [])
    assert disclosed(tmp_path, blocks()) == data_statistics(tiny_base(), blocks(), "all-linear").to_bytes()


def test_without_memory_for_them_training_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @contextmanager
    def full() -> Iterator[None]:
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    recorder = Recorder()
    disclosure = Disclosure(tiny_base(), blocks(), "all-linear", tmp_path, recorder.send)
    disclosure.advance(full, 1)
    assert "no memory for them" in logged(capsys)
    disclosure.finish(nullcontext, 30.0, lambda: False)
    assert recorder.bodies == {}


def test_too_little_data_is_logged_and_not_fatal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert disclosed(tmp_path, blocks(count=3)) == {}
    assert "at least 16 samples" in logged(capsys)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blocks statistics were made of, each time."""
    counts: list[int] = []

    class Counted(StatisticsPass):
        def __init__(self, base: LoadedBase, found: Sequence[Block], *others: Any, **named: Any) -> None:
            counts.append(len(found))
            super().__init__(base, found, *others, **named)

    monkeypatch.setattr("fedmoe.worker.disclosure.StatisticsPass", Counted)
    return counts


def test_the_same_data_are_looked_at_once(tmp_path: Path, made: list[int]) -> None:
    folder = tmp_path / "statistics"
    first = disclosed(folder, blocks())
    assert disclosed(folder, blocks()) == first
    assert len(made) == 1


def test_other_data_or_other_modules_are_looked_at_and_only_the_newest_are_kept(
    tmp_path: Path, made: list[int]
) -> None:
    folder = tmp_path / "statistics"
    first = disclosed(folder, blocks())
    fewer = disclosed(folder, blocks()[1:])
    assert fewer != first
    disclosed(folder, blocks(), ("q_proj",))
    assert len(made) == 3
    assert len(list(folder.iterdir())) == 2


def test_the_log_says_what_the_statistics_rest_on_and_that_they_are_thin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    disclosed(tmp_path, blocks())
    lines = logged(capsys)
    assert "of_samples=24" in lines
    assert "of_tokens=480" in lines
    assert "fewer than 1,024" in lines
    for _ in ("of a first start", "of one that finds them kept"):
        assert "thin_statistics" in lines
        disclosed(tmp_path, blocks())
        lines = logged(capsys)


def test_enough_tokens_are_not_called_thin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    disclosed(tmp_path, blocks(count=120))
    assert "thin_statistics" not in logged(capsys)


def test_kept_statistics_that_were_damaged_are_made_anew(
    tmp_path: Path, made: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = disclosed(tmp_path, blocks())
    damaged = min(tmp_path.glob("moments-*"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    assert disclosed(tmp_path, blocks()) == first
    assert len(made) == 2
    assert "kept_statistics_damaged" in logged(capsys)


def test_kept_statistics_that_cannot_be_read_are_made_anew(
    tmp_path: Path, made: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    first = disclosed(tmp_path, blocks())
    unreadable = min(tmp_path.glob("prompts-*"))
    unreadable.unlink()
    unreadable.mkdir()
    assert disclosed(tmp_path, blocks()) == first
    assert len(made) == 2
    assert "kept_statistics_unreadable" in logged(capsys)


def test_a_folder_that_cannot_be_written_is_logged_and_not_fatal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    assert disclosed(tmp_path / "file", blocks()) != {}
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
