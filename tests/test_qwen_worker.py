import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedmoe.datasets.packing import Block, BlockSampler, pack
from fedmoe.datasets.tokenized import TokenizedSample
from fedmoe.files import write_atomic
from fedmoe.lora.adapter import ShapeError
from fedmoe.models import worker_state
from fedmoe.models.base import load_base
from fedmoe.qwen_finetune import LoraConfig, NonFiniteError, QwenLoRAExpert, TrainingConfig
from fedmoe.qwen_worker import CheckpointError, Companion, QwenWorker, StepRecord


class Clock:
    """Each look at it is `pace` seconds later."""

    def __init__(self, pace: float = 1.0) -> None:
        self.now, self.pace = 0.0, pace

    def __call__(self) -> float:
        self.now += self.pace
        return self.now


def blocks(seed: int = 0) -> list[Block]:
    random = np.random.default_rng(seed)
    lengths = random.integers(6, 20, 30)
    return pack([TokenizedSample(ids, ids) for ids in (random.integers(0, 256, n) for n in lengths)], 32, 0)


def worker_with(
    clock: Callable[[], float] | None = None, rank: int = 4, data: list[Block] | None = None, **training: float | str
) -> QwenWorker:
    lora = LoraConfig(r=rank, lora_alpha=8)
    expert = QwenLoRAExpert(load_base("tiny", "cpu", "fp32"), lora, TrainingConfig(**training))  # type: ignore[arg-type]
    sampler = BlockSampler(blocks() if data is None else data, seed=1)
    return QwenWorker(expert, sampler, clock or Clock())


def never() -> bool:
    return False


def ignore(record: StepRecord) -> None:
    pass


def run(worker: QwenWorker, steps: int) -> list[float]:
    records: list[StepRecord] = []
    worker.train_for(1e9, never, records.append, max_steps=steps)
    return [record.loss for record in records]


def test_an_interval_ends_by_the_clock() -> None:
    worker = worker_with(Clock(pace=1.0))
    records: list[StepRecord] = []
    result = worker.train_for(5.5, never, records.append)
    assert result.steps == len(records) == worker.step == 5
    assert [record.step for record in records] == [1, 2, 3, 4, 5]
    assert result.tokens == sum(record.tokens for record in records)
    weighted = sum(record.loss * record.tokens for record in records) / result.tokens
    assert result.mean_loss == pytest.approx(weighted)
    assert result.seconds > 5.5


def test_an_interval_ends_by_wish_before_the_next_step() -> None:
    worker = worker_with()
    records: list[StepRecord] = []
    result = worker.train_for(1e9, lambda: len(records) == 2, records.append)
    assert result.steps == 2


def test_an_interval_of_no_time_does_nothing() -> None:
    worker = worker_with()
    before = worker.weights()
    result = worker.train_for(0.0, never, ignore)
    assert (result.steps, result.tokens) == (0, 0)
    assert np.isnan(result.mean_loss)
    np.testing.assert_array_equal(worker.weights(), before)


def test_an_interval_ends_with_the_schedule() -> None:
    worker = worker_with(lr_scheduler_type="linear", max_steps=3, warmup_steps=0)
    assert worker.train_for(1e9, never, ignore).steps == 3
    assert worker.train_for(1e9, never, ignore).steps == 0


def test_accumulation_uses_as_many_blocks_as_configured() -> None:
    worker = worker_with(per_device_train_batch_size=2, gradient_accumulation_steps=2)
    run(worker, 2)
    assert worker.sampler.state()["position"] == 8


def test_the_loss_falls_over_intervals() -> None:
    worker = worker_with(learning_rate=5e-3, data=blocks()[:4])
    first, *_, last = [worker.train_for(4.5, never, ignore).mean_loss for _ in range(6)]
    assert last < first - 0.3


def test_rebase_keeps_what_was_learned_since_the_update_was_made() -> None:
    worker = worker_with()
    sent = worker.weights()
    run(worker, 2)
    local = worker.weights()
    base = np.random.default_rng(0).normal(0, 1, local.size).astype(np.float32)
    worker.rebase(base, sent)
    np.testing.assert_array_equal(worker.weights(), base + (local - sent))
    assert worker.step == 2


def test_rebase_right_after_sending_gives_the_new_base_exactly() -> None:
    worker = worker_with()
    run(worker, 1)
    base = np.random.default_rng(0).normal(0, 1, worker.weights().size).astype(np.float32)
    worker.rebase(base, worker.weights())
    np.testing.assert_array_equal(worker.weights(), base)


