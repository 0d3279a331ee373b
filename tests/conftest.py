from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import structlog
from hypothesis import settings
from support import CoordinatorProcess

if TYPE_CHECKING:
    from live import House
    from postgres_server import PostgresServer

    from fedmoe.models.base import LoadedBase

# The same examples everywhere: a change is judged by what it changed. HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile("repeatable", derandomize=True, max_examples=50)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """Commands that run in the tests' own process set up logging for it; the next test starts without."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def coordinator_process(tmp_path: Path) -> Iterator[Callable[..., CoordinatorProcess]]:
    """Makes coordinator processes on one state directory; every one of them is ended by its own process id."""
    made: list[CoordinatorProcess] = []

    def make(arguments: Sequence[str] = (), fresh: bool = False) -> CoordinatorProcess:
        made.append(CoordinatorProcess(tmp_path / "state", arguments=arguments, fresh=fresh))
        return made[-1]

    yield make
    for process in made:
        if process.process is not None:
            process.kill()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    """An open coordinator without tokens and without experts."""
    from live import open_house

    with open_house(tmp_path) as opened:
        yield opened


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for all tests of a process; each asks it for databases of its own."""
    from postgres_server import PostgresServer

    server = PostgresServer.make()
    yield server
    server.remove()


@pytest.fixture(scope="module")
def base() -> LoadedBase:
    """The tiny base model, one for the tests of a file that leave it as it is."""
    from fedmoe.models.base import load_base

    return load_base("tiny", "cpu", "fp32")
