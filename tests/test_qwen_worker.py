import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import structlog
import torch

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.packing import Block, BlockSampler, pack
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample
from fedmoe.lora.adapter import FloatVector, ShapeError
from fedmoe.models import worker_state
from fedmoe.models.base import load_base
from fedmoe.models.data_hashes import DataChange
from fedmoe.models.held_out import HeldOutPlan
from fedmoe.models.parallel import ProcessGroup
from fedmoe.qwen_finetune import LoraConfig, NonFiniteError, QwenLoRAExpert, TrainingConfig
from fedmoe.qwen_worker import CheckpointExtras, EvaluationRecord, QwenWorker, StepRecord, WorkerCheckpointError
from fedmoe.runtime.files import write_atomic


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
    clock: Callable[[], float] | None = None,
    rank: int = 4,
    data: list[Block] | None = None,
    held_out: HeldOutPlan | None = None,
    **training: float | str,
) -> QwenWorker:
    lora = LoraConfig(r=rank, lora_alpha=8)
    expert = QwenLoRAExpert(load_base("tiny", "cpu", "fp32"), lora, TrainingConfig(**training))  # type: ignore[arg-type]
    sampler = BlockSampler(blocks() if data is None else data, seed=1)
    return QwenWorker(expert, sampler, clock or Clock(), held_out)


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
    assert fresh.restore(tmp_path) == CheckpointExtras()
    assert fresh.step == 5
    assert run(fresh, 12) == expected
    np.testing.assert_array_equal(fresh.weights(), worker.weights())


def test_a_caller_keeps_texts_and_vectors_in_the_same_checkpoint(tmp_path: Path) -> None:
    worker = worker_with()
    worker.save(tmp_path, CheckpointExtras({"version": "7"}, {"base": np.arange(5, dtype=np.float32)}))
    kept = worker_with().restore(tmp_path)
    assert kept is not None
    assert kept.texts == {"version": "7"}
    np.testing.assert_array_equal(kept.vectors["base"], np.arange(5, dtype=np.float32))


def test_no_checkpoint_yet_is_not_an_error(tmp_path: Path) -> None:
    assert worker_with().restore(tmp_path / "new") is None


def test_the_newest_checkpoint_and_the_one_before_it_are_kept(tmp_path: Path) -> None:
    worker = worker_with()
    (tmp_path / ".checkpoint-00000001-rank-0.safetensors-killed").write_bytes(b"half")
    saved = []
    for _ in range(3):
        run(worker, 1)
        saved.append(worker.save(tmp_path).name)
    names = sorted(file.name for file in tmp_path.iterdir() if not file.name.startswith("data-"))
    assert names == [*saved[1:], "latest.json"]
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
    with pytest.raises(WorkerCheckpointError, match=rf"{file.name} is missing or damaged"):
        worker_with().restore(tmp_path)
    (tmp_path / "latest.json").write_text("{")
    with pytest.raises(WorkerCheckpointError, match=r"latest\.json is missing or damaged"):
        worker_with().restore(tmp_path)


