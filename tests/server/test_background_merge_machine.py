"""A random walk of a federation whose gateway lives, held after every step against plain lists."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from crash_house import House
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from online_house import gateway, online_gateway_of
from support import LAYOUT, MANIFEST, make_body, make_flat

from fedmoe.coordinator import Aggregation
from fedmoe.experts import GATEWAY_SEED
from fedmoe.federation.events import GatewayMerged, UpdateAccepted
from fedmoe.lora.adapter import Adapter, FloatVector, initial_adapter
from fedmoe.lora.online_merge import ExpertDelta, add_into_gateway
from fedmoe.lora.update_rules import RULES, RuleState, UpdateRule, buffered
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.upkeep.background_merge import MergeOvertakenError

EXPERTS = ["docs", "python", "sql"]
WORKERS = ["w1", "w2"]
MERGE_AFTER = 3


@dataclass(frozen=True)
class Landed:
    """An update as the model keeps it."""

    number: int
    worker: str
    seed: int
    coefficient: float
    steps: int


@dataclass(frozen=True)
class Version:
    """What one version of an expert is made of: where it left the gateway, and the updates since, in order."""

    start: FloatVector
    fold: int
    since: int
    updates: tuple[Landed, ...] = ()

    def state(self, rule: UpdateRule) -> RuleState:
        state = rule.init(self.start)
        for landed in self.updates:
            state = rule.update(state, make_flat(landed.seed), landed.coefficient)
        return state

    @property
    def steps(self) -> int:
        return sum(landed.steps for landed in self.updates)


@dataclass
class Model:
    """The federation as lists; merges with the same algebra, asked with what the lists say."""

    rule: UpdateRule
    buffer: int
    gateway: FloatVector
    gateway_merges: int = 0
    experts: dict[str, list[Version]] = field(default_factory=dict)
    counters: dict[tuple[str, str], int] = field(default_factory=dict)
    folded: set[str] = field(default_factory=set)

    def register(self, name: str) -> None:
        first = initial_adapter(LAYOUT, MANIFEST.alpha, GATEWAY_SEED).flat
        self.experts[name] = [Version(first, 0, 0)]
        if self.gateway_merges:
            self.experts[name].append(Version(self.gateway, self.gateway_merges, 1))

    def ready(self) -> dict[str, tuple[int, Version]]:
        """By name the version that would be merged now."""
        newest = {name: (len(versions) - 1, versions[-1]) for name, versions in sorted(self.experts.items())}
        return {
            name: (number, one)
            for name, (number, one) in newest.items()
            if one.steps >= MERGE_AFTER and len(one.updates) >= self.buffer
        }

    def sharing(self) -> int:
        return len({name for name, versions in self.experts.items() if versions[-1].steps > 0} | self.folded)

    def fold(self, ready: dict[str, tuple[int, Version]], several: bool) -> None:
        weights = {name: (1 + self.gateway_merges - one.fold) ** -0.5 for name, (_, one) in ready.items()}
        departed = {
            name: ExpertDelta(adapter(one.start), adapter(one.state(self.rule).weights), weights[name])
            for name, (_, one) in ready.items()
        }
        self.gateway = add_into_gateway(adapter(self.gateway), departed, several).adapter.flat
        self.gateway_merges += 1
        self.folded |= ready.keys()
        for name, (_, seen) in ready.items():
            versions = self.experts[name]
            begun = len(seen.updates) - len(seen.updates) % self.buffer
            rest = versions[-1].updates[begun:]
            versions.append(Version(self.gateway, self.gateway_merges, len(versions), rest))


def refusal_of(call: Callable[[], object]) -> str:
    """The code with which a call was refused; empty if it was not."""
    try:
        call()
    except RefusedError as error:
        return error.code
    return ""


def adapter(flat: FloatVector) -> Adapter:
    return Adapter(LAYOUT, MANIFEST.alpha, flat)


class FoldingMachine(RuleBasedStateMachine):
    """Commands go to a real service, which merges when told to; a crash forgets all but the journal and the blobs."""

    optimizer = "sgd"
    buffer = 1
    keep: int | None = None

    def __init__(self) -> None:
        super().__init__()
        aggregation = Aggregation(
            server_optimizer=self.optimizer,
            buffer_size=self.buffer,
            merge_after=MERGE_AFTER,
            fold_staleness="polynomial",
        )
        self.house = House.open(aggregation, self.keep, merges_by_itself=False)
        first = initial_adapter(LAYOUT, MANIFEST.alpha, GATEWAY_SEED).flat
        self.model = Model(buffered(RULES[self.optimizer], self.buffer), self.buffer, first)
        self.numbers = itertools.count()

    def teardown(self) -> None:
        self.house.service.close()

    @initialize()
    def first_expert(self) -> None:
        self.register("python")

    @rule(name=st.sampled_from(EXPERTS))
    def register(self, name: str) -> None:
        self.house.register(name)
        if name not in self.model.experts:
            self.model.register(name)

    @rule(data=st.data(), worker=st.sampled_from(WORKERS), told=st.none() | st.integers(0, 8), behind=st.integers(0, 3))
    def push(self, data: st.DataObject, worker: str, told: int | None, behind: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.experts)))
        self.update(name, worker, told, behind, data.draw(st.integers(0, 9)))

    def update(self, name: str, worker: str, told: int | None, behind: int, seed: int) -> None:
        number = next(self.numbers)
        answer = self.house.push(make_body(seed), number, worker, name, behind, told)
        before = self.model.counters.get((name, worker))
        steps = 1 if told is None else told - before if before is not None and told >= before else told
        if told is not None:
            self.model.counters[name, worker] = told
        versions = self.model.experts[name]
        landed = Landed(number, worker, seed, answer.coefficient, steps)
        newest = versions[-1]
        versions.append(Version(newest.start, newest.fold, newest.since, (*newest.updates, landed)))

    def train(self, data: st.DataObject) -> None:
        """As many updates for one expert as make it ready, of one step each."""
        name = data.draw(st.sampled_from(sorted(self.model.experts)))
        for number in range(MERGE_AFTER):
            self.update(name, WORKERS[number % 2], None, 0, number)

    @rule()
    def fold(self) -> None:
        ready = self.model.ready()
        assert self.house.service._background_merge.merge_ready() is bool(ready)
        if ready:
            self.model.fold(ready, self.model.sharing() > 1)

    @rule(data=st.data(), what=st.sampled_from(["push", "push", "rollback", "retract", "register", "crash"]))
    def fold_while_something_happens(self, data: st.DataObject, what: str) -> None:
        """Planned and computed, then overtaken: what was planned is decided on what is there by then, or void."""
        if not self.model.ready():
            self.train(data)
        ready, several = self.model.ready(), self.model.sharing() > 1
        plan = self.house.service._background_merge._plan()
        assert plan is not None
        assert plan.experts.keys() == ready.keys()
        folded = self.house.service._background_merge._compute(plan)
        match what:
            case "push":
                self.push(data, data.draw(st.sampled_from(WORKERS)), None, 0)
            case "rollback":
                self.roll_back(data, data.draw(st.integers(1, 3)))
            case "retract":
                self.retract(data, data.draw(st.sampled_from(WORKERS)))
            case "register":
                self.register(data.draw(st.sampled_from(EXPERTS)))
            case "crash":
                self.crash()
        if all(self.follows(name, seen) for name, (_, seen) in ready.items()):
            self.house.service._background_merge._publish(plan, folded, 0.0)
            self.model.fold(ready, several)
        else:
            with pytest.raises(MergeOvertakenError):
                self.house.service._background_merge._publish(plan, folded, 0.0)

    def follows(self, name: str, seen: Version) -> bool:
        newest = self.model.experts[name][-1].updates
        return newest[: len(seen.updates)] == seen.updates

    @rule(data=st.data(), back=st.integers(1, 6))
    def roll_back(self, data: st.DataObject, back: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.experts)))
        versions = self.model.experts[name]
        wanted = len(versions) - 1 - back
        if wanted < 0:
            return
        refused = refusal_of(lambda: self.house.roll_back(wanted, name))
        if wanted < versions[-1].since:
            assert refused == "folded"
        else:
            assert refused in ({"", "history_pruned"} if self.keep else {""})
        if refused:
            return
        versions.append(versions[wanted])

    @rule(data=st.data(), worker=st.sampled_from(WORKERS))
    def retract(self, data: st.DataObject, worker: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.experts)))
        versions = self.model.experts[name]
        newest = versions[-1]
        kept = tuple(landed for landed in newest.updates if landed.worker != worker)
        refused = refusal_of(lambda: self.house.retract(worker, name))
        if kept == newest.updates:
            assert refused == "nothing_to_retract"
        else:
            assert refused in ({"", "history_pruned"} if self.keep else {""})
        if refused:
            return
        versions.append(Version(newest.start, newest.fold, newest.since, kept))

    @rule()
    def crash(self) -> None:
        self.house.crash()

    @invariant()
    def the_experts_are_what_the_lists_say(self) -> None:
        for name, versions in self.model.experts.items():
            expert, state = self.house.expert(name), versions[-1].state(self.model.rule)
            assert expert.version == len(versions) - 1
            np.testing.assert_array_equal(expert.state.weights, state.weights)
            assert expert.state.count == state.count

    @invariant()
    def the_gateway_is_the_last_fold(self) -> None:
        np.testing.assert_array_equal(gateway(self.house).adapter.flat, self.model.gateway)
        assert online_gateway_of(self.house).number == self.model.gateway_merges
        assert online_gateway_of(self.house).sources.keys() == self.model.folded

    @invariant()
    def it_is_known_how_far_each_expert_is_from_the_gateway(self) -> None:
        expected = {n: (v[-1].fold, v[-1].since, v[-1].steps) for n, v in self.model.experts.items()}
        found = online_gateway_of(self.house).branch_points
        assert {name: (left.gateway, left.version, left.steps) for name, left in found.items()} == expected
        assert online_gateway_of(self.house).reported == self.model.counters

    @invariant()
    def nothing_is_in_the_journal_twice_and_versions_only_rise(self) -> None:
        events = list(self.house.journal.events())
        assert self.house.service.coordinator.gateway_version == len(events)
        gateway_merges = [event for event in events if isinstance(event, GatewayMerged)]
        assert [event.number for event in gateway_merges] == list(range(1, self.model.gateway_merges + 1))
        assert sorted(event.version for event in gateway_merges) == [event.version for event in gateway_merges]
        numbers = [event.sequence for event in events if isinstance(event, UpdateAccepted)]
        assert len(numbers) == len(set(numbers))


class NesterovMachine(FoldingMachine):
    optimizer = "nesterov"


class BufferMachine(FoldingMachine):
    buffer = 3


class PruningMachine(FoldingMachine):
    keep = 4


KINDS = [FoldingMachine, NesterovMachine, BufferMachine, PruningMachine]


def walk(machine: type[FoldingMachine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    )


@pytest.mark.parametrize("machine", KINDS)
def test_whatever_happens_nothing_is_lost_and_nothing_is_merged_twice(machine: type[FoldingMachine]) -> None:
    walk(machine, 8, 30)


@pytest.mark.slow
@pytest.mark.parametrize("machine", KINDS)
def test_whatever_happens_for_long_nothing_is_lost_and_nothing_is_merged_twice(machine: type[FoldingMachine]) -> None:
    walk(machine, 200, 60)
