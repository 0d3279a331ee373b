"""A coordinator that was restored from a backup while its workers train: what was not acknowledged is sent again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs
from workers import Federation, Setup, federation, local, wait_for_answer

from fedmoe.distributed_worker import DistributedWorker
from fedmoe.qwen_worker import StepRecord
from fedmoe.server.storage.backup import make_backup
from fedmoe.server.storage.restore import restore


def test_an_update_of_the_lost_history_is_refused_and_its_learning_travels_again(tmp_path: Path) -> None:
    """Fault 47."""
    with federation(tmp_path / "first") as house:
        lost = house.house
        assert lost is not None
        lost_name = lost.service.current.incarnation
        back = Federation(tmp_path / "second", port=house.port)

        def follow(worker: DistributedWorker, record: StepRecord) -> None:
            wait_for_answer(worker, record)
            if record.step == 3:
                make_backup(house.folder, tmp_path / "backup", 0.0)
            if record.step == 5:
                # Version 2 is lost, and another worker's update takes its number.
                house.stop()
                restore(tmp_path / "backup", back.folder)
                back.start()
                Setup(house.url, tmp_path / "o", "other", steps=1, every=9).run()
                assert back.expert.version == 2

        try:
            with capture_logs() as lines:
                worker = Setup(house.url, tmp_path / "w1", steps=8, every=2, after_step=follow).run()
            updates = back.updates()
            # Its third update, made from the lost version 2, is number 2; the same learning landed as number 3.
            assert [(update.worker, update.sequence) for update in updates] == [("w1", 0), ("other", 0), ("w1", 3)]
            assert updates[2].base_version == 2
            assert back.house is not None
            (told,) = [line for line in lines if line["event"] == "other_history"]
            assert (told["was"], told["now"]) == (lost_name, back.house.service.current.incarnation)
            assert "since version 2" in told["sends_again"]
            refused = [line["code"] for line in lines if line["event"] == "refused" and "sequence" in line]
            assert refused == ["other_history"]
            np.testing.assert_array_equal(back.weights, local(worker))
        finally:
            back.stop()


def test_a_worker_that_starts_again_says_that_the_history_is_another_one(tmp_path: Path) -> None:
    with federation(tmp_path / "first") as house:
        setup = Setup(house.url, tmp_path / "w1", steps=2, every=9)

        def leave(worker: DistributedWorker, record: StepRecord) -> None:
            house.stop()
            worker.stop()

        setup.after_step = leave
        setup.max_unsynced = 0.1
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(DistributedWorker, "_seconds_left", lambda worker, began: -1.0)
            setup.run()
        back = Federation(tmp_path / "second", port=house.port)
        make_backup(house.folder, tmp_path / "backup", 0.0)
        restore(tmp_path / "backup", back.folder)
        back.start()
        try:
            with capture_logs() as lines:
                worker = Setup(house.url, tmp_path / "w1", steps=2, every=9, after_step=wait_for_answer).run()
            (told,) = [line for line in lines if line["event"] == "other_history"]
            assert told["sends_again"].startswith("1 steps")
            np.testing.assert_array_equal(back.weights, local(worker))
        finally:
            back.stop()
