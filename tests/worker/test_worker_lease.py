"""One worker's id in two places, as its workers see it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs
from workers import Federation, Setup, local, wait_for_answer

from fedmoe.runtime.errors import RefusedError


def test_a_worker_with_a_new_state_directory_waits_for_the_lease_and_loses_nothing_50(
    house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.wire.delivery._LONGEST_ASKED", 0.01)
    monkeypatch.setattr("fedmoe.wire.delivery._FIRST_PAUSE", 0.01)
    first = Setup(house.url, tmp_path / "first", steps=4, every=2, after_step=wait_for_answer)
    first.run()
    assert house.house is not None
    leases = house.house.service.leases
    clock, tries = leases._clock, []

    def later() -> float:
        """The lease is over after three more requests."""
        tries.append(1)
        return clock() + (3600.0 if len(tries) > 3 else 0.0)

    monkeypatch.setattr(leases, "_clock", later)
    with capture_logs() as logs:
        second = Setup(house.url, tmp_path / "second", steps=4, every=2, after_step=wait_for_answer).run()
    assert any(line["event"] == "coordinator_away" and "lease_held" in line["reason"] for line in logs)
    assert [(u.epoch, u.sequence) for u in house.updates()][2:] == [(second._box.epoch, 0), (second._box.epoch, 1)]
    np.testing.assert_allclose(local(second), house.weights, atol=1e-6)
    # The first one comes back: it is told to stop, says so, and keeps what it had to send.
    first.steps = 6
    with pytest.raises(RefusedError, match="pushes from another place now"):
        first.run()
    assert (tmp_path / "first" / "update-2.safetensors").exists()
    assert len(house.updates()) == 4
