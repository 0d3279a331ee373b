"""Readers of bytes from outside take any bytes: the short form of what scripts/fuzz.sh does for minutes."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from fuzz_targets import TARGETS, seeds

CORPUS = Path(__file__).parent / "corpus"
_TOKENS = [b"{", b"}", b"[", b'"', b",", b":", b"\n", b"\0", b"\xff", b"null", b"1e999", b"NaN", b"\\ud800", b"9" * 25]


def mutated(moves: random.Random, data: bytes, other: bytes) -> bytes:
    """Bytes near to `data`."""
    changed = bytearray(data)
    for _ in range(moves.choice([1, 1, 2, 4, 16])):
        at = moves.randrange(len(changed) + 1)
        until = min(len(changed), at + moves.choice([0, 1, 1, 4, 32]))
        kind = moves.randrange(4)
        if kind == 0:
            changed[at:until] = moves.choice(_TOKENS)
        elif kind == 1:
            changed[at:until] = moves.randbytes(until - at)
        elif kind == 2:
            changed[at:at] = changed[at:until]
        else:
            start = moves.randrange(len(other) + 1)
            changed[at:until] = other[start : start + moves.choice([1, 8, 64])]
    return bytes(changed)


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_are_read_or_refused_in_words(name: str) -> None:
    """Fault 29. 26 to 34, 61, 62, 73: no exception but the documented refusals."""
    moves, target = random.Random(name), TARGETS[name]
    kept = [path.read_bytes() for path in sorted((CORPUS / name).glob("*"))]
    inputs = [*seeds(name), *kept, b""]
    for data in inputs:
        target(data)
    for _ in range(400):
        target(mutated(moves, moves.choice(inputs), moves.choice(inputs)))


def test_a_reader_that_fails_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fuzz_targets.read_named", lambda data: dict[int, int]()[len(data)])
    with pytest.raises(KeyError):
        TARGETS["container"](seeds("container")[0])
