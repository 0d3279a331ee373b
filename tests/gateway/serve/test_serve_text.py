"""Text in pieces: nothing is lost, nothing is shown too soon."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from serve_house import tiny

from fedmoe.gateway.serve.problems import ApiError
from fedmoe.gateway.serve.text import PromptEncoder, StopStringFilter, TextStream

PROMPTER = PromptEncoder(tiny().tokenizer, 259, 100)
LETTERS = st.text(st.sampled_from("ab<"), max_size=40)
STOPS = st.lists(st.text(st.sampled_from("ab<"), min_size=1, max_size=4), max_size=4).map(tuple)


@given(st.lists(st.integers(0, 258), max_size=60))
def test_the_pieces_of_any_tokens_are_their_text(tokens: list[int]) -> None:
    stream = TextStream(PROMPTER)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) + stream.end() == PROMPTER.text(tokens)


@given(st.text(max_size=30))
def test_a_letter_is_shown_whole_or_not_at_all(text: str) -> None:
    stream = TextStream(PROMPTER)
    shown = "".join(stream.add(token) for token in tiny_tokens(text))
    assert text.startswith(shown)
    assert shown + stream.end() == text


def tiny_tokens(text: str) -> list[int]:
    return list(PROMPTER._tokenizer(text)["input_ids"])


def first_stop(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the stop string begins that is complete first, letter by letter."""
    for end in range(1, len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return min(starts)
    return None


@given(LETTERS, STOPS, st.lists(st.integers(1, 5), min_size=40, max_size=40))
def test_the_first_stop_string_ends_the_text_however_it_is_cut(
    text: str, stops: tuple[str, ...], sizes: list[int]
) -> None:
    watch, shown, rest, stopped = StopStringFilter(stops), "", text, False
    for size in sizes:
        piece, rest = rest[:size], rest[size:]
        more, stopped = watch.feed(piece)
        shown += more
        if stopped:
            break
    place = first_stop(text, stops)
    assert stopped == (place is not None)
    assert (shown if stopped else shown + watch.end()) == text[:place]


def test_what_cannot_begin_a_stop_string_is_shown_at_once() -> None:
    watch = StopStringFilter(("END",))
    assert watch.feed("the E") == ("the ", False)
    assert watch.feed("agle EN") == ("Eagle ", False)
    assert watch.feed("D") == ("", True)


def test_a_prompt_is_never_cut() -> None:
    assert len(PROMPTER.of_text("x" * 100)) == 100
    with pytest.raises(ApiError, match="100 tokens here, got 101 tokens"):
        PROMPTER.of_text("x" * 101)
    with pytest.raises(ApiError, match="from 0 to 258, got 259"):
        PROMPTER.of_tokens([259])


def test_a_chat_template_that_refuses_says_why() -> None:
    tokenizer = tiny().tokenizer
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ApiError, match="roles must alternate"):
        PromptEncoder(tokenizer, 259, 100).of_chat([{"role": "user", "content": "x"}])
    tokenizer.chat_template = None
    with pytest.raises(ApiError, match="no chat template"):
        PromptEncoder(tokenizer, 259, 100).of_chat([{"role": "user", "content": "x"}])