def test_vectors_that_do_not_fit_are_refused_and_change_nothing() -> None:
    worker = worker_with()
    local = worker.weights()
    with pytest.raises(ShapeError, match="new_base: expected"):
        worker.rebase(local[:-1], local)
    with pytest.raises(ShapeError, match=r"sent_local: expected .* got float64"):
        worker.rebase(local, local.astype(np.float64))
    with pytest.raises(ValueError, match="rank 0 must pass"):
        worker.rebase(None, None)
    np.testing.assert_array_equal(worker.weights(), local)


def test_loading_weights_drops_what_was_learned() -> None:
    worker = worker_with()
    start = worker.weights()
    run(worker, 2)
    worker.load(start)
    np.testing.assert_array_equal(worker.weights(), start)


def test_a_restart_continues_with_the_identical_losses(tmp_path: Path) -> None:
    worker = worker_with()
    run(worker, 5)
    worker.save(tmp_path)
    expected = run(worker, 12)
    fresh = worker_with()
    assert fresh.restore(tmp_path) == Companion()
    assert fresh.step == 5
    assert run(fresh, 12) == expected
    np.testing.assert_array_equal(fresh.weights(), worker.weights())


def test_a_caller_keeps_texts_and_vectors_in_the_same_checkpoint(tmp_path: Path) -> None:
    worker = worker_with()
    worker.save(tmp_path, Companion({"version": "7"}, {"base": np.arange(5, dtype=np.float32)}))
    kept = worker_with().restore(tmp_path)
    assert kept is not None
    assert kept.texts == {"version": "7"}
    np.testing.assert_array_equal(kept.vectors["base"], np.arange(5, dtype=np.float32))


def test_no_checkpoint_yet_is_not_an_error(tmp_path: Path) -> None:
    assert worker_with().restore(tmp_path / "new") is None


def test_only_the_newest_checkpoint_is_kept(tmp_path: Path) -> None:
    worker = worker_with()
    (tmp_path / ".checkpoint-00000001-rank-0.safetensors-killed").write_bytes(b"half")
    for _ in range(3):
        run(worker, 1)
        newest = worker.save(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == [newest.name, "latest.json"]
    fresh = worker_with()
    fresh.restore(tmp_path)
    assert fresh.step == 3


@pytest.mark.parametrize("writes", [0, 1])
def test_a_crash_while_saving_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    worker = worker_with()
    run(worker, 2)
    worker.save(tmp_path)
    run(worker, 2)
    real, done = write_atomic, list[Path]()

    def crash_later(file: Path, data: bytes) -> None:
        if len(done) == writes:
            raise OSError("power cut")
        done.append(file)
        real(file, data)

    monkeypatch.setattr(worker_state, "write_atomic", crash_later)
    with pytest.raises(OSError, match="power cut"):
        worker.save(tmp_path)
    monkeypatch.undo()
    fresh = worker_with()
    fresh.restore(tmp_path)
    assert fresh.step == 2
    worker.save(tmp_path)
    fresh.restore(tmp_path)
    assert fresh.step == 4


@pytest.mark.parametrize("keep", [0, 5, 1000])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, keep: int) -> None:
    worker = worker_with()
    file = worker.save(tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{file.name} is missing or damaged"):
        worker_with().restore(tmp_path)
    (tmp_path / "latest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"latest\.json is missing or damaged"):
        worker_with().restore(tmp_path)


def test_a_checkpoint_of_another_expert_or_group_is_refused(tmp_path: Path) -> None:
    worker_with(rank=4).save(tmp_path)
    with pytest.raises(CheckpointError, match="rank: expected 4, got 2"):
        worker_with(rank=2).restore(tmp_path)
    (tmp_path / "latest.json").write_text(json.dumps({"serial": 1, "world_size": 2}))
    with pytest.raises(CheckpointError, match="saved by 2 processes, this run has 1"):
        worker_with().restore(tmp_path)


def test_a_checkpoint_of_other_data_changes_nothing(tmp_path: Path) -> None:
    worker = worker_with()
    run(worker, 1)
    worker.save(tmp_path)
    other = worker_with(data=blocks(seed=9))
    before = other.weights()
    with pytest.raises(ValueError, match="other data"):
        other.restore(tmp_path)
    np.testing.assert_array_equal(other.weights(), before)
    assert other.step == 0


def test_a_step_that_is_not_finite_passes_through_and_training_can_go_on() -> None:
    worker = worker_with()
    run(worker, 1)
    weights = worker.weights()
    worker.load(np.full_like(weights, np.nan))
    with pytest.raises(NonFiniteError):
        run(worker, 1)
    worker.load(weights)
    assert len(run(worker, 2)) == 2
    assert worker.step == 3
