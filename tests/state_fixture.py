"""State directories made by commit b5c47da, which every later build must open with the same weights."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

_FIXTURES = Path(__file__).parent / "fixtures"
#: By name: the coordinator's options, and what its experts and gateway were.
EXPECTED = json.loads((_FIXTURES / "state_b5c47da.json").read_text())


def unpacked(folder: Path, name: str) -> Path:
    """One of the state directories, as its coordinator left it."""
    with tarfile.open(_FIXTURES / "state_b5c47da.tar.gz") as archive:
        members = [member for member in archive.getmembers() if member.name.split("/")[0] == name]
        archive.extractall(folder / "old", members=members, filter="data")
    return folder / "old" / name
