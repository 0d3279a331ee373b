"""AReaL's packed sequences (E7): whoever sees another one, or a later token, is named."""

from collections.abc import Sequence

import numpy as np
import pytest

from fedmoe.areal.packing_check import LeakError, check_isolation
from fedmoe.lora.adapter import FloatArray

VOCABULARY = 100


def _alone(ids: Sequence[int]) -> FloatArray:
    return np.array([-np.log1p(sum(ids[: place + 1])) for place in range(1, len(ids))], np.float32)


def test_a_model_that_keeps_sequences_apart_passes() -> None:
    check_isolation(lambda sequences: [_alone(ids) for ids in sequences], VOCABULARY)


def test_sequences_that_see_the_one_before_are_named_as_the_leak() -> None:
    def leaking(sequences: Sequence[Sequence[int]]) -> list[FloatArray]:
        flat: list[int] = []
        scores = []
        for ids in sequences:
            scores.append(_alone([*flat, *ids])[len(flat) :] if flat else _alone(ids))
            flat += ids
        return scores

    with pytest.raises(LeakError, match="packed sequences see each other"):
        check_isolation(leaking, VOCABULARY)


def test_tokens_that_see_later_ones_are_named_as_the_leak() -> None:
    def looking_ahead(sequences: Sequence[Sequence[int]]) -> list[FloatArray]:
        return [_alone(ids) + np.float32(0.01 * ids[-1]) for ids in sequences]

    with pytest.raises(LeakError, match="tokens see later ones"):
        check_isolation(looking_ahead, VOCABULARY)


def test_scores_that_are_not_numbers_do_not_pass() -> None:
    with pytest.raises(LeakError):
        check_isolation(lambda sequences: [_alone(ids) * np.nan for ids in sequences], VOCABULARY)


def test_missing_scores_do_not_pass() -> None:
    with pytest.raises(LeakError, match="alone"):
        check_isolation(lambda sequences: [_alone(ids)[len(sequences) - 1 :] for ids in sequences], VOCABULARY)
