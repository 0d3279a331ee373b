from __future__ import annotations

import pytest
from simulated import Log

from fedmoe.simulation.simulated_coordinator import PushAnswer, SentUpdate, SimulatedCoordinator


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What arrives in the simulations of this test."""
    written, push = Log(), SimulatedCoordinator.push

    def watched(self: SimulatedCoordinator, sent: SentUpdate) -> PushAnswer:
        answer = push(self, sent)
        written.pushes.append((self._clock.now, sent, answer))
        return answer

    monkeypatch.setattr(SimulatedCoordinator, "push", watched)
    return written
