"""A device that fails, 77: simulated here, by errors as PyTorch raises them, since these tests run without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch
from workers import Federation, Setup, blocks, local, tiny_base, wait_for_answer

from fedmoe import qwen_finetune
from fedmoe.datasets.tokens.packing import Batch, collate
from fedmoe.distributed_worker import DistributedWorker
from fedmoe.models.device_faults import device_fault, halve_batches
from fedmoe.models.packed import token_losses
from fedmoe.qwen_finetune import LoraConfig, QwenLoRAExpert, TrainingConfig
from fedmoe.qwen_worker import CheckpointExtras
from fedmoe.worker.recovery import DeviceFailedError, WorkerFailedError

CUDA_OOM = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.00 GiB"
BROKEN = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"


def too_small_for(rows: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A simulated device that has no memory for more rows than so many at once; gives the rows it was asked for."""
    real, asked = token_losses, list[int]()

    def limited(model: object, batch: Batch, device: torch.device) -> object:
        asked.append(len(batch.input_ids))
        if len(batch.input_ids) > rows:
            raise torch.OutOfMemoryError(CUDA_OOM)
        return real(model, batch, device)

    monkeypatch.setattr(qwen_finetune, "token_losses", limited)
    return asked


def expert() -> QwenLoRAExpert:
    return QwenLoRAExpert(tiny_base(), LoraConfig(4, 8, seed=1), TrainingConfig(learning_rate=5e-3, warmup_steps=2))


def test_memory_that_runs_out_halves_the_micro_batches_once_and_for_good_77(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = collate(blocks()[:5])
    whole = expert()
    expected = [whole.train_step([batch]).loss for _ in range(2)]
    asked = too_small_for(3, monkeypatch)
    small = expert()
    with structlog.testing.capture_logs() as said:
        losses = [small.train_step([batch]).loss for _ in range(2)]
    assert asked == [5, 3, 2, 3, 2]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(small.weights(), whole.weights(), atol=1e-5)
    assert [line["event"] for line in said] == ["smaller_micro_batches"]


@pytest.mark.parametrize(("rows", "asked_for"), [(2, [5, 3]), (0, [5, 3])])
def test_it_does_so_once_only_and_changes_no_weight_77(
    rows: int, asked_for: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, one = too_small_for(rows, monkeypatch), expert()
    before = one.weights()
    with pytest.raises(torch.OutOfMemoryError):
        one.train_step([collate(blocks()[:5])])
    assert asked == asked_for
    np.testing.assert_array_equal(one.weights(), before)


def test_a_single_row_cannot_be_halved() -> None:
    assert halve_batches([collate(blocks()[:1]), collate(blocks()[:1])]) is None


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError(CUDA_OOM), "--per-device-train-batch-size"),
        (RuntimeError("MPS backend out of memory (MPS allocated: 5 GB)"), "--gradient-checkpointing"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory"),
            "--max-length",
        ),
        (MemoryError(), "no memory left"),
        (RuntimeError(BROKEN), "nvidia-smi"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"), "nvidia-smi"),
    ],
)
def test_what_a_device_says_is_told_in_one_line_with_what_to_do_77(error: Exception, words: str) -> None:
    told = device_fault(error)
    assert told is not None
    assert words in told
    assert "\n" not in told


def test_other_errors_are_not_the_devices() -> None:
    assert device_fault(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) is None
    assert device_fault(ValueError("out of memory")) is None


def fails_at(step: int, error: Callable[[], Exception]) -> Callable[[DistributedWorker], None]:
    """Makes the simulated device fail from that step on."""

    def change(worker: DistributedWorker) -> None:
        real = worker.worker.expert.train_step

        def train_step(batches: list[Batch]) -> object:
            if worker.worker.step + 1 >= step:
                raise error()
            return real(batches)

        worker.worker.expert.train_step = train_step  # type: ignore[assignment]

    return change


@pytest.mark.parametrize("error", [lambda: torch.OutOfMemoryError(CUDA_OOM), lambda: RuntimeError(BROKEN)])
def test_a_device_that_fails_ends_the_worker_with_all_it_learned_saved_77(
    error: Callable[[], Exception], house: Federation, tmp_path: Path
) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=8, every=3, after_step=wait_for_answer)
    with (
        structlog.testing.capture_logs() as said,
        pytest.raises(DeviceFailedError, match="Nothing broken was pushed; step 5 is saved"),
    ):
        setup.run(fails_at(6, error))
    assert [line["step"] for line in said if line["event"] == "device_failed"] == [5]
    worker = setup.run()
    assert worker.worker.step == 8
    assert [update.info["steps"] for update in house.updates()][:1] == [3]
    np.testing.assert_array_equal(house.weights, local(worker))


def test_weights_that_cannot_be_read_any_more_leave_the_newest_checkpoint_77(house: Federation, tmp_path: Path) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=4, every=3, after_step=wait_for_answer)
    setup.run()
    setup.steps = 8

    def lost(worker: DistributedWorker) -> None:
        fails_at(6, lambda: RuntimeError(BROKEN))(worker)
        real = worker.worker.save

        def save(folder: Path, extras: CheckpointExtras | None = None) -> Path:
            if worker.worker.step >= 5:
                raise RuntimeError(BROKEN)
            return real(folder, extras)

        worker.worker.save = save  # type: ignore[method-assign]

    with pytest.raises(DeviceFailedError, match="resumes the newest checkpoint"):
        setup.run(lost)
    assert setup.run().worker.step == 8


def test_the_statuses_of_a_failed_device_and_of_diverged_training_are_their_own_77() -> None:
    from fedmoe.cli import output

    assert issubclass(DeviceFailedError, WorkerFailedError)
    assert output._expected_status(DeviceFailedError("x")) == output.EXIT_DEVICE == 71
    assert output.EXIT_DIVERGED == 70
