"""A step's memory, estimated against what real steps took, and what is advised where it does not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedmoe.models.base import context_length, load_base
from fedmoe.models.step_memory import (
    DEFAULT_MAX_LENGTH,
    LengthError,
    StepShape,
    check_memory,
    free_memory,
    largest_length,
    resolve_max_length,
    step_bytes,
)

MIB = 2**20
TINY = StepShape(2, 64, 64, 128, 259, 32_768, 16, 256, 1)
SMOLLM2 = StepShape(30, 576, 576, 1536, 49_152, 4_884_480, 16, 256, 1)

#: length, batch, checkpointing -> MiB that the peak of the resident set rose by during a step, adapter and gradient
#: there already: float32, rank 16 on all linear layers, one thread, every token learned, PyTorch 2.13 on Linux.
MEASURED = [
    (TINY, 512, 1, False, 25),
    (TINY, 512, 2, False, 37),
    (TINY, 1024, 1, False, 41),
    (TINY, 1024, 2, False, 66),
    (TINY, 1024, 1, True, 35),
    (TINY, 1024, 2, True, 55),
    (SMOLLM2, 256, 1, False, 689),
    (SMOLLM2, 256, 2, False, 1392),
    (SMOLLM2, 512, 1, False, 1381),
    (SMOLLM2, 512, 2, False, 2750),
    (SMOLLM2, 1024, 2, False, 5643),
    (SMOLLM2, 256, 1, True, 279),
    (SMOLLM2, 256, 2, True, 498),
    (SMOLLM2, 512, 1, True, 519),
]


@pytest.mark.parametrize(("shape", "length", "batch", "checkpointing", "mib"), MEASURED)
def test_the_estimate_is_at_least_what_was_measured_and_at_most_a_third_more(
    shape: StepShape, length: int, batch: int, checkpointing: bool, mib: int
) -> None:
    shape = replace(shape, length=length, batch=batch, checkpointing=checkpointing)
    there_already = 8 * shape.adapter
    assert mib * MIB <= step_bytes(shape) - there_already <= 1.34 * mib * MIB


def test_the_shape_is_read_from_the_model() -> None:
    base = load_base("tiny", "cpu", "fp32")
    assert StepShape.of(base.model.config.get_text_config(), 32_768, 16, 256, 1, False) == TINY
    assert context_length(base) == 2048


@pytest.mark.parametrize("available", [90 * MIB, 800 * MIB, 3000 * MIB])
def test_the_largest_length_fits_and_one_more_does_not(available: int) -> None:
    length = largest_length(replace(SMOLLM2, length=4096), available)
    if length is None:
        assert step_bytes(replace(SMOLLM2, length=8)) > available
        return
    assert step_bytes(replace(SMOLLM2, length=length)) <= available < step_bytes(replace(SMOLLM2, length=length + 1))


def test_a_refusal_names_everything_that_fits_and_nothing_that_does_not() -> None:
    wanted = replace(SMOLLM2, length=1024, batch=4)
    check_memory(wanted, step_bytes(wanted))
    with pytest.raises(LengthError, match=r"give --max-length \d+, or --per-device-train-batch-size 3, or --grad"):
        check_memory(wanted, step_bytes(wanted) - 1)
    with pytest.raises(LengthError) as told:
        check_memory(wanted, 1200 * MIB)
    assert "--per-device-train-batch-size" not in str(told.value)
    assert "--gradient-checkpointing" not in str(told.value)
    with pytest.raises(LengthError, match="no shorter row fits"):
        check_memory(wanted, 10 * MIB)


@pytest.mark.parametrize(
    ("wanted", "context", "length"),
    [(None, 1 << 30, DEFAULT_MAX_LENGTH), (None, 512, 512), (None, 8192, 1024), (256, 512, 256), (512, 512, 512)],
)
def test_the_length_is_what_was_asked_for_or_1024_within_the_context(
    wanted: int | None, context: int, length: int
) -> None:
    assert resolve_max_length(wanted, context) == length


def test_more_than_the_context_is_refused_with_both_values() -> None:
    with pytest.raises(LengthError, match=r"--max-length 513 .* context of 512 tokens; give 512 or less"):
        resolve_max_length(513, 512)


def test_processes_of_one_machine_share_its_memory() -> None:
    cpu = torch.device("cpu")
    assert free_memory(cpu, 4) == pytest.approx(free_memory(cpu) / 4, rel=0.2)
