from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from live import House, LiveServer, listening, open_house
from starlette.testclient import TestClient


@pytest.fixture
def locked_house(tmp_path: Path) -> Iterator[House]:
    """A coordinator that asks for tokens."""
    with open_house(tmp_path, tokens=True) as opened:
        yield opened


@pytest.fixture
def http(house: House) -> Iterator[TestClient]:
    """The open coordinator with the expert `python`, without a socket."""
    house.register("python")
    with house.client() as client:
        yield client


@pytest.fixture
def server(house: House) -> Iterator[LiveServer]:
    """The open coordinator with the expert `python`, on a socket."""
    house.register("python")
    with listening(house.app) as running:
        yield running
