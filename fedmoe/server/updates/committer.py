"""The single writer thread: decides, journals in groups, publishes, then answers.

Request handlers put a decision into the queue and wait for its future. The committer takes whatever waits, works it out
in one transaction, journals that as one, publishes, and only then answers. So all requests of a group share a slow
fsync, and versions come in the order of the journal.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar, cast

import structlog

from fedmoe.coordinator import CentralCoordinator, Transaction
from fedmoe.runtime import failpoints
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.journal import Journal, NotOwnerError, UnstorableError
from fedmoe.server.updates.upload import settled

_log = structlog.get_logger("fedmoe.committer")
_MAX_GROUP = 64

Result = TypeVar("Result")


@dataclass(frozen=True)
class _Job:
    """`alone`: the decision reads the journal's past, so nothing undecided may stand before it in the same group."""

    decide: Callable[[Transaction], object]
    alone: bool
    answer: Future[object]


class Committer:
    """Takes decisions in order, durably; `failed` holds the reason once storage can no longer be trusted.

    `clock` gives the time of decisions, in seconds since 1970.
    """

    def __init__(
        self,
        coordinator: CentralCoordinator,
        journal: Journal,
        clock: Callable[[], float],
        after_commit: Callable[[Transaction], None],
        storage_problem: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.coordinator = coordinator
        self.journal = journal
        self.clock = clock
        self._after_commit = after_commit
        self._storage_problem = storage_problem
        self._queue: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="fedmoe-committer", daemon=True)
        self._ended = False
        self.failed: str | None = None

    def start(self) -> None:
        self._thread.start()

    @property
    def running(self) -> bool:
        """Whether decisions are taken."""
        return self._thread.is_alive()

    @property
    def waiting(self) -> int:
        """How many decisions are queued, about."""
        return self._queue.qsize()

    def submit(self, decide: Callable[[Transaction], Result], alone: bool = False) -> Future[Result]:
        """Queue a decision; its future holds the result once it is durable and published."""
        answer: Future[object] = Future()
        self._queue.put(_Job(decide, alone, answer))
        if self._ended:
            self._refuse_waiting()
        return cast("Future[Result]", answer)

    async def decided(self, decide: Callable[[Transaction], Result], alone: bool = False) -> Result:
        """The result of a decision; a cancelled request waits for it: its blobs must stay until they are journalled."""
        return await settled(asyncio.wrap_future(self.submit(decide, alone)))

    def check_storage(self) -> None:
        """Raise `StorageFailedError`, now and from now on, if what is written is no longer where it can be found."""
        if self.failed:
            raise StorageFailedError(self.failed)
        self._refuse_if_lost()

    def _refuse_if_lost(self) -> None:
        problem = self._storage_problem()
        if problem is not None:
            self.fail(problem)
            raise StorageFailedError(problem)

    def fail(self, reason: str) -> None:
        """Accept nothing from now on; the first reason is kept, since later ones follow from it."""
        self.failed = self.failed or reason

    def close(self) -> None:
        """Finish what is queued and stop; safe to call before `start` and more than once."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        for group in self._groups():
            self._commit(group)
            group.clear()  # while nothing else waits, what was decided would stay in memory
        self._ended = True
        self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        """Refuse what came after the end: nobody would ever answer it."""
        with suppress(queue.Empty):
            while True:
                job = self._queue.get_nowait()
                if job is not None and job.answer.set_running_or_notify_cancel():
                    job.answer.set_exception(NotOwnerError("this coordinator decides no more"))

    def _groups(self) -> Iterator[list[_Job]]:
        """What waits in the queue, as groups to commit together, until `close`."""
        group: list[_Job] = []
        while True:
            try:
                job = self._queue.get(block=not group)
            except queue.Empty:
                yield group
                group = []
                continue
            if group and (job is None or job.alone):
                yield group
                group = []
            if job is None:
                return
            group.append(job)
            full = job.alone or len(group) == _MAX_GROUP
            del job  # it holds an update
            if full:
                yield group
                group = []

    def _commit(self, group: list[_Job]) -> None:
        # From here on a future cannot be cancelled, so that answering it cannot fail.
        self._commit_running([job for job in group if job.answer.set_running_or_notify_cancel()])

    def _commit_running(self, jobs: list[_Job]) -> None:
        transaction = self.coordinator.transaction()
        decided = self._decide(transaction, jobs)
        try:
            if transaction.events:
                failpoints.reached("commit.before")
                self.journal.append(transaction.events, transaction.version_digests)
                failpoints.reached("commit.after")
                self._refuse_if_lost()  # what went into a folder that is gone meanwhile is not acknowledged
        except Exception as error:
            if isinstance(error, StorageFailedError):
                self.fail(str(error))
            if isinstance(error, UnstorableError) and len(decided) > 1:
                # It is one of them whose values are at fault: the others land.
                for job, _ in decided:
                    self._commit_running([job])
                return
            for job, _ in decided:
                job.answer.set_exception(error)
            return
        self.coordinator.publish(transaction)
        failpoints.reached("commit.published")
        for job, result in decided:
            job.answer.set_result(result)
        # Snapshots and pruning are useful, but what was acknowledged does not depend on them.
        try:
            self._after_commit(transaction)
        except StorageFailedError as error:
            self.fail(str(error))
        except Exception as error:
            _log.warning("snapshot_failed", error=str(error))

    def _decide(self, transaction: Transaction, jobs: list[_Job]) -> list[tuple[_Job, object]]:
        """Work the decisions out in one transaction; a decision that fails is answered at once and changes nothing."""
        decided: list[tuple[_Job, object]] = []
        for job in jobs:
            before = transaction.savepoint()
            try:
                self.check_storage()
                decided.append((job, job.decide(transaction)))
            except Exception as error:
                transaction.rollback_to(before)
                job.answer.set_exception(error)
        return decided
