"""A service in one process that can be crashed and opened again, for tests of its history."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from memory_blobs import MemoryBlobStore
from support import MANIFEST, make_body, make_push, open_service

from fedmoe.coordinator import Aggregation
from fedmoe.experts import ExpertModel
from fedmoe.lora.update_rules import RuleState
from fedmoe.server.service import CoordinatorService
from fedmoe.server.storage.blobs import BlobStore
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.wire.contract.messages import (
    ManifestMessage,
    RegisterRequest,
    RetractRequest,
    RollbackRequest,
    UpdateResult,
)


@dataclass
class House:
    """A service on one journal and one blob store, that can be crashed and opened again."""

    journal: Journal
    blobs: BlobStore
    aggregation: Aggregation
    keep_updates: int | None
    service: CoordinatorService
    merges_by_itself: bool = True

    @classmethod
    def open(
        cls,
        aggregation: Aggregation | None = None,
        keep_updates: int | None = None,
        blobs: BlobStore | None = None,
        merges_by_itself: bool = True,
    ) -> House:
        store, chosen = blobs or MemoryBlobStore(), aggregation or Aggregation()
        return cls.on(SqliteJournal(None), store, chosen, keep_updates, merges_by_itself)

    @classmethod
    def on(
        cls,
        journal: Journal,
        store: BlobStore,
        chosen: Aggregation,
        keep_updates: int | None = None,
        merges_by_itself: bool = True,
    ) -> House:
        """On a journal and blobs there are."""
        service = open_service(journal, store, chosen, keep_updates, merges_by_itself)
        return cls(journal, store, chosen, keep_updates, service, merges_by_itself)

    def crash(self) -> None:
        """Drop everything that is in memory and recover."""
        self.service.close()
        self.service = open_service(
            self.journal, self.blobs, self.aggregation, self.keep_updates, self.merges_by_itself
        )

    def register(self, name: str = "python", seed: int | None = None) -> None:
        request = RegisterRequest(expert=name, worker="w1", manifest=ManifestMessage.of(MANIFEST), seed=seed)
        asyncio.run(self.service.register(request))

    def push(
        self,
        data: bytes,
        sequence: int,
        worker: str = "w1",
        expert: str = "python",
        behind: int = 0,
        steps: int | None = None,
    ) -> UpdateResult:
        base = max(0, self.service.coordinator.expert(expert).version - behind)
        return asyncio.run(self.service.intake.push(*make_push(data, base, sequence, worker, expert, steps)))

    def train(self, workers: Sequence[str], expert: str = "python") -> None:
        """One update from each worker named, with content that follows from the version it is made from."""
        for worker in workers:
            self.push(make_body(self.expert(expert).version), self.journal.count(), worker, expert)
        self.settle()

    def settle(self) -> None:
        """Wait until snapshots and pruning, which follow an answer, are done."""
        self.service.committer.submit(lambda transaction: None).result(10)

    def roll_back(self, to_version: int, expert: str = "python") -> int:
        return asyncio.run(self.service.undo.roll_back(RollbackRequest(expert=expert, to_version=to_version))).removed

    def retract(self, worker: str, expert: str = "python") -> int:
        return asyncio.run(self.service.undo.retract(RetractRequest(expert=expert, worker=worker))).removed

    def expert(self, name: str = "python") -> ExpertModel:
        return self.service.coordinator.expert(name)

    def same_after_a_crash(self, name: str = "python") -> None:
        before = self.expert(name)
        self.crash()
        assert_same_state(self.expert(name).state, before.state)
        assert self.expert(name).version == before.version


def assert_same_state(one: RuleState, other: RuleState) -> None:
    np.testing.assert_array_equal(one.weights, other.weights)
    assert len(one.moments) == len(other.moments)
    for mine, theirs in zip(one.moments, other.moments, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert one.count == other.count
