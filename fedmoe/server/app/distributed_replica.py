"""One of several coordinators of a federation, as a process: takes every request, decides while it is the owner."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import structlog
import uvicorn
from starlette.types import ASGIApp

from fedmoe.config import CoordinatorConfig
from fedmoe.server.access import problems
from fedmoe.server.app.federation_app import FederationApp
from fedmoe.server.descriptors import raise_limit
from fedmoe.server.replicas.ownership import Owners, OwnersUnknownError
from fedmoe.server.replicas.peers import PeerSecret, check_address
from fedmoe.server.replicas.replica_app import ReplicaApp
from fedmoe.server.replicas.tenure import OwnerCandidate, Tenure
from fedmoe.server.storage.acknowledged import AcknowledgedFile
from fedmoe.server.storage.audit import AUDIT_HEAD
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.chained_journal import ChainedJournal
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.object_store import claim, shared_blobs
from fedmoe.server.storage.postgres import postgres_engine
from fedmoe.server.storage.postgres_journal import PostgresJournal
from fedmoe.server.storage.read_ahead import ReadAhead
from fedmoe.server.storage.state_dir import lock_state
from fedmoe.wire.contract.replicas import OwnerInfo
from fedmoe.wire.http.middleware import ProtocolMiddleware
from fedmoe.wire.http.serving import listen, own_signals, server_of

_log = structlog.get_logger("fedmoe.replica")

_THREADS = 4
# A request waits for an owner through a lease and a takeover.
_PATIENCE_LEASES, _PATIENCE_SECONDS = 1.5, 2.0


class DistributedReplica:
    """A replica: its own folder and socket, and what it shares with the others: PostgreSQL and the object store.

    `announce` is called with the tokens that were made at the federation's first start.
    """

    def __init__(self, config: CoordinatorConfig, announce: Callable[[FederationApp], None]) -> None:
        assert config.replica is not None, "the configuration asks for the others then"
        assert config.advertise is not None
        assert config.database_url is not None
        assert config.blobs is not None
        assert config.replica_secret_file is not None
        self.config = config
        check_address(config.advertise)
        secret = PeerSecret.read(Path(config.replica_secret_file))
        raise_limit()
        self._announce = announce
        self._lease = config.lease_seconds
        self._folder = Path(config.state_dir)
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = lock_state(self._folder)
        self._url = config.database_url.get_secret_value()
        # Of its own connection: what the journal waits for keeps no lease from being renewed.
        self._owners = Owners(postgres_engine(self._url), 2 * self._lease / 3)
        self._blobs = shared_blobs(config.blobs, FolderBlobStore(self._folder / "spool"))
        self._read_ahead = ReadAhead(self._url, self._lease / 3, first=3 * self._lease)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="fedmoe-upload")
        patience = _PATIENCE_LEASES * self._lease + _PATIENCE_SECONDS
        self._replica_app = ReplicaApp(secret, self._blobs, self._pool, patience)
        self._candidate = OwnerCandidate(
            self._owners, config.replica, config.advertise, self._lease, self._open, self._replica_app.wake
        )
        self.app: ASGIApp = ProtocolMiddleware(self._replica_app, "this coordinator", problems.refusal)
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve(self) -> int:
        """Listen until SIGTERM or SIGINT; the duty is given back, requests under way end, then it returns."""
        listener = listen(self.config.host, self.config.port)
        server = server_of(self.app, self.config.tls_cert, self.config.tls_key)
        try:
            with own_signals(server), asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                port = listener.getsockname()[1]
                _log.info("listening", replica=self.config.replica, host=self.config.host, port=port, pid=os.getpid())
                runner.run(self._run(server, listener))
        finally:
            self._candidate.stop()
            self._read_ahead.close()
            self._pool.shutdown()
            self._owners.close()
            self._lock.close()
        _log.info("stopped")
        return 0

    async def _run(self, server: uvicorn.Server, listener: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._replica_app.attach(self._candidate)
        self._candidate.start()
        self._read_ahead.start()
        leaving = asyncio.create_task(self._hand_over(server))
        try:
            await server.serve(sockets=[listener])
        finally:
            server.should_exit = True
            await leaving
            await self._replica_app.close()

    async def _hand_over(self, server: uvicorn.Server) -> None:
        """Once the process is to stop: finish what was taken, give the duty back, pass on what still comes."""
        while not server.should_exit:
            await asyncio.sleep(0.05)
        await self._replica_app.leave(self._lease)
        await asyncio.to_thread(self._candidate.leave)

    def _open(self, tenure: Tenure) -> OwnedFederation:
        """Recover the federation for a term; called in a thread."""
        checked = self._read_ahead.take()
        with ExitStack() as opened:
            opened.callback(self._read_ahead.resume)
            acknowledged = AcknowledgedFile(self._folder / "acknowledged")
            opened.callback(acknowledged.close)
            journal = PostgresJournal(
                self._url,
                acknowledged,
                skip_damaged=self.config.skip_damaged,
                accept_loss=self.config.accept_database_loss,
                fence=tenure.fence(self._lease),
                patience=self._lease,
                patience_in_doubt=self._lease,
                checked=checked,
            )
            opened.callback(journal.close)
            self._check_newest(journal, acknowledged)
            claim(self._blobs.bucket, journal)
            head = f"{AUDIT_HEAD}:{self.config.replica}"
            federation = FederationApp(
                self.config, journal, self._blobs, self._folder, lambda: tenure.lost, head, self._owner_infos
            )
            assert self._loop is not None, "the candidate starts in the loop"
            owned = OwnedFederation(federation, journal, acknowledged, self._loop, self._read_ahead.resume)
            opened.pop_all()
        self._announce(federation)
        return owned

    def _check_newest(self, journal: ChainedJournal, acknowledged: AcknowledgedFile) -> None:
        """Refuse a journal that lacks what this replica acknowledged, or let another incarnation begin with it."""
        lacking = journal.gap_since(acknowledged.read())
        if lacking is not None and not self.config.accept_older_journal:
            raise StorageFailedError(
                f"the database does not hold the newest journal: {lacking.reason}. It was put back to an older state, "
                "a standby that lagged behind took over, or it is another one: bring the newest one back. To go on "
                "without what it lacks, start this replica once with --accept-older-journal: a new incarnation begins"
            )
        if lacking is not None:
            journal.begin_incarnation()
            incarnation = journal.head.incarnation
            _log.warning("older_journal_accepted", reason=lacking.reason, incarnation=incarnation)
        acknowledged.start_anew(journal.head)

    def _owner_infos(self) -> Sequence[OwnerInfo]:
        try:
            rows = self._owners.all()
        except OwnersUnknownError as error:
            raise problems.no_owner(f"the database does not say who is the owner: {error}") from error
        return [
            OwnerInfo(
                duty=row.duty,
                replica=row.replica,
                url=row.url,
                term=row.term,
                seconds_left=max(0.0, round(row.left, 3)),
            )
            for row in rows
        ]


class OwnedFederation:
    """The federation in the memory of its owner, and the journal that it writes under the term's fence.

    `dropped` is called once it is out of memory.
    """

    def __init__(
        self,
        federation: FederationApp,
        journal: ChainedJournal,
        acknowledged: AcknowledgedFile,
        loop: asyncio.AbstractEventLoop,
        dropped: Callable[[], None],
    ) -> None:
        self._dropped = dropped
        self._federation = federation
        self._journal = journal
        self._acknowledged = acknowledged
        self.app: ASGIApp = federation.app
        federation.service.start()
        self._beside = asyncio.run_coroutine_threadsafe(federation.look_after(), loop)

    def problem(self) -> str | None:
        return self._federation.service.committer.failed

    def close(self, abandoned: bool) -> None:
        self._beside.cancel()
        if abandoned:
            self._journal.close()
        try:
            self._federation.close(abandoned)
        finally:
            self._journal.close()
            self._acknowledged.close()
            self._dropped()
