"""Clipping by norm: what is usual is the median of what landed before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedmoe.lora.update_rules import USUAL_LEAST, clip_factor

NORMS = st.floats(1e-3, 1e3)


@given(NORMS, st.lists(NORMS, min_size=USUAL_LEAST, max_size=40), st.floats(1, 100))
def test_a_clipped_norm_is_at_most_the_multiple_of_the_median(
    norm: float, recent: list[float], multiple: float
) -> None:
    factor = clip_factor(norm, recent, multiple)
    assert 0 < factor <= 1
    median = sorted(recent)[len(recent) // 2]
    assert factor == 1 or norm * factor <= multiple * median * (1 + 1e-9)


@given(NORMS, st.lists(NORMS, max_size=USUAL_LEAST - 1))
def test_nothing_is_unusual_before_enough_is_known(norm: float, recent: list[float]) -> None:
    assert clip_factor(norm, recent, 1.0) == 1.0


def test_usual_and_empty_updates_pass_whole() -> None:
    assert clip_factor(2.9, [1.0] * 9, 3.0) == 1.0
    assert clip_factor(0.0, [1.0] * 9, 3.0) == 1.0
    assert clip_factor(6.0, [1.0] * 9, 3.0) == 0.5
