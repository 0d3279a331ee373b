"""What the demonstration asks of its workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmoe.cli.demo_run.plan import WORKERS, DemoPlan
from fedmoe.models.training_config import TrainingConfig, learning_rate_at


def options(steps: int) -> dict[str, str]:
    words = DemoPlan(Path("run"), Path("data"), steps=steps).worker_command(WORKERS[0], "http://127.0.0.1:5000")
    return dict(zip(words[1::2], words[2::2], strict=True))


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 6, 60])
def test_any_number_of_steps_is_a_schedule_with_a_rate_above_zero(steps: int) -> None:
    asked = options(steps)
    training = TrainingConfig(
        max_steps=int(asked["--max-steps"]),
        warmup_steps=int(asked["--warmup-steps"]),
        lr_scheduler_type=asked["--lr-scheduler-type"],
        learning_rate=float(asked["--learning-rate"]),
    )
    assert all(learning_rate_at(training, step) > 0 for step in range(steps))


def test_a_usual_run_warms_up_as_workers_do_by_themselves() -> None:
    assert options(60)["--warmup-steps"] == str(TrainingConfig().warmup_steps)


def test_the_length_of_a_block_is_the_demonstrations_own() -> None:
    assert options(60)["--max-length"] == "256"
