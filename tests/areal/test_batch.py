import numpy as np
import pytest
from areal_cases import example, random_pairs
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.areal.batch import ExampleBatch, Sequences, ppo_row, scaled_advantages, sequence_row
from fedmoe.areal.config import ArealError

IDS = st.lists(st.integers(0, 99), min_size=1, max_size=5)
PAIRS = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5)


@settings(deadline=None)
@given(PAIRS)
def test_sequences_come_back_one_by_one(pairs: list[tuple[list[int], list[int]]]) -> None:
    sequences = Sequences.from_arrays(Sequences.of(pairs).arrays())
    assert [(prompt.tolist(), tokens.tolist()) for prompt, tokens in sequences] == pairs
    assert [part.tolist() for part in sequences.split(sequences.tokens.astype(np.float32))] == [t for _, t in pairs]


@settings(deadline=None)
@given(PAIRS)
def test_a_batch_comes_back_from_its_arrays(pairs: list[tuple[list[int], list[int]]]) -> None:
    batch = ExampleBatch.of([example(prompt, tokens, 0.5, version=3) for prompt, tokens in pairs])
    again = ExampleBatch.from_arrays(batch.arrays())
    for name, array in batch.arrays().items():
        np.testing.assert_array_equal(again.arrays()[name], array)
    assert again.versions.tolist() == [3] * len(pairs)


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_an_empty_prompt_or_answer_is_refused(pair: tuple[list[int], list[int]]) -> None:
    with pytest.raises(ArealError, match="number 1"):
        Sequences.of([([1], [2]), pair])


def test_no_example_is_refused() -> None:
    with pytest.raises(ArealError, match="at least one"):
        ExampleBatch.of([])


def test_an_advantage_reaches_every_token() -> None:
    batch = ExampleBatch.of([example([1], [2, 3], 0.5), example([1], [2, 3, 4], -1.0)])
    assert batch.advantages.tolist() == [0.5, 0.5, -1.0, -1.0, -1.0]


@pytest.mark.parametrize("behaviour", [[0.0], [0.0, np.nan], [0.0, -np.inf]])
def test_log_probabilities_that_do_not_fit_are_refused(behaviour: list[float]) -> None:
    with pytest.raises(ArealError, match="log-probabilities must be as many finite"):
        ExampleBatch.of([example([1], [2, 3], 1.0, np.array(behaviour, np.float32))])


def test_an_advantage_that_is_no_number_is_refused() -> None:
    with pytest.raises(ArealError, match="advantages"):
        ExampleBatch.of([example([1], [2, 3], float("inf"))])


@pytest.mark.parametrize("name", ["prompts", "tokens", "behaviour", "advantages", "rewards", "versions"])
def test_arrays_that_contradict_each_other_are_refused(name: str) -> None:
    arrays = ExampleBatch.of([example([1, 2], [3, 4], 1.0)]).arrays()
    with pytest.raises(ArealError, match="fit"):
        ExampleBatch.from_arrays({**arrays, name: np.concatenate([arrays[name], arrays[name]])})
    with pytest.raises(ArealError, match=f"needs {name}"):
        ExampleBatch.from_arrays({key: array for key, array in arrays.items() if key != name})


def test_under_token_mean_advantages_stay_as_they_are() -> None:
    batch = ExampleBatch.of([example([1], [2, 3], 0.5), example([1], [2], -1.0)])
    assert [part.tolist() for part in scaled_advantages(batch, "token_mean")] == [[0.5, 0.5], [-1.0]]


def test_under_sequence_mean_every_sequence_weighs_the_same() -> None:
    batch = ExampleBatch.of([example([1], [2] * length, 1.0) for length in (1, 2, 5)])
    sums = [float(part.sum()) for part in scaled_advantages(batch, "sequence_mean")]
    assert sums == pytest.approx([8 / 3] * 3)  # AReaL divides by 8 tokens: a third each


def test_a_row_puts_what_is_about_a_token_one_place_before_it() -> None:
    import torch

    sequences = Sequences.of(random_pairs(1))
    prompt, tokens = next(iter(sequences))
    count = len(tokens)
    values = np.arange(1, count + 1, dtype=np.float32)
    row = ppo_row(prompt, tokens, -values, values, torch.zeros(1, len(prompt) + count), 0.5, 7)
    place = len(prompt) - 1
    assert row["input_ids"][0, place + 1 :].tolist() == tokens.tolist()
    assert row["loss_mask"][0].nonzero().flatten().tolist() == list(range(place, place + count))
    assert row["logprobs"][0, place : place + count].tolist() == (-values).tolist()
    assert row["advantages"][0, place : place + count].tolist() == values.tolist()
    assert set(row["versions"][0, place : place + count].tolist()) == {7}
    assert row["loss_mask"][0, -1] == row["logprobs"][0, -1] == row["advantages"][0, -1] == 0
    assert {tensor.shape for name, tensor in row.items() if name != "rewards"} == {(1, len(prompt) + count)}
    assert sequence_row(prompt, tokens).keys() == {"input_ids", "attention_mask"}
