import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.models.training_config import LoraConfig, ScheduleEndedError, TrainingConfig, learning_rate_at


def test_warm_up_rises_in_equal_steps_and_then_stays() -> None:
    config = TrainingConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate_at(config, step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_falls_in_equal_steps() -> None:
    config = TrainingConfig(learning_rate=1.0, warmup_steps=0, lr_scheduler_type="linear", max_steps=4)
    assert [learning_rate_at(config, step) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_cosine_is_half_way_down_in_the_middle() -> None:
    config = TrainingConfig(learning_rate=1.0, warmup_steps=2, lr_scheduler_type="cosine", max_steps=12)
    assert math.isclose(learning_rate_at(config, 7), 0.5)


@given(
    st.sampled_from(["constant", "linear", "cosine"]),
    st.integers(0, 20),
    st.integers(1, 200),
    st.floats(1e-6, 1.0),
)
def test_every_rate_is_positive_and_at_most_the_peak(kind: str, warmup: int, more: int, peak: float) -> None:
    config = TrainingConfig(peak, warmup_steps=warmup, lr_scheduler_type=kind, max_steps=warmup + more)
    rates = [learning_rate_at(config, step) for step in range(warmup + more)]
    assert all(0 < rate <= peak for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    with pytest.raises(ScheduleEndedError, match="max_steps"):
        learning_rate_at(config, warmup + more)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"lr_scheduler_type": "linear"}, "linear needs max_steps"),
        ({"lr_scheduler_type": "polynomial"}, "must be one of constant, linear, cosine"),
        ({"per_device_train_batch_size": 0}, "at least 1"),
        ({"max_grad_norm": -1.0}, "must not be negative"),
    ],
)
def test_training_settings_that_make_no_sense_are_refused(arguments: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"r": 0}, {"lora_alpha": 0.0}, {"lora_dropout": 1.0}])
def test_lora_settings_that_make_no_sense_are_refused(arguments: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        LoraConfig(**arguments)  # type: ignore[arg-type]
