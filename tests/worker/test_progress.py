import numpy as np
import pytest

from fedmoe.qwen_worker import CheckpointExtras
from fedmoe.worker.recovery import Progress, WorkerSyncPoint


def test_the_mean_loss_counts_every_token_the_same() -> None:
    assert Progress().mean_loss is None
    progress = Progress(1, 10, 2.0 * 10) + Progress(1, 30, 4.0 * 30)
    assert (progress.steps, progress.tokens) == (2, 40)
    assert progress.mean_loss == pytest.approx(3.5)
    assert (progress + progress).mean_loss == pytest.approx(3.5)


@pytest.mark.parametrize("absorbed", [None, 0, 7])
def test_a_sync_point_survives_a_checkpoint(absorbed: int | None) -> None:
    point = WorkerSyncPoint(np.arange(3, dtype=np.float32), 8, Progress(3, 41, 0.1 + 0.2), absorbed)
    again = WorkerSyncPoint.of(point.extras())
    assert again is not None
    assert (again.next_sequence, again.progress, again.absorbed) == (8, point.progress, absorbed)
    np.testing.assert_array_equal(again.reference, point.reference)


def test_a_checkpoint_of_a_rank_that_does_not_talk_has_none() -> None:
    assert WorkerSyncPoint.of(None) is None
    assert WorkerSyncPoint.of(CheckpointExtras()) is None
