"""Simulations for tests: small, of seeded deltas, with every update that arrived written down."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedmoe.simulation.config import RecordedWork, SimulationConfig
from fedmoe.simulation.recorded import RecordedFleet
from fedmoe.simulation.run import SchemeRun, run_scheme
from fedmoe.simulation.simulated_coordinator import PushAnswer, SentUpdate

#: Numbers in a delta.
PARAMETERS = 256


def configured(scheme: dict[str, object] | None = None, **values: object) -> SimulationConfig:
    """A configuration of one scheme, asynchronous unless told otherwise, with small deltas."""
    chosen: dict[str, object] = {"name": "one", "kind": "asynchronous", **(scheme or {})}
    work = {"kind": "recorded", "parameters": PARAMETERS}
    return SimulationConfig.model_validate({"seconds": 100.0, "work": work, "schemes": [chosen], **values})


def fleet_work(config: SimulationConfig) -> RecordedFleet:
    """The work of its workers."""
    assert isinstance(config.work, RecordedWork)
    return RecordedFleet(config.work, config.seed)


def run(config: SimulationConfig) -> SchemeRun:
    """The run of its first scheme."""
    return run_scheme(config, config.schemes[0], config.fleet, fleet_work(config))


@dataclass
class Log:
    """Every update that was decided on, with the moment and the answer."""

    pushes: list[tuple[float, SentUpdate, PushAnswer]] = field(default_factory=list)

    @property
    def accepted(self) -> list[SentUpdate]:
        """Those that landed, in their order."""
        return [sent for _, sent, answer in self.pushes if answer.staleness is not None]
