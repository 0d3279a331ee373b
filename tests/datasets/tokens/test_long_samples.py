"""Rows longer than the length: the question stays, nothing is learned twice, nothing is lost without being counted."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import make_tokenizer

from fedmoe.datasets.formats.samples import Chat, Message, Text
from fedmoe.datasets.tokens.tokenization import LONG_ROW_POLICIES, LongRowPolicy, fit, tokenize_samples
from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample

TOKENIZER = make_tokenizer(
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def sample_of(*runs: tuple[int, bool]) -> TokenizedSample:
    """Runs of tokens, learned or not; token `i` of the sample has the id `i`."""
    learned = np.concatenate([np.full(length, flag) for length, flag in runs])
    ids = np.arange(len(learned), dtype=np.int64)
    return TokenizedSample(ids, np.where(learned, ids, MASKED))


def chat(*contents: str) -> Chat:
    roles = ("user", "assistant")
    return Chat(1, tuple(Message(roles[i % 2], text) for i, text in enumerate(contents)))


def test_long_text_is_split_without_loss() -> None:
    data = tokenize_samples([Text(1, "abcdefghij" * 10)], TOKENIZER, 32)
    assert [len(sample.input_ids) for sample in data.samples] == [32, 32, 32, 5]
    joined = np.concatenate([sample.input_ids for sample in data.samples])
    assert TOKENIZER.decode(joined.tolist()) == "abcdefghij" * 10 + "<|im_end|>"
    assert (data.counts["cut"], data.counts["split"], data.counts["lost"]) == (0, 1, 0)


def test_a_cut_answer_keeps_its_whole_question_and_no_end_mark_is_learned() -> None:
    data = tokenize_samples([chat("count to ninety", "1 2 3 4 5 6 7 8 9 " * 5)], TOKENIZER, 40)
    (sample,) = data.samples
    text = TOKENIZER.decode(sample.input_ids.tolist())
    assert text.startswith("u:count to ninety<|im_end|>a:1 2 3")
    assert len(sample.input_ids) == 40
    assert "<|im_end|>" not in TOKENIZER.decode(sample.labels[sample.labels != MASKED].tolist())
    assert data.counts["cut"] == 1
    assert data.counts["lost"] == 5 * 18 + 1 - sample.learned


def test_a_later_question_whose_answer_does_not_fit_goes_with_it() -> None:
    data = tokenize_samples([chat("a", "b", "c" * 50, "d")], TOKENIZER, 30)
    (sample,) = data.samples
    assert TOKENIZER.decode(sample.input_ids.tolist()) == "u:a<|im_end|>a:b<|im_end|>"
    assert data.counts["lost"] == 2


@pytest.mark.parametrize("long_rows", LONG_ROW_POLICIES)
def test_a_question_that_fills_the_length_alone_is_left_out_and_counted(long_rows: LongRowPolicy) -> None:
    data = tokenize_samples([chat("q" * 50, "a"), chat("q", "a")], TOKENIZER, 30, long_rows)
    assert data.too_long == [0]
    assert data.row_of == [1]


def test_split_repeats_the_question_and_learns_every_token_once() -> None:
    whole = sample_of((10, False), (100, True))
    pieces = fit(whole, 40, "split", False).pieces
    assert all(len(piece.input_ids) <= 40 for piece in pieces)
    assert all(piece.input_ids[:10].tolist() == list(range(10)) for piece in pieces)
    learned = np.concatenate([piece.labels[piece.labels != MASKED] for piece in pieces])
    assert learned.tolist() == list(range(10, 110))


def test_split_teaches_no_seam() -> None:
    pieces = fit(sample_of((10, False), (100, True)), 40, "split", False).pieces
    for piece in pieces[1:]:
        first = int(np.flatnonzero(piece.labels != MASKED)[0])
        # What comes right before the first learned token is what came before it in the row.
        assert piece.input_ids[first] == piece.input_ids[first - 1] + 1


@pytest.mark.parametrize("long_rows", LONG_ROW_POLICIES)
def test_what_fits_is_never_touched(long_rows: LongRowPolicy) -> None:
    whole = sample_of((3, False), (5, True))
    assert fit(whole, 8, long_rows, False).pieces == (whole,)
    assert fit(sample_of((8, False)), 8, long_rows, False).pieces == ()


def test_drop_leaves_long_rows_out() -> None:
    fitted = fit(sample_of((3, False), (50, True)), 20, "drop", False)
    assert fitted.pieces == ()
    assert fitted.lost == 50


runs = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=6)


@settings(max_examples=200, deadline=None)
@given(runs, st.integers(2, 60), st.sampled_from(LONG_ROW_POLICIES), st.booleans())
def test_no_piece_is_too_long_no_token_is_learned_twice_and_losses_are_counted(
    runs: list[tuple[int, bool]], max_length: int, long_rows: LongRowPolicy, running_text: bool
) -> None:
    whole = sample_of(*runs)
    fitted = fit(whole, max_length, long_rows, running_text)
    assert all(1 <= len(piece.input_ids) <= max_length for piece in fitted.pieces)
    learned = [int(token) for piece in fitted.pieces for token in piece.labels[1:][piece.labels[1:] != MASKED]]
    assert len(set(learned)) == len(learned)
    assert set(learned) <= set(whole.labels[1:].tolist()) - {MASKED}
    if not running_text:
        assert fitted.lost == whole.learned - len(learned)
        if not runs[0][1]:
            assert all(piece.input_ids[0] == 0 for piece in fitted.pieces)
