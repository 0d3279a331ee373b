"""A real coordinator is backed up while clients push: all that was acknowledged before is there after a restore."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import forks
import numpy as np
import pytest
from crash_load import EXPERTS, Pusher, fold, gather, landed, pull, read_journal, register, start_pushers
from push_histories import Backup, faults_of, landed_faults, restore_faults
from support import EPOCH, CoordinatorProcess, make_body

from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import UpdateHeader


def state_command(*arguments: object) -> dict[str, object]:
    """`fedmoe state ...` in a process of its own; what it prints as JSON."""
    done = forks.run("-m", "fedmoe", "state", *map(str, arguments), "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("keep_updates", [None, 5])
def test_what_was_acknowledged_before_a_backup_is_there_after_a_restore_73(
    keep_updates: int | None, tmp_path: Path
) -> None:
    """Fault 72."""
    arguments = () if keep_updates is None else ("--keep-updates", str(keep_updates))
    coordinator = CoordinatorProcess(tmp_path / "state", arguments=arguments)
    restored = CoordinatorProcess(tmp_path / "again", arguments=arguments)
    stop = threading.Event()
    try:
        coordinator.start()
        register(coordinator.url, *EXPERTS)
        pushers = start_pushers(coordinator.url, stop, steady=True)
        await_pushes(pushers, 130)  # so many that snapshots are made and old updates let go of
        began = time.monotonic()
        backup = state_command("backup", tmp_path / "backup", "--state-dir", coordinator.state_dir)
        ended = time.monotonic()
        await_pushes(pushers, sum(len(pusher.pushes) for pusher in pushers) + 20)
        stop.set()
        told = gather(pushers)
        made = state_command("restore", tmp_path / "backup", "--state-dir", restored.state_dir)
        assert (made["before"], made["events"]) == (backup["incarnation"], backup["events"])
        lost = lost_update(coordinator)
        restored.start()
        check_restored(restored, str(made["incarnation"]), lost)
        after = pull(restored.url, EXPERTS)
        assert restored.stop() == 0
        events = read_journal(restored.state_dir)
        there = landed(events)
        held = {name: max(one.version for one in there if one.expert == name) for name in EXPERTS}
        assert restore_faults(told.pushes, Backup(began, ended, held)) == []
        assert landed_faults(there) == []
        known = {one.identity for one in there}
        assert faults_of([one for one in told.pushes if one.identity in known], journal=there) == []
        assert len(there) < len(told.pushes)
        expected = fold(events, told.seeds)
        for name in EXPERTS:
            np.testing.assert_array_equal(after[name], expected[name])
    finally:
        stop.set()
        for process in (coordinator, restored):
            if process.process is not None:
                process.kill()


def await_pushes(pushers: Sequence[Pusher], count: int) -> None:
    deadline = time.monotonic() + 120
    while sum(len(pusher.pushes) for pusher in pushers) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lost_update(coordinator: CoordinatorProcess) -> UpdateHeader:
    """An update made from the newest version of this coordinator, as a worker makes it."""
    with CoordinatorClient(coordinator.url) as client:
        newest = client.pull_expert("python")
    assert newest is not None
    return UpdateHeader(
        expert="python",
        worker="late",
        epoch=EPOCH,
        sequence=0,
        base_version=newest.version,
        base_digest=newest.digest,
        incarnation=newest.incarnation,
    )


def check_restored(restored: CoordinatorProcess, name: str, lost: UpdateHeader) -> None:
    """It goes on under its new name, and refuses what was made in the history before."""
    with CoordinatorClient(restored.url) as client:
        newest = client.pull_expert("python")
        assert newest is not None
        assert newest.incarnation == name
        with pytest.raises(RefusedError) as refused:
            client.push(lost, make_body(1))
    assert refused.value.code == "other_history"
    assert refused.value.facts["incarnation"] == name
