"""Prompt statistics: adding parts, halves that share no sample, and bytes from a stranger."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.lora.adapter import Float64Array, FloatMatrix, ShapeError
from fedmoe.lora.prompt_statistics import (
    DIRECTIONS,
    FeatureMoments,
    PromptStatistics,
    add_statistics,
    orthogonal_rows,
)
from fedmoe.lora.safetensors_bytes import CodecError, MalformedError, MismatchError, encode_named, read_named


def features(rows: int, width: int, seed: int = 0) -> FloatMatrix:
    """Correlated numbers far from zero."""
    draws = np.random.default_rng(seed)
    found = draws.standard_normal((rows, width)) @ draws.standard_normal((width, width)) + 5
    return found.astype(np.float32)


def covariance(moments: FeatureMoments) -> Float64Array:
    spread = moments.spread.astype(np.float64)
    return np.asarray(spread.T @ spread + np.diag(moments.rest), np.float64)


def assert_same(left: FeatureMoments, right: FeatureMoments) -> None:
    assert left.count == right.count
    np.testing.assert_allclose(left.mean, right.mean, rtol=1e-5, atol=1e-5)
    size = float(np.abs(covariance(right)).max())
    np.testing.assert_allclose(covariance(left), covariance(right), atol=2e-5 * size + 1e-9)


@given(st.integers(1, 12), st.integers(1, 8), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_moments_are_the_mean_and_the_covariance(rows: int, width: int, seed: int) -> None:
    given_rows = features(rows, width, seed)
    moments = FeatureMoments.of(given_rows, rows)
    np.testing.assert_allclose(moments.mean, given_rows.mean(axis=0, dtype=np.float64), rtol=1e-5)
    expected = np.cov(given_rows.T.astype(np.float64), bias=True).reshape(width, width)
    np.testing.assert_allclose(covariance(moments), expected, atol=1e-5 * float(np.abs(expected).max()) + 1e-9)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 6), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_parts_add_up_to_the_whole_in_any_order(sizes: list[int], width: int, seed: int) -> None:
    parts = [features(size, width, seed + place) for place, size in enumerate(sizes)]
    whole = FeatureMoments.of(np.concatenate(parts), sum(sizes))
    moments = [FeatureMoments.of(part, len(part)) for part in parts]
    assert_same(FeatureMoments.add(moments), whole)
    assert_same(FeatureMoments.add(moments[::-1]), whole)


def test_what_goes_beyond_the_kept_directions_stays_on_the_diagonal() -> None:
    given_rows = features(150, 90)
    moments = FeatureMoments.of(given_rows, 150)
    assert moments.spread.shape == (DIRECTIONS, 90)
    expected = np.cov(given_rows.T.astype(np.float64), bias=True)
    np.testing.assert_allclose(np.diag(covariance(moments)), np.diag(expected), rtol=1e-4)
    plain_diagonal = np.linalg.norm(expected - np.diag(np.diag(expected)))
    assert np.linalg.norm(covariance(moments) - expected) < 0.2 * plain_diagonal
    halves = [FeatureMoments.of(half, len(half)) for half in (given_rows[:70], given_rows[70:])]
    added = FeatureMoments.add(halves)
    np.testing.assert_allclose(np.diag(covariance(added)), np.diag(expected), rtol=1e-4)


def test_the_bytes_are_bounded_however_many_prompts_there_are() -> None:
    width = 80
    sizes = [len(PromptStatistics.of(features(rows, width)).to_bytes()) for rows in (300, 600)]
    assert max(sizes) < 2 * (DIRECTIONS + 2) * width * 4 + 1000
    assert abs(sizes[0] - sizes[1]) < 100


@pytest.mark.parametrize(("rows", "width"), [(3, 7), (7, 3), (4, 4)])
def test_orthogonal_rows_keep_the_gram_matrix(rows: int, width: int) -> None:
    given_rows = features(rows, width).astype(np.float64)
    found = orthogonal_rows(given_rows)
    assert found.shape[0] <= min(rows, width)
    np.testing.assert_allclose(found.T @ found, given_rows.T @ given_rows, rtol=1e-9, atol=1e-9)
    gram = found @ found.T
    np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-9 * gram.max())


def test_beginnings_of_one_text_stay_in_one_half() -> None:
    rows = features(12, 3)
    texts = [0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 4, 4]
    statistics = PromptStatistics.of(rows, texts)
    first = np.isin(texts, [0, 2, 4])
    assert_same(statistics.first, FeatureMoments.of(rows[first], 3))
    assert_same(statistics.second, FeatureMoments.of(rows[~first], 2))
    assert statistics.count == 5
    assert_same(statistics.together(), FeatureMoments.add([statistics.first, statistics.second]))


def test_statistics_of_several_workers_add_half_by_half() -> None:
    parts = [PromptStatistics.of(features(6, 4, seed)) for seed in (1, 2)]
    added = add_statistics(parts)
    assert_same(added.first, FeatureMoments.add([part.first for part in parts]))
    assert_same(added.second, FeatureMoments.add([part.second for part in parts]))


def test_bytes_give_the_same_statistics_back() -> None:
    before = PromptStatistics.of(features(9, 5))
    after = PromptStatistics.from_bytes(before.to_bytes())
    for left, right in ((before.first, after.first), (before.second, after.second)):
        assert left.count == right.count
        for name in ("mean", "spread", "rest"):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name))


def test_statistics_do_not_change() -> None:
    statistics = PromptStatistics.of(features(4, 3))
    with pytest.raises(ValueError, match="read-only"):
        statistics.first.mean[0] = 1


def body(change: dict[str, object], metadata: dict[str, str] | None = None) -> bytes:
    """Right statistics with some tensors replaced, and some metadata."""
    tensors = dict(read_named(PromptStatistics.of(features(6, 3)).to_bytes()))
    for name, values in change.items():
        if values is None:
            del tensors[name]
        else:
            tensors[name] = np.asarray(values, np.float32)
    known = {"format": "fedmoe-prompt-statistics", "version": "2", "first": "3", "second": "3"}
    return encode_named(tensors, known | (metadata or {}))


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"not safetensors", CodecError, "header claims"),
        (body({}, {"format": "another"}), MismatchError, "not prompt statistics"),
        (body({}, {"version": "1"}), MismatchError, "version '1' cannot be compared with those of version 2"),
        (body({"first.mean": None}), MismatchError, "each half needs"),
        (body({"extra": [1.0]}), MismatchError, "each half needs"),
        (body({}, {"first": "-3"}), MalformedError, "whole numbers"),
        (body({}, {"second": "9" * 40}), MalformedError, "whole numbers"),
        (body({}, {"second": "0"}), ValueError, "at least one sample"),
        (body({"first.mean": [1.0, float("nan"), 0.0]}), ValueError, "NaN"),
        (body({"first.rest": [1.0, -1.0, 0.0]}), ValueError, "negative variance"),
        (body({"first.mean": [1.0, 2.0]}), ShapeError, "are needed, got shapes"),
        (body({"first.mean": [[1.0, 2.0, 3.0]]}), ShapeError, "are needed, got shapes"),
        (body({"first.spread": np.ones((4, 3))}), ShapeError, "are needed, got shapes"),
        (body({"first.spread": np.ones((0, 3))}), ShapeError, "are needed, got shapes"),
        (
            body({"first.mean": [1.0], "first.spread": [[1.0]], "first.rest": [0.0]}),
            ShapeError,
            "halves have features of width 1 and 3",
        ),
    ],
)
def test_bytes_from_a_stranger_are_refused_with_a_reason(data: bytes, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        PromptStatistics.from_bytes(data)


def test_what_cannot_be_statistics_is_refused() -> None:
    with pytest.raises(ShapeError, match="at least two samples, got 1"):
        PromptStatistics.of(features(3, 2), [7, 7, 7])
    with pytest.raises(ShapeError, match="every row of features needs its sample"):
        PromptStatistics.of(features(3, 2), [1, 2])
    with pytest.raises(ShapeError, match=r"widths \[2, 3\]"):
        add_statistics([PromptStatistics.of(features(4, width)) for width in (2, 3)])
    with pytest.raises(ShapeError, match="no statistics"):
        add_statistics([])