def flipped(file: Path, place: float) -> None:
    data = bytearray(file.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize("place", [0.0, 0.001, 0.02, 0.5, 1.0])
def test_a_flipped_bit_is_named_and_the_older_checkpoint_is_taken_6(tmp_path: Path, place: float) -> None:
    worker = worker_with()
    run(worker, 2)
    older = worker.save(tmp_path)
    before = worker.weights()
    run(worker, 1)
    newest = worker.save(tmp_path)
    flipped(newest, place)
    fresh = worker_with()
    with structlog.testing.capture_logs() as said:
        fresh.restore(tmp_path)
    (warned,) = [line for line in said if line["event"] == "older_checkpoint"]
    assert newest.name in str(warned["reason"])
    assert fresh.step == 2
    np.testing.assert_array_equal(fresh.weights(), before)
    flipped(older, place)
    untouched = worker_with()
    start = untouched.weights()
    with pytest.raises(
        WorkerCheckpointError, match=rf"{newest.name}.*no older checkpoint is whole. Move .* away to begin anew"
    ):
        untouched.restore(tmp_path)
    np.testing.assert_array_equal(untouched.weights(), start)
    tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-away"))
    assert untouched.restore(tmp_path) is None, "as the advice says"


def test_a_checkpoint_of_an_older_version_has_no_hash_in_its_name_and_is_read(tmp_path: Path) -> None:
    worker = worker_with()
    run(worker, 2)
    file = worker.save(tmp_path)
    file.rename(tmp_path / "checkpoint-00000001-rank-0.safetensors")
    fresh = worker_with()
    fresh.restore(tmp_path)
    assert fresh.step == 2
    run(fresh, 1)
    assert fresh.save(tmp_path).name.startswith("checkpoint-00000002-rank-0-")


def test_a_checkpoint_of_another_expert_or_group_is_refused(tmp_path: Path) -> None:
    worker_with(rank=4).save(tmp_path)
    with pytest.raises(WorkerCheckpointError, match="rank: expected 4, got 2"):
        worker_with(rank=2).restore(tmp_path)
    (tmp_path / "latest.json").write_text(json.dumps({"serial": 1, "world_size": 2}))
    with pytest.raises(WorkerCheckpointError, match="saved by 2 processes, this run has 1"):
        worker_with().restore(tmp_path)


def test_a_checkpoint_of_other_data_changes_nothing(tmp_path: Path) -> None:
    worker = worker_with()
    run(worker, 1)
    worker.save(tmp_path)
    other = worker_with(data=blocks(seed=9))
    before = other.weights()
    with pytest.raises(DataError, match=r"30 of 30 samples are gone or changed, 30 are new.*--allow-changed-data"):
        other.restore(tmp_path)
    np.testing.assert_array_equal(other.weights(), before)
    assert other.step == 0


def samples(count: int = 30) -> list[TokenizedSample]:
    random = np.random.default_rng(3)
    return [TokenizedSample(ids, ids) for ids in (random.integers(0, 256, 12) for _ in range(count))]


def data_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*data-*"))


def test_data_that_grew_keep_weights_moments_and_step_and_begin_a_new_epoch(tmp_path: Path) -> None:
    worker = worker_with(data=pack(samples(30), 32, 0))
    run(worker, 3)
    worker.save(tmp_path)
    grown = worker_with(data=pack(samples(37), 32, 0))
    assert grown.restore(tmp_path) == CheckpointExtras()
    assert (grown.step, grown.new_order, grown.data_change) == (3, True, DataChange(unchanged=30, missing=0, new=7))
    np.testing.assert_array_equal(grown.weights(), worker.weights())
    before, after = worker.expert.optimizer_state(), grown.expert.optimizer_state()
    np.testing.assert_array_equal(after["exp_avg_sq"], before["exp_avg_sq"])
    assert (grown.sampler.epoch, grown.sampler.state()["position"]) == (1, 0)
    run(grown, 2)
    grown.save(tmp_path)
    assert len(data_files(tmp_path)) == 1
    again = worker_with(data=pack(samples(37), 32, 0))
    again.restore(tmp_path)
    assert (again.new_order, again.data_change) == (False, None)
    assert run(again, 3) == run(grown, 3)


@pytest.mark.parametrize("seed", [0, 5])
def test_the_same_data_in_another_order_are_the_same_data(tmp_path: Path, seed: int) -> None:
    worker = worker_with(data=pack(samples(), 32, 0))
    run(worker, 2)
    worker.save(tmp_path)
    other = worker_with(data=pack(samples()[::-1], 32, seed))
    other.restore(tmp_path)
    assert other.new_order
    assert other.data_change == DataChange(unchanged=30, missing=0, new=0)


def test_changed_data_go_on_likewise_if_that_is_allowed(tmp_path: Path) -> None:
    worker = worker_with(data=pack(samples(30), 32, 0))
    run(worker, 2)
    worker.save(tmp_path)
    fewer = worker_with(data=pack(samples(25), 32, 0))
    with pytest.raises(DataError, match="5 of 30 samples are gone or changed, 0 are new"):
        fewer.restore(tmp_path)
    assert fewer.step == 0
    fewer.restore(tmp_path, allow_changed_data=True)
    assert (fewer.step, fewer.data_change) == (2, DataChange(unchanged=25, missing=5, new=0))


def test_a_crash_before_the_checkpoint_names_them_leaves_the_old_list_of_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_with(data=pack(samples(30), 32, 0))
    run(worker, 1)
    worker.save(tmp_path)
    grown = worker_with(data=pack(samples(33), 32, 0))
    grown.restore(tmp_path)
    monkeypatch.setattr(worker_state, "write_atomic", lambda file, data: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        grown.save(tmp_path)
    monkeypatch.undo()
    assert len(data_files(tmp_path)) == 2
    later = worker_with(data=pack(samples(35), 32, 0))
    later.restore(tmp_path)
    assert later.data_change == DataChange(unchanged=30, missing=0, new=5)
    later.save(tmp_path)
    assert len(data_files(tmp_path)) == 1


def without_list_of_samples(folder: Path) -> None:
    """As a checkpoint was before it named its data."""
    state = worker_state.load_state(folder, ProcessGroup())
    old = {name: value for name, value in state.values.items() if name not in ("data", "held_out")}
    worker_state.save_state(folder, worker_state.WorkerState(state.arrays, old), ProcessGroup())
    for file in data_files(folder):
        file.unlink()


def test_a_checkpoint_without_a_list_of_samples_is_good_for_the_same_data_only(tmp_path: Path) -> None:
    worker = worker_with(data=pack(samples(30), 32, 0))
    run(worker, 2)
    worker.save(tmp_path)
    without_list_of_samples(tmp_path)
    same = worker_with(data=pack(samples(30), 32, 0))
    same.restore(tmp_path)
    assert (same.step, same.new_order) == (2, False)
    grown = worker_with(data=pack(samples(31), 32, 0))
    with pytest.raises(DataError, match=r"whether the 31 of now only grew cannot be told.*--allow-changed-data"):
        grown.restore(tmp_path)
    grown.restore(tmp_path, allow_changed_data=True)
    assert (grown.step, grown.new_order, grown.data_change) == (2, True, None)


def plan(every: int = 2, patience: int | None = None, threshold: float = 0.0, seed: int = 7) -> HeldOutPlan:
    return HeldOutPlan(blocks(seed)[:3], f"seed {seed}", every, patience, threshold)


def measured(worker: QwenWorker, steps: int) -> list[EvaluationRecord]:
    records: list[EvaluationRecord] = []
    worker.train_for(1e9, never, ignore, steps, records.append)
    return records


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_measuring_changes_nothing_of_training(dropout: float, checkpointing: bool) -> None:
    def trained(held_out: HeldOutPlan | None) -> tuple[FloatVector, list[float]]:
        torch.manual_seed(5)
        expert = QwenLoRAExpert(
            load_base("tiny", "cpu", "fp32"),
            LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout),
            TrainingConfig(learning_rate=5e-3, gradient_checkpointing=checkpointing),
        )
        worker = QwenWorker(expert, BlockSampler(blocks(), seed=1), Clock(), held_out)
        losses = run(worker, 6)
        return worker.weights(), losses

    weights, losses = trained(None)
    with_measuring, same = trained(plan(every=1))
    np.testing.assert_array_equal(with_measuring, weights)
    assert same == losses


def test_the_loss_is_measured_before_the_first_step_every_so_often_and_after_the_last() -> None:
    worker = worker_with(max_steps=5, held_out=plan(every=2))
    records = measured(worker, 9)
    assert [record.step for record in records] == [0, 2, 4, 5]
    expected = worker.expert.evaluate(plan().blocks, 2)
    assert (records[-1].loss, records[-1].tokens) == (expected.loss, expected.tokens)
    assert records[-1].first == records[0].loss
    assert measured(worker, 9) == []


def test_a_result_that_could_not_be_measured_is_measured_before_the_worker_is_finished() -> None:
    """An answer of the coordinator ends an interval right after the last step."""
    worker = worker_with(max_steps=3, held_out=plan(every=2))
    records: list[EvaluationRecord] = []
    worker.train_for(1e9, lambda: worker.step == 3, ignore, None, records.append)
    assert (worker.step, worker.finished) == (3, False)
    worker.train_for(1e9, never, ignore, None, records.append)
    assert [record.step for record in records] == [0, 2, 3]
    assert worker.finished


def test_training_ends_when_the_held_out_loss_no_longer_falls_and_a_restart_knows_it(tmp_path: Path) -> None:
    """A threshold that no step reaches: every measurement after the first counts."""
    ends = plan(every=1, patience=3, threshold=100.0)
    worker = worker_with(held_out=ends)
    assert [record.worse for record in measured(worker, 2)] == [0, 1, 2]
    worker.save(tmp_path)
    again = worker_with(held_out=ends)
    again.restore(tmp_path)
    assert not again.finished
    assert [record.worse for record in measured(again, 50)] == [3]
    assert (again.step, again.stopped_early, again.finished) == (3, True, True)
    again.save(tmp_path)
    third = worker_with(held_out=ends)
    third.restore(tmp_path)
    assert run(third, 50) == []
    other = worker_with(held_out=plan(every=1, patience=3, threshold=100.0, seed=8))
    other.restore(tmp_path)
    assert not other.finished, "losses on other data cannot be compared"
    assert (third.measured_anew, other.measured_anew) == (False, True)


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
