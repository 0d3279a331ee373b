"""Held-out rows are chosen by what they hold."""

from __future__ import annotations

import numpy as np
import pytest

from fedmoe.datasets.formats.samples import Chat, Completion, Message, Text
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.row_scan import RowHashes, held_out_rows, row_hash


def hashes(*numbers: int) -> RowHashes:
    return np.array([row_hash(Text(line, f"row number {n}")) for line, n in enumerate(numbers, 1)], np.uint64)


def test_a_rows_hash_stays_the_same_in_every_release() -> None:
    """Another hash would move rows that were held out into the training data of a worker that goes on."""
    chat = Chat(
        1,
        (Message("user", "hi", extras={"name": "x"}), Message("assistant", "yo", False)),
        ({"f": 1},),
        {"k": 2},
    )
    samples = (Text(1, "né"), Completion(2, "a", "b", "file"), chat)
    assert [row_hash(sample) for sample in samples] == [
        14919178980385089625,
        2702107458514412685,
        6786096766613179020,
    ]


def test_about_the_fraction_is_held_out() -> None:
    assert 150 < held_out_rows(hashes(*range(2000)), 0.1).sum() < 250


def test_a_row_stays_on_its_side_when_data_grow_or_move() -> None:
    before = held_out_rows(hashes(*range(200)), 0.2)
    after = held_out_rows(hashes(*range(399, -1, -1)), 0.2)[::-1]
    assert before.tolist() == after[:200].tolist()


def test_equal_rows_are_on_the_same_side_and_what_they_say_counts() -> None:
    chats = [Chat(n, (Message("user", f"{n // 2}"), Message("assistant", "yes")), file=f"{n}") for n in range(200)]
    sides = held_out_rows(np.array([row_hash(chat) for chat in chats], np.uint64), 0.5)
    assert sides[::2].tolist() == sides[1::2].tolist()
    assert 20 < sides[::2].sum() < 80


@pytest.mark.parametrize(("count", "fraction", "words"), [(3, 1e-6, "no row held out"), (1, 0.999999, "nothing to")])
def test_a_side_without_rows_names_the_option(count: int, fraction: float, words: str) -> None:
    with pytest.raises(DataError, match=f"--eval-split .*{words}.*--eval-dataset FILE"):
        held_out_rows(hashes(*range(count)), fraction)
