from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import Outcome
from live import House, LiveServer, listening, open_house
from structlog.testing import capture_logs
from support import make_body, make_push

from fedmoe.cli import main


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """A coordinator without tokens: two experts, three updates of `python` (w1, w2, w1) and none of `sql`."""
    (tmp_path / "house").mkdir()
    # The coordinator shares this process; its log must not mix with what a command prints.
    with capture_logs(), open_house(tmp_path / "house") as opened:
        opened.register("python", "sql")
        for sequence, worker in enumerate(["w1", "w2", "w1"]):
            asyncio.run(opened.service.intake.push(*make_push(make_body(sequence), sequence, sequence, worker)))
        yield opened


@pytest.fixture
def server(house: House) -> Iterator[LiveServer]:
    """That coordinator on a socket."""
    with listening(house.app) as running:
        yield running


@pytest.fixture
def locked_server(tmp_path: Path) -> Iterator[LiveServer]:
    """A coordinator that asks for tokens, with the expert `python`."""
    (tmp_path / "locked").mkdir()
    with capture_logs(), open_house(tmp_path / "locked", tokens=True) as opened:
        opened.register("python")
        with listening(opened.app) as running:
            yield running


@pytest.fixture
def fedmoe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Runs a command inside this process, without any of FedMoE's environment variables but those set by the test."""
    for name in ("FEDMOE_TOKEN", "FEDMOE_ADMIN_TOKEN", "FEDMOE_COORDINATOR_URL"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> Outcome:
        capsys.readouterr()
        try:
            main(arguments)
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else int(left.code is not None)
        else:
            status = 0
        said = capsys.readouterr()
        return Outcome(status, said.out, said.err)

    return run
