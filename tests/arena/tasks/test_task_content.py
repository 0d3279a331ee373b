"""What a question is about: the same in another order, case or wording, and not another question."""

from __future__ import annotations

import pytest

from fedmoe.arena.tasks.content import ContentRule

NUMBERS = ContentRule("numbers")


@pytest.mark.parametrize(
    "question",
    [
        "7 * 3",
        "What is 3 x 7?",
        "3×7 =",
        "seven? no: 3 times 7",
        "Multiply.\n 7*03",
        "7.0 multiplied by 3",
    ],
)
def test_the_same_product_is_the_same_content_however_it_is_put(question: str) -> None:
    assert NUMBERS.key(question) == NUMBERS.key("Solve the following multiplication: 3 * 7. Give only the result.")


@pytest.mark.parametrize("question", ["3 + 7", "3 * 8", "3 * 7 * 7", "37", "3 * 0.7", "1,003 * 7"])
def test_another_problem_is_another_content(question: str) -> None:
    assert NUMBERS.key(question) != NUMBERS.key("3 * 7")


def test_hyphens_between_words_are_no_operators_and_thousands_no_other_numbers() -> None:
    assert NUMBERS.key("pick the largest/smallest of 1,000 - 5, day-of-week") == NUMBERS.key("1000 - 5")


@pytest.mark.parametrize(
    ("questions", "kind"),
    [
        ([f"{put} {a} and {b}" for a in range(9) for b in range(9) for put in ("Add", "What is")], "numbers"),
        ([f"Spell {a}{b} backward, in 1 line." for a in "abcdefgh" for b in "xyzuvw"], "words"),
        ([f"Sort {' '.join(f'{n:06b}')}" for n in range(64)], "text"),
    ],
)
def test_the_coarsest_reading_that_tells_questions_apart_is_taken(questions: list[str], kind: str) -> None:
    assert ContentRule.of(questions).kind == kind


def test_common_words_are_no_content() -> None:
    pairs = [(a, b) for a in "klmnopqrstuv" for b in "abcdefghij"]
    reading = ContentRule.of([f"{put} {a} related to {b}?" for a, b in pairs for put in ("How is", "Tell me: is")])
    assert reading.key("How is K related to J?") == reading.key("Tell me: is j related to k?")
    assert reading.key("How is K related to J?") != reading.key("How is K related to I?")
