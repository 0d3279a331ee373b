from __future__ import annotations

from collections.abc import Iterator

import pytest
from live import House, LiveServer, listening

from fedmoe.wire.client import CoordinatorClient


@pytest.fixture
def server(house: House) -> Iterator[LiveServer]:
    """That coordinator on a socket."""
    with listening(house.app) as running:
        yield running


@pytest.fixture
def client(server: LiveServer) -> Iterator[CoordinatorClient]:
    """A client of that coordinator; it tries everything once."""
    with CoordinatorClient(server.url, attempts=1) as made:
        yield made
