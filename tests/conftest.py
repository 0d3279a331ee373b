from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import structlog
from support import CoordinatorProcess


@pytest.fixture(autouse=True)
def logs_as_they_were() -> Iterator[None]:
    """Commands that run in the tests' own process set up logging for it; the next test starts without."""
    yield
    structlog.reset_defaults()


@pytest.fixture
def coordinator_process(tmp_path: Path) -> Iterator[Callable[..., CoordinatorProcess]]:
    """Makes coordinator processes on one state directory; every one of them is ended by its own process id."""
    made: list[CoordinatorProcess] = []

    def make(arguments: Sequence[str] = ()) -> CoordinatorProcess:
        made.append(CoordinatorProcess(tmp_path / "state", arguments=arguments))
        return made[-1]

    yield make
    for process in made:
        if process.process is not None:
            process.kill()
