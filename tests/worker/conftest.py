from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from workers import Federation, federation


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Federation]:
    """A coordinator on a real socket."""
    with federation(tmp_path / "coordinator") as running:
        yield running
