from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lora_cases import laws, seeds
from numpy.typing import NDArray

from fedmoe.lora.adapter import ShapeError
from fedmoe.lora.moments import (
    LEAST_TOKENS,
    Gram,
    InputMoments,
    ModuleMoments,
    merge_moments,
    omega,
    pad_thin_grams,
    sum_of_grams,
    thin,
    thin_notes,
)
from fedmoe.lora.safetensors_bytes import MalformedError, MismatchError, encode_named, read_named

Matrix = NDArray[np.float64]

KIND = "fedmoe-weighted-input-moments"


def gram_of(inputs: Matrix) -> Matrix:
    product: Matrix = inputs.T @ inputs / len(inputs)
    return product


def module_moments(gram: Matrix, name: str, columns: int, seed: int = 0) -> ModuleMoments:
    sketch = gram @ omega(seed, name, len(gram), columns)
    return ModuleMoments(np.diagonal(gram).astype(np.float32), sketch.astype(np.float32))


def moments(inputs: Matrix, names: list[str], columns: int, seed: int = 0) -> InputMoments:
    gram = gram_of(inputs)
    return InputMoments({name: module_moments(gram, name, columns, seed) for name in names}, len(inputs), seed)


def decaying(features: int, power: float, seed: int) -> Matrix:
    """Inputs whose second moments have eigenvalues i^-power in random directions."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((features, features)))[0]
    sizes = np.arange(1, features + 1) ** (-power / 2)
    inputs: Matrix = rng.standard_normal((4 * features, features)) * sizes @ basis.T
    return inputs


def error(approximate: Gram, gram: Matrix) -> float:
    return float(np.linalg.norm(approximate.dense() - gram) / np.linalg.norm(gram))


def test_omega_is_the_same_for_ever() -> None:
    drawn = omega(3, "layers.0.q_proj", 5, 3)
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    assert hashlib.sha256(drawn.astype("<f4").tobytes()).hexdigest()[:16] == "54aa7a87e13d0151"
    assert not np.array_equal(omega(4, "layers.0.q_proj", 64, 8), omega(3, "layers.0.q_proj", 64, 8))
    assert not np.array_equal(omega(3, "layers.1.q_proj", 64, 8), omega(3, "layers.0.q_proj", 64, 8))


def test_omega_is_even_and_unrelated_between_columns() -> None:
    drawn = omega(0, "m", 20_000, 4).astype(np.float64)
    assert np.abs(gram_of(drawn) - np.eye(4)).max() < 0.04
    assert np.abs(drawn.mean(axis=0)).max() < 0.04


@pytest.mark.parametrize(("seed", "columns"), [(-1, 2), (0, 0), (0, 6)])
def test_an_omega_that_cannot_be_is_refused(seed: int, columns: int) -> None:
    with pytest.raises(ValueError, match="1 to 5 columns"):
        omega(seed, "m", 5, columns)


@laws
@given(seeds, st.integers(1, 12), st.integers(1, 20))
def test_as_many_columns_as_features_keep_everything(seed: int, features: int, tokens: int) -> None:
    inputs = np.random.default_rng(seed).standard_normal((tokens, features))
    known = moments(inputs, ["m"], features)
    np.testing.assert_array_equal(known.modules["m"].sketch, gram_of(inputs).astype(np.float32))
    assert error(known.approximate("m"), gram_of(inputs)) < 1e-5


@laws
@given(seeds, st.integers(20, 60), st.integers(1, 6))
def test_inputs_in_few_directions_are_known_from_few_columns(seed: int, features: int, directions: int) -> None:
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((100, directions)) @ rng.standard_normal((directions, features))
    assert error(moments(inputs, ["m"], 16).approximate("m"), gram_of(inputs)) < 1e-3


@laws
@given(seeds, st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.integers(1, 30))
def test_an_approximation_is_positive_and_has_the_right_diagonal(seed: int, power: float, columns: int) -> None:
    gram = gram_of(decaying(30, power, seed))
    found = moments(decaying(30, power, seed), ["m"], columns).approximate("m")
    assert (found.diagonal >= 0).all()
    np.testing.assert_allclose(found.full_diagonal, np.diagonal(gram), rtol=1e-4, atol=1e-5 * gram.max())


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_more_columns_come_closer(power: float) -> None:
    inputs = decaying(200, power, 0)
    gram = gram_of(inputs)
    diagonal_alone = float(np.linalg.norm(gram - np.diag(np.diagonal(gram))) / np.linalg.norm(gram))
    errors = [error(moments(inputs, ["m"], columns).approximate("m"), gram) for columns in (8, 32, 96)]
    assert diagonal_alone > errors[0] > errors[1] > errors[2]


def test_modules_with_one_input_help_each_other() -> None:
    inputs = decaying(200, 1.0, 0)
    gram = gram_of(inputs)
    alone = moments(inputs, ["q"], 16)
    three = moments(inputs, ["q", "k", "v"], 16)
    other = moments(decaying(200, 1.0, 1), ["down"], 16).modules["down"]
    both = InputMoments({**three.modules, "down": other}, 800, 0)
    assert both.groups == (("down",), ("k", "q", "v"))
    assert both.group_of["v"] == ("k", "q", "v")
    assert error(both.approximate("q"), gram) < 0.7 * error(alone.approximate("q"), gram)
    np.testing.assert_array_equal(both.approximate("q").factor, both.approximate("v").factor)


def test_shared_columns_may_be_more_than_the_features() -> None:
    inputs = decaying(20, 1.0, 0)
    names = ["q", "k", "v"]
    assert error(moments(inputs, names, 12).approximate("q"), gram_of(inputs)) < 1e-4
    full = module_moments(gram_of(inputs), "v", 20)
    mixed = InputMoments({**moments(inputs, ["q", "k"], 2).modules, "v": full}, 1, 0)
    assert error(mixed.approximate("q"), gram_of(inputs)) < 1e-6


def test_inputs_of_zeros_are_fine() -> None:
    found = moments(np.zeros((5, 8)), ["m"], 3).approximate("m")
    assert not found.dense().any()


@laws
@given(seeds, st.integers(1, 20), st.integers(0, 24), st.integers(1, 5))
def test_rows_and_solutions_are_those_of_the_dense_matrix(seed: int, features: int, columns: int, rows: int) -> None:
    rng = np.random.default_rng(seed)
    gram = Gram(rng.standard_normal((features, columns)), rng.uniform(0, 2, features))
    left = rng.standard_normal((rows, features))
    np.testing.assert_allclose(gram.rows(left), left @ gram.dense(), atol=1e-10)
    np.testing.assert_allclose(gram.full_diagonal, np.diagonal(gram.dense()), atol=1e-10)
    ridged = gram.plus(0.5)
    np.testing.assert_allclose(ridged.dense(), gram.dense() + 0.5 * np.eye(features), atol=1e-12)
    np.testing.assert_allclose(ridged.rows(ridged.solve(left)), left, atol=1e-9)
    total = sum_of_grams([(0.25, gram), (3.0, ridged), (0.0, gram)])
    np.testing.assert_allclose(total.dense(), 0.25 * gram.dense() + 3 * ridged.dense(), atol=1e-10)


@laws
@given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_merged_moments_are_those_of_all_inputs(seed: int, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.standard_normal((size, 10)) for size in sizes]
    together = moments(np.vstack(parts), ["a", "b"], 4)
    merged = merge_moments([moments(part, ["a", "b"], 4) for part in parts])
    assert merged.tokens == sum(sizes)
    for name, module in together.modules.items():
        np.testing.assert_allclose(merged.modules[name].diagonal, module.diagonal, rtol=1e-5)
        np.testing.assert_allclose(merged.modules[name].sketch, module.sketch, rtol=1e-4, atol=1e-5)
    assert merged.groups == (("a", "b"),)


def test_moments_that_differ_in_kind_are_not_merged() -> None:
    inputs = decaying(10, 1.0, 0)
    usual = moments(inputs, ["m"], 4)
    with pytest.raises(ShapeError, match="seeds 0 and 1"):
        merge_moments([usual, moments(inputs, ["m"], 4, seed=1)])
    for other in (moments(inputs, ["m"], 5), moments(inputs, ["n"], 4), moments(inputs[:, :9], ["m"], 4)):
        with pytest.raises(ShapeError, match="cannot be merged"):
            merge_moments([usual, other])
    with pytest.raises(ShapeError, match="no moments"):
        merge_moments([])


def test_moments_come_back_from_bytes() -> None:
    known = moments(decaying(10, 1.0, 0), ["b", "a.c"], 4, seed=7)
    back = InputMoments.from_bytes(known.to_bytes())
    assert (back.tokens, back.seed, list(back.modules)) == (40, 7, ["a.c", "b"])
    for name, module in known.modules.items():
        np.testing.assert_array_equal(back.modules[name].diagonal, module.diagonal)
        np.testing.assert_array_equal(back.modules[name].sketch, module.sketch)
    assert back.to_bytes() == known.to_bytes()


@pytest.mark.parametrize(
    ("metadata", "error_type", "said"),
    [
        (None, MismatchError, "not a file of input moments"),
        ({"format": "pt"}, MismatchError, "not a file of input moments"),
        ({"format": KIND, "tokens": "5"}, MalformedError, "whole numbers"),
        ({"format": KIND, "tokens": "5.5", "seed": "0"}, MalformedError, "whole numbers"),
        (
            {"format": KIND, "tokens": "9" * 5000, "seed": "0"},
            MalformedError,
            "whole numbers",
        ),
        ({"format": KIND, "tokens": "²", "seed": "0"}, MalformedError, "whole numbers"),
        ({"format": KIND, "tokens": "0", "seed": "0"}, ValueError, "tokens >= 1"),
    ],
)
def test_bytes_of_something_else_are_refused(
    metadata: dict[str, str] | None, error_type: type[ValueError], said: str
) -> None:
    tensors = read_named(moments(decaying(10, 1.0, 0), ["m"], 4).to_bytes())
    with pytest.raises(error_type, match=said):
        InputMoments.from_bytes(encode_named(tensors, metadata))


def test_tensors_that_are_missing_or_foreign_are_named() -> None:
    tensors = read_named(moments(decaying(10, 1.0, 0), ["m", "n"], 4).to_bytes())
    metadata = {"format": KIND, "tokens": "1", "seed": "0"}
    with pytest.raises(MismatchError, match=r"n\.sketch"):
        InputMoments.from_bytes(encode_named({name: tensors[name] for name in list(tensors)[:-1]}, metadata))
    with pytest.raises(MismatchError, match=r"m\.lora_A"):
        InputMoments.from_bytes(encode_named({**tensors, "m.lora_A": tensors["m.sketch"]}, metadata))


def ones(*shape: int) -> NDArray[np.float32]:
    return np.ones(shape, np.float32)


@pytest.mark.parametrize(
    ("diagonal", "sketch", "said"),
    [
        (ones(3), ones(4, 2), "3 features"),
        (ones(3), ones(3, 4), "at most as many columns"),
        (ones(3), ones(3, 0), "at most as many columns"),
        (ones(3, 1), ones(3, 2), "diagonal must be float32 with 1 axes"),
        (ones(3), ones(3), "sketch must be float32 with 2 axes"),
        (ones(3), np.ones((3, 2)), "sketch must be float32"),
        (ones(3) * np.float32("nan"), ones(3, 2), "diagonal holds a NaN"),
        (ones(3), ones(3, 2) * np.float32("inf"), "sketch holds a NaN or an infinity"),
        (-ones(3), ones(3, 2), "mean of squares"),
    ],
)
def test_moments_that_no_inputs_have_are_refused(
    diagonal: NDArray[np.float32], sketch: NDArray[np.float32], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        ModuleMoments(diagonal, sketch)


def test_moments_are_values() -> None:
    known = moments(decaying(10, 1.0, 0), ["m"], 4).modules["m"]
    assert not known.diagonal.flags.writeable
    assert not known.sketch.flags.writeable
    with pytest.raises(ShapeError, match="at least one module"):
        InputMoments({}, 1, 0)
    with pytest.raises(ValueError, match="seed >= 0"):
        InputMoments({"m": known}, 1, -1)


# Few tokens.


def test_matrices_of_enough_tokens_are_left_as_they_are() -> None:
    grams = [moments(decaying(30, 1.0, seed), ["m"], 8).approximate("m") for seed in range(3)]
    assert pad_thin_grams(grams, [LEAST_TOKENS, 5_000, 90_000]) == grams
    assert pad_thin_grams(grams[:1], [3]) == grams[:1]


def test_what_few_tokens_lack_is_taken_from_the_mean_of_all_in_the_matrix_own_size() -> None:
    grams = [moments(decaying(30, 1.0, seed) * (1 + seed), ["m"], 8).approximate("m") for seed in range(3)]
    filled = pad_thin_grams(grams, [LEAST_TOKENS // 4, 5_000, 5_000])
    assert filled[1:] == grams[1:]
    sizes = [np.diagonal(gram.dense()).mean() for gram in grams]
    mean = np.mean([gram.dense() / size for gram, size in zip(grams, sizes, strict=True)], axis=0)
    np.testing.assert_allclose(filled[0].dense(), 0.25 * grams[0].dense() + 0.75 * sizes[0] * mean, rtol=1e-9)
    assert np.diagonal(filled[0].dense()).mean() == pytest.approx(sizes[0])


def test_an_input_that_was_never_heard_stays_silent() -> None:
    loud = moments(decaying(30, 1.0, 0), ["m"], 8).approximate("m")
    silent = moments(np.zeros_like(decaying(30, 1.0, 0)), ["m"], 8).approximate("m")
    filled = pad_thin_grams([silent, loud, loud], [5, 5, 5_000])
    assert np.abs(filled[0].dense()).max() == 0
    np.testing.assert_allclose(filled[1].dense(), loud.dense(), rtol=1e-9)
    assert pad_thin_grams([silent, silent], [5, 5]) == [silent, silent]


def test_thin_moments_are_named_with_how_thin_they_are() -> None:
    assert (thin(LEAST_TOKENS), thin(417)) == ("", "input moments of 417 tokens only, fewer than 1,024")
    assert thin_notes({"sql": 5_000, "docs": 417}) == (
        "docs has input moments of 417 tokens only, fewer than 1,024; the rest is taken from the mean of all experts'",
    )
    assert thin_notes({"docs": 3}) == ()
