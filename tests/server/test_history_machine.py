"""A random walk through everything that changes an expert, held after every step against a model of plain lists."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)
from memory_blobs import MemoryBlobStore
from support import LAYOUT, MANIFEST, make_flat, make_push, open_service, sha256

from fedmoe.coordinator import Aggregation
from fedmoe.federation.events import UpdateAccepted
from fedmoe.federation.quarantine import MOST_OF_A_WORKER
from fedmoe.lora.adapter import FloatVector, initial_adapter
from fedmoe.lora.codec import encode
from fedmoe.lora.update_rules import USUAL_LEAST
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.service import CoordinatorService
from fedmoe.server.storage.blobs import BlobStore, put
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.wire.contract.messages import (
    ManifestMessage,
    RegisterRequest,
    RetractRequest,
    RollbackRequest,
    UpdateResult,
)

EXPERTS = ["python", "sql"]
#: Seeds of updates far above the usual norm.
HUGE = 50
WORKERS = ["w1", "w2", "w3"]
KEEP = 4


@dataclass(frozen=True)
class Push:
    """An update as its worker knows it; the seed stands for the bytes."""

    expert: str
    worker: str
    sequence: int
    base_version: int
    seed: int


@dataclass(frozen=True)
class Landed:
    """An update as the model keeps it."""

    worker: str
    version: int
    seed: int
    coefficient: float


class Model:
    """One expert as lists: for every version, which updates it is made of; merged anew each time it is asked."""

    def __init__(self, seed: int, momentum: bool) -> None:
        self.start = initial_adapter(LAYOUT, MANIFEST.alpha, seed).flat
        self.momentum = momentum
        self.versions: list[list[Landed]] = [[]]

    @property
    def version(self) -> int:
        return len(self.versions) - 1

    def weights(self, version: int = -1) -> FloatVector:
        """The specified rule, or Nesterov with momentum 0.9, written down once more and without any shortcut."""
        weights, velocity = self.start.copy(), np.zeros_like(self.start)
        point_nine = np.float32(0.9)
        for landed in self.versions[version]:
            step = sized(landed.seed) * np.float32(landed.coefficient)
            if self.momentum:
                velocity = step + velocity * point_nine
                step = (step + velocity * point_nine) * np.float32(1.0 - 0.9)
            weights = weights + step
        return weights


def sized(seed: int) -> FloatVector:
    return make_flat(seed) * np.float32(1e4 if HUGE <= seed < 90 else 1)


def make_body(seed: int) -> bytes:
    return encode(LAYOUT, sized(seed))


Result = TypeVar("Result")


def attempt(call: Coroutine[object, object, Result]) -> Result | RefusedError:
    try:
        return asyncio.run(call)
    except RefusedError as error:
        return error


class Machine(RuleBasedStateMachine):
    """Commands go to a real service; a crash forgets everything but the journal and the blobs."""

    pushes = Bundle("pushes")
    optimizer = "sgd"
    keep: int | None = None
    on_disk = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = TemporaryDirectory() if self.on_disk else None
        self.aggregation = Aggregation(0.5, max_staleness=5, server_optimizer=self.optimizer)
        self.journal, self.blobs = self.open_storage()
        self.service: CoordinatorService = open_service(self.journal, self.blobs, self.aggregation, self.keep)
        self.models: dict[str, Model] = {}
        self.acknowledged: dict[tuple[str, int], UpdateResult] = {}
        self.events = 0
        self.numbers = itertools.count()
        self.highest = 0
        self.pending: list[tuple[str, Landed]] = []
        self.held: dict[int, Push] = {}
        self.rejected: list[Push] = []
        self.about_held = 0
        self.retired: set[str] = set()
        self.titles: dict[str, str] = {}
        self.former: dict[str, list[str]] = {}

    def open_storage(self) -> tuple[Journal, BlobStore]:
        if self.folder is None:
            return SqliteJournal(None), MemoryBlobStore()
        path = Path(self.folder.name)
        return SqliteJournal(path / "journal.sqlite"), FolderBlobStore(path / "blobs", 0)

    def teardown(self) -> None:
        self.service.close()
        self.journal.close()
        if self.folder is not None:
            self.folder.cleanup()

    @initialize()
    def first_expert(self) -> None:
        self.register("python")

    @rule(name=st.sampled_from(EXPERTS))
    def register(self, name: str) -> None:
        if any(name in given for first, given in self.former.items() if first != name):
            return  # another expert's name by now
        seed = EXPERTS.index(name)
        manifest = ManifestMessage.of(MANIFEST)
        wanted = RegisterRequest(expert=name, worker="w1", manifest=manifest, seed=seed)
        if name in self.retired:
            with pytest.raises(RefusedError, match="is retired"):
                asyncio.run(self.service.register(wanted))
            return
        asyncio.run(self.service.register(wanted))
        if name not in self.models:
            self.models[name] = Model(seed, self.optimizer == "nesterov")
            self.events += 1

    @rule(
        target=pushes, data=st.data(), worker=st.sampled_from(WORKERS), count=st.integers(1, 4), lag=st.integers(-1, 7)
    )
    def push(self, data: st.DataObject, worker: str, count: int, lag: int) -> object:
        """One or several updates at once; equal bytes are common, and some come from the future or far behind."""
        made = []
        for _ in range(count):
            expert = data.draw(st.sampled_from(sorted(self.models)))
            base = max(0, self.models[expert].version - lag)
            made.append(Push(expert, worker, next(self.numbers), base, data.draw(st.integers(0, 9))))
        for one, answer in zip(made, self.send(made), strict=True):
            if isinstance(answer, UpdateResult):
                assert not answer.duplicate
                self.acknowledge(one, answer)
        self.check_refusals(made)
        return multiple(*made)

    def send(self, pushes: list[Push]) -> list[UpdateResult | BaseException]:
        async def all_at_once() -> list[UpdateResult | BaseException]:
            calls = [
                self.service.intake.push(*make_push(make_body(p.seed), p.base_version, p.sequence, p.worker, p.expert))
                for p in pushes
            ]
            return await asyncio.gather(*calls, return_exceptions=True)

        answers = asyncio.run(all_at_once())
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert all(isinstance(answer, RefusedError) for answer in refused), refused
        return answers

    def acknowledge(self, push: Push, answer: UpdateResult) -> None:
        """What was answered goes into the model in the order of its versions."""
        self.acknowledged[push.worker, push.sequence] = answer
        self.events += 1
        tau = answer.version - 1 - push.base_version
        assert 0 <= tau <= 5
        assert (answer.staleness, answer.digest) == (tau, sha256(make_body(push.seed)))
        assert answer.coefficient == pytest.approx(0.5 * (1 + tau) ** -0.5, rel=1e-15)
        self.pending.append((push.expert, Landed(push.worker, answer.version, push.seed, answer.coefficient)))

    def check_refusals(self, made: list[Push]) -> None:
        for expert, landed in sorted(self.pending, key=lambda item: item[1].version):
            model = self.models[expert]
            assert landed.version == model.version + 1
            model.versions.append([*model.versions[-1], landed])
        self.pending.clear()
        for push in made:
            if (push.worker, push.sequence) not in self.acknowledged:
                if push.expert in self.retired:
                    continue
                behind = self.models[push.expert].version - push.base_version
                # Versions only rise: what was refused for its age is too old now, what came from the future may be due.
                assert behind > 5 or push.base_version > 0

    @rule(push=pushes)
    def repeat(self, push: Push) -> None:
        """The same update again: the first answer if it landed, else judged by the state there is now."""
        answer = self.send([push])[0]
        first = self.acknowledged.get((push.worker, push.sequence))
        if first is not None:
            assert isinstance(answer, UpdateResult)
            assert answer.duplicate
            beside = {name: getattr(first, name) for name in ("duplicate", "gateway_version", "note", "outcomes")}
            assert answer.model_copy(update=beside) == first
        elif isinstance(answer, UpdateResult):
            self.acknowledge(push, answer)
            self.check_refusals([push])

    @rule(push=pushes, seed=st.integers(10, 12))
    def reuse_a_number(self, push: Push, seed: int) -> None:
        """Other bytes under a number that was taken."""
        if (push.worker, push.sequence) not in self.acknowledged:
            return
        other = Push(push.expert, push.worker, push.sequence, self.models[push.expert].version, seed)
        answer = self.send([other])[0]
        assert isinstance(answer, RefusedError)
        assert answer.code == "sequence_reused"

    @rule(push=pushes, times=st.integers(2, 4))
    def race(self, push: Push, times: int) -> None:
        """A new update over several connections at once: it lands once, and all get the same answer."""
        one = Push(push.expert, push.worker, next(self.numbers), self.models[push.expert].version, push.seed)
        answers = self.send([one] * times)
        if push.expert in self.retired:
            assert {answer.code for answer in answers if isinstance(answer, RefusedError)} == {"retired"}
            return
        results = [answer for answer in answers if isinstance(answer, UpdateResult)]
        assert len(results) == times
        assert sorted(result.duplicate for result in results) == [False] + [True] * (times - 1)
        assert len({result.version for result in results}) == 1
        self.acknowledge(one, next(result for result in results if not result.duplicate))
        self.check_refusals([one])

    @rule(data=st.data(), worker=st.sampled_from(WORKERS), seed=st.integers(HUGE, HUGE + 2))
    def push_a_huge_one(self, data: st.DataObject, worker: str, seed: int) -> None:
        """It waits once there is something usual; before that it would land, so none is sent."""
        name = data.draw(st.sampled_from(sorted(self.models)))
        if name in self.retired or len(self.service.coordinator.expert(name).norms) < USUAL_LEAST:
            return
        one = Push(name, worker, next(self.numbers), self.models[name].version, seed)
        waiting = sum(push.worker == worker for push in self.held.values())
        answer = self.send([one])[0]
        if waiting >= MOST_OF_A_WORKER:
            assert isinstance(answer, RefusedError)
            assert answer.code == "quarantine_full"
            return
        assert isinstance(answer, UpdateResult)
        assert (answer.status, answer.version) == ("quarantined", self.models[name].version)
        assert answer.held is not None
        self.held[answer.held] = one
        self.about_held += 1
        again = self.send([one])[0]
        assert isinstance(again, UpdateResult)
        assert (again.status, again.held, again.duplicate) == ("quarantined", answer.held, True)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        push = self.held[number]
        if push.expert in self.retired:
            with pytest.raises(RefusedError, match="is retired"):
                self.service.intake.release(number)
            return
        if self.models[push.expert].version - push.base_version > 5:
            with pytest.raises(RefusedError, match="versions behind"):
                self.service.intake.release(number)
            return
        answer = self.service.intake.release(number)
        del self.held[number]
        self.acknowledge(push, answer)
        self.check_refusals([push])

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def reject(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        self.service.intake.reject(number, "no")
        self.forget_rejected([number])

    def forget_rejected(self, numbers: list[int]) -> None:
        self.rejected += [self.held.pop(number) for number in numbers]
        self.about_held += len(numbers)

    @precondition(lambda self: self.rejected)
    @rule(data=st.data())
    def repeat_a_rejected_one(self, data: st.DataObject) -> None:
        answer = self.send([data.draw(st.sampled_from(self.rejected))])[0]
        assert isinstance(answer, RefusedError)
        assert answer.code == "update_rejected"

    @rule(data=st.data(), back=st.integers(1, 8))
    def roll_back(self, data: st.DataObject, back: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.models)))
        model = self.models[name]
        to_version = model.version - back
        if to_version < 0:
            return
        answer = attempt(self.service.undo.roll_back(RollbackRequest(expert=name, to_version=to_version)))
        if isinstance(answer, RefusedError):
            assert (answer.code, back > (self.keep or 99)) == ("history_pruned", True)
            return
        model.versions.append(model.versions[to_version])
        self.events += 1
        self.settle()
        np.testing.assert_array_equal(self.weights(name), model.weights(to_version))

    @rule(data=st.data(), worker=st.sampled_from(WORKERS))
    def retract(self, data: st.DataObject, worker: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.models)))
        model = self.models[name]
        newest = model.versions[-1]
        kept = [landed for landed in newest if landed.worker != worker]
        answer = attempt(self.service.undo.retract(RetractRequest(expert=name, worker=worker)))
        if isinstance(answer, RefusedError):
            horizon = model.version - (self.keep or 99)
            pruned = any(landed.worker == worker and landed.version <= horizon for landed in newest)
            assert answer.code == ("nothing_to_retract" if kept == newest else "history_pruned" if pruned else "")
            return
        assert answer.removed == len(newest) - len(kept) > 0
        held = [number for number, push in self.held.items() if (push.expert, push.worker) == (name, worker)]
        self.forget_rejected(sorted(held))
        model.versions.append(kept)
        self.events += 1

    @rule(data=st.data(), times=st.integers(1, 2))
    def retire_or_bring_back(self, data: st.DataObject, times: int) -> None:
        """Whoever is retired comes back, and the other way round; a second time changes nothing."""
        name = data.draw(st.sampled_from(sorted(self.models)))
        back = name in self.retired
        before = self.weights(name)
        for _ in range(times):
            if back:
                asyncio.run(
                    self.service.committer.decided(
                        lambda transaction: transaction.unretire(self.titles.get(name, name), 1.0)
                    )
                )
            else:
                asyncio.run(self.service.committer.decided(lambda transaction: transaction.retire(name, "", 1.0)))
        self.retired ^= {name}
        self.events += 1
        np.testing.assert_array_equal(self.weights(name), before)

    @rule(data=st.data(), to=st.sampled_from(["python", "sql", "law", "tax"]))
    def rename(self, data: st.DataObject, to: str) -> None:
        """Names are given once; the former ones go on meaning their expert."""
        name = data.draw(st.sampled_from(sorted(self.models)))
        holder = {title: first for first in self.models for title in (first, *self.given(first))}.get(to, name)
        answer = attempt(self.service.committer.decided(lambda transaction: transaction.rename(name, to, 1.0)))
        if isinstance(answer, RefusedError):
            assert (answer.code, holder != name) == ("name_taken", True)
            return
        assert holder == name
        if self.titles.get(name, name) != to:
            self.titles[name] = to
            self.former.setdefault(name, []).append(to)
            self.events += 1

    def given(self, name: str) -> list[str]:
        return self.former.get(name, [])

    @rule(torn=st.booleans())
    def crash(self, torn: bool) -> None:
        """Everything in memory is lost; perhaps also a blob was stored and an upload begun."""
        self.service.close()
        if torn:
            put(self.blobs, make_body(99))
            self.blobs.writer().write(b"half an upload")
        if self.on_disk:
            self.journal.close()
            self.journal, self.blobs = self.open_storage()
        self.service = open_service(self.journal, self.blobs, self.aggregation, self.keep)
        # What nothing names is kept for a day.
        assert not torn or sha256(make_body(99)) in set(self.blobs.digests())
        if isinstance(self.blobs, FolderBlobStore):
            assert list((self.blobs.folder / "incoming").iterdir()) == []

    @precondition(lambda self: self.keep is None)
    @rule()
    def replay_without_snapshots(self) -> None:
        """All snapshots lost: the updates alone give the same bits."""
        self.settle()
        for name in self.models:
            for version, digest in self.journal.snapshots(name).items():
                self.journal.drop_snapshot(name, version)
                self.blobs.delete(digest)
        self.crash(torn=False)

    def settle(self) -> None:
        self.service.committer.submit(lambda transaction: None).result(10)

    def weights(self, name: str) -> FloatVector:
        return self.service.coordinator.expert(name).state.weights

    @invariant()
    def the_experts_are_a_naive_fold_of_what_was_acknowledged(self) -> None:
        for name, model in self.models.items():
            assert self.service.coordinator.expert(name).version == model.version
            np.testing.assert_array_equal(self.weights(name), model.weights())

    @invariant()
    def the_gateways_version_counts_the_journal_and_only_rises(self) -> None:
        version = self.service.coordinator.gateway_version
        assert version == self.journal.count() - self.about_held == self.events >= self.highest
        self.highest = version

    @invariant()
    def the_gateway_is_made_of_those_that_learned_and_are_not_retired(self) -> None:
        coordinator = self.service.coordinator
        for name in self.models:
            for known in (name, *self.given(name)):
                assert coordinator.expert(known).title == self.titles.get(name, name)
            assert coordinator.expert(name).retired == (name in self.retired)
        if coordinator.active:
            sources = {name for name, model in self.models.items() if model.versions[-1]} - self.retired
            assert coordinator.gateway().sources.keys() == sources

    @invariant()
    def every_acknowledged_update_is_in_the_journal_exactly_once(self) -> None:
        updates = [event for event in self.journal.events() if isinstance(event, UpdateAccepted)]
        found = [(event.worker, event.sequence, event.version, event.digest) for event in updates]
        expected = [(w, s, answer.version, answer.digest) for (w, s), answer in self.acknowledged.items()]
        assert sorted(found) == sorted(expected)

    @invariant()
    def what_is_held_is_there_with_its_bytes(self) -> None:
        self.settle()
        quarantine = self.service.coordinator.quarantine
        found = {held.number: (held.expert, held.worker, held.sequence) for held in quarantine.held.values()}
        assert found == {number: (push.expert, push.worker, push.sequence) for number, push in self.held.items()}
        assert len(quarantine.rejected) == len(self.rejected)
        stored = set(self.blobs.digests())
        assert {sha256(make_body(push.seed)) for push in self.held.values()} <= stored

    @invariant()
    def the_roster_counts_what_was_accepted(self) -> None:
        self.settle()
        for name in self.models:
            counted = {info.worker: info.updates for info in self.service.roster.workers(name, 2000.0)}
            events = [e for e in self.journal.events(name) if isinstance(e, UpdateAccepted)]
            assert counted == {w: n for w in WORKERS if (n := sum(e.worker == w for e in events))}


class NesterovMachine(Machine):
    optimizer = "nesterov"


class PruningMachine(Machine):
    keep = KEEP


class PruningNesterovOnDiskMachine(Machine):
    optimizer = "nesterov"
    keep = KEEP
    on_disk = True


def walk(machine: type[Machine], examples: int, steps: int) -> None:
    run_state_machine_as_test(
        machine, settings=settings(max_examples=examples, stateful_step_count=steps, deadline=None)
    )


KINDS = [Machine, NesterovMachine, PruningMachine, PruningNesterovOnDiskMachine]


@pytest.mark.parametrize("machine", KINDS)
def test_whatever_happens_the_experts_are_what_was_acknowledged(machine: type[Machine]) -> None:
    walk(machine, 10, 30)


@pytest.mark.slow
@pytest.mark.parametrize("machine", KINDS)
def test_whatever_happens_for_long_the_experts_are_what_was_acknowledged(machine: type[Machine]) -> None:
    walk(machine, 200, 60)
