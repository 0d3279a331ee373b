"""Runs the schemes of a simulation, one after another, on the same workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedmoe.lora.adapter import FloatVector
from fedmoe.server.history.history import SNAPSHOT_EVERY
from fedmoe.server.history.replay import snapshot_bytes
from fedmoe.simulation.asynchronous import AsynchronousWorker
from fedmoe.simulation.clock import VirtualClock
from fedmoe.simulation.config import AsynchronousScheme, Fleet, Scheme, SimulationConfig
from fedmoe.simulation.fleet import draw_fleet
from fedmoe.simulation.rounds import ExpertRounds
from fedmoe.simulation.simulated_coordinator import SimulatedCoordinator
from fedmoe.simulation.tally import CurvePoint, FleetTally
from fedmoe.simulation.work import FleetWork

#: Deltas of a training simulation that are kept for later ones without a model.
RECORDED_UPDATES = 256


@dataclass(frozen=True)
class SchemeRun:
    """A scheme that has run: what was counted, and the experts as they are in the end.

    `versions` and `digests` by expert; `snapshot_bytes` is what the experts' snapshots would take on disk; `recorded`
    are deltas as they landed, where they are kept. `ideal`: on workers of equal speed that were always there.
    """

    scheme: Scheme
    ideal: bool
    workers: int
    tally: FleetTally
    versions: dict[str, int]
    digests: dict[str, str]
    snapshot_bytes: int
    recorded: tuple[FloatVector, ...] = ()


def run_simulation(
    config: SimulationConfig, work: FleetWork, on_run: Callable[[SchemeRun], None] = lambda _: None
) -> list[SchemeRun]:
    """Run all schemes on the configured fleet, those of `report.robustness` on an ideal one too; then `on_run`."""
    runs: list[SchemeRun] = []
    for ideal, fleet in ((False, config.fleet), (True, config.fleet.ideal)):
        for scheme in config.schemes:
            if ideal and scheme.name not in config.report.robustness:
                continue
            run = replace(run_scheme(config, scheme, fleet, work), ideal=ideal)
            runs.append(run)
            on_run(run)
    return runs


def run_scheme(config: SimulationConfig, scheme: Scheme, fleet: Fleet, work: FleetWork) -> SchemeRun:
    """Run one scheme for the seconds of the configuration."""
    clock = VirtualClock()
    record = RECORDED_UPDATES if config.work.kind == "training" else 0
    coordinator = SimulatedCoordinator(
        clock, scheme.aggregation(), work.manifest, fleet.experts, config.updates_per_second, record
    )
    profiles = draw_fleet(fleet, config.seconds, config.seed)
    if isinstance(scheme, AsynchronousScheme):
        for profile in profiles:
            AsynchronousWorker(profile, work.worker(profile), scheme, coordinator, clock).start()
    else:
        for expert in range(fleet.experts):
            members = [(profile, work.worker(profile)) for profile in profiles if profile.expert == expert]
            ExpertRounds(members, scheme, coordinator, clock, config.seed).start(fleet.start_within)
    if config.work.kind == "training":
        _plan_evaluations(clock, coordinator, work, fleet.experts, config.work.evaluate_every)
    clock.run(config.seconds)
    experts = coordinator.central.experts
    return SchemeRun(
        scheme,
        False,
        len(profiles),
        coordinator.tally,
        {name: expert.version for name, expert in experts.items()},
        {name: expert.digest for name, expert in experts.items()},
        _snapshots(coordinator, fleet.experts),
        tuple(coordinator.recorded),
    )


def _snapshots(coordinator: SimulatedCoordinator, experts: int) -> int:
    """The bytes of the snapshots that a coordinator keeps."""
    models = [coordinator.expert(number) for number in range(experts)]
    return sum(model.version // SNAPSHOT_EVERY * len(snapshot_bytes(model.state)) for model in models)


def _plan_evaluations(
    clock: VirtualClock, coordinator: SimulatedCoordinator, work: FleetWork, experts: int, every: float
) -> None:
    """Measure the held-out loss at 0 and `every` so many seconds."""

    def evaluate(number: int) -> None:
        losses = [work.loss(expert, coordinator.expert(expert).state.weights) for expert in range(experts)]
        measured = [loss for loss in losses if loss is not None]
        if measured:
            tally = coordinator.tally
            loss = sum(measured) / len(measured)
            tally.curve.append(CurvePoint(clock.now, loss, tally.bytes_up, tally.bytes_down))
        clock.at((number + 1) * every, lambda: evaluate(number + 1))

    clock.at(0.0, lambda: evaluate(0))
