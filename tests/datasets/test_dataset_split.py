"""Held-out rows are chosen by what they hold."""

from __future__ import annotations

import pytest

from fedmoe.datasets.errors import DataError
from fedmoe.datasets.formats import Chat, Message, Text
from fedmoe.datasets.split import is_held_out, split_rows


def rows(count: int, first_line: int = 1) -> list[Text]:
    return [Text(first_line + n, f"row number {n}") for n in range(count)]


def test_about_the_fraction_is_held_out_and_nothing_is_lost() -> None:
    train, held_out = split_rows(rows(2000), 0.1)
    assert 150 < len(held_out) < 250
    assert sorted(row.line for row in train + held_out) == list(range(1, 2001))


def test_a_row_stays_on_its_side_when_data_grow_or_move() -> None:
    _, before = split_rows(rows(200), 0.2)
    _, after = split_rows([*rows(100, 900)[::-1], *rows(400)], 0.2)
    assert {row.text for row in before if isinstance(row, Text)} <= {row.text for row in after if isinstance(row, Text)}


def test_equal_rows_are_on_the_same_side_and_what_they_say_counts() -> None:
    chats = [Chat(n, (Message("user", f"{n // 2}"), Message("assistant", "yes"))) for n in range(200)]
    sides = [is_held_out(chat, 0.5) for chat in chats]
    assert sides[::2] == sides[1::2]
    assert 20 < sum(sides[::2]) < 80


@pytest.mark.parametrize(("count", "fraction", "words"), [(3, 1e-6, "no row held out"), (1, 0.999999, "nothing to")])
def test_a_side_without_rows_names_the_option(count: int, fraction: float, words: str) -> None:
    with pytest.raises(DataError, match=f"--eval-split .*{words}.*--eval-dataset FILE"):
        split_rows(rows(count), fraction)
