"""The coordinator as an HTTP service: state directory, recovery, tokens, socket, and orderly shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
import time
from functools import partial
from pathlib import Path

import structlog
import uvicorn

from fedmoe.config import ADVISED_SYNC_INTERVAL, CoordinatorConfig
from fedmoe.coordinator import Aggregation
from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.memory import trim
from fedmoe.server.access.tokens import KEEP_SECONDS, TokenGate
from fedmoe.server.access.turns import Rate
from fedmoe.server.descriptors import few_left, in_use, raise_limit
from fedmoe.server.gate.gate import GatePolicy
from fedmoe.server.history.history import History
from fedmoe.server.registrations import RegistrationLimits
from fedmoe.server.routes.json_weights import JsonPolicy
from fedmoe.server.routes.routes import create_app
from fedmoe.server.service import CoordinatorService
from fedmoe.server.storage.audit import AUDIT_HEAD, AuditHead, AuditLog
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.start_options import check_file
from fedmoe.server.storage.state_dir import StateDir
from fedmoe.server.updates.in_flight import CrashMarkers
from fedmoe.server.upkeep.retention import report_disk, retention_bound
from fedmoe.server.upkeep.sweep import DailySweep
from fedmoe.wire.http.bearer import new_token
from fedmoe.wire.http.middleware import is_loopback
from fedmoe.wire.http.serving import GuardedProtocol, listen, own_signals

_log = structlog.get_logger("fedmoe.coordinator")

EXIT_PORT_IN_USE = 98
EXIT_STORAGE_FAILED = 74
_DRAIN_SECONDS = 30
# A machine's clock that is further behind than this was set back.
_CLOCK_BEHIND = 5.0
# So long it says that its storage failed before it leaves, so that whoever watches /healthz sees why.
_FAILED_SECONDS = 3.0
_TIDY_SECONDS = 1.0


class DistributedCoordinator:
    """Owns the state directory and the service; `app` is the HTTP application, `serve` runs it until it is stopped.

    Opening recovers everything that was acknowledged before; tokens made at the first start are in `new_tokens`, and
    nowhere else.
    """

    def __init__(self, config: CoordinatorConfig) -> None:
        self.config = config
        self._descriptors = raise_limit()
        self._few_descriptors = False
        aggregation = _aggregation(config)
        self._state = StateDir.open(
            Path(config.state_dir),
            config.accept_older_journal,
            config.skip_damaged,
            config.allow_network_fs,
            partial(check_file, aggregation),
        )
        with contextlib.ExitStack() as opened:
            opened.callback(self._state.close)
            self._open(config, aggregation, opened)
            opened.pop_all()

    def _open(self, config: CoordinatorConfig, aggregation: Aggregation, opened: contextlib.ExitStack) -> None:
        journal, blobs = self._state.journal, self._state.blobs
        history = History(journal, blobs, aggregation, config.keep_updates, skip_damaged=config.skip_damaged)
        started = time.perf_counter()
        coordinator = history.recover()
        versions = {name: expert.version for name, expert in coordinator.experts.items()}
        seconds = round(time.perf_counter() - started, 3)
        _log.info("recovered", state_dir=str(self._state.path), experts=versions, seconds=seconds)
        self.service = CoordinatorService(
            coordinator,
            journal,
            blobs,
            history,
            ADVISED_SYNC_INTERVAL if config.min_sync_interval is None else config.min_sync_interval,
            gate_policy=GatePolicy(config.gate_tolerance, config.gate_seconds),
            storage_problem=self._state.problem,
            limits=RegistrationLimits(config.max_parameters, config.max_experts),
            in_flight=CrashMarkers(self._state.path / "in_flight"),
        )
        self._sweeping = DailySweep(journal, blobs, history)
        self._bound_bytes(config)
        self._noted = AuditHead.of_text(journal.meta(AUDIT_HEAD))
        self._audit = AuditLog(self._state.path, time.time, self._noted)
        opened.callback(self._audit.close)
        self.new_tokens = self._prepare_tokens(config)
        made = ", ".join(self.new_tokens)
        self._audit.write(what="start", asks_for_tokens=self.gate.required, address=config.host, tokens_made=made)
        rate = config.requests_per_second
        self.app = create_app(
            self.service,
            self.gate,
            is_loopback(config.host),
            JsonPolicy(config.json_limit),
            config.min_sync_interval,
            token_rate=Rate(rate, math.ceil(2 * rate)) if rate else None,
            audit=self._audit,
        )

    def _prepare_tokens(self, config: CoordinatorConfig) -> dict[str, str]:
        """Open the gate; on an address others can reach, and where there ever were tokens, make those missing."""
        secrets = {"join": config.token, "admin": config.admin_token}
        given = {role: secret.get_secret_value() for role, secret in secrets.items() if secret is not None}
        self.gate = TokenGate(self._state.journal, False, time.time)
        needed = not is_loopback(config.host) or bool(given) or self.gate.ever_had_tokens
        self.gate.required = needed and not config.insecure
        for record in self.gate.adopt(given):
            _log.warning("token_replaced", role=record.role, hash=record.hash[:12], reason="another one was given")
            self._audit.write(what="token replaced at start", named=record.hash[:12], role=record.role)
        if config.insecure:
            _log.warning("insecure", tokens_not_asked_for=len(self.gate.listed()))
        if self.gate.clock.behind > _CLOCK_BEHIND:
            _log.warning("clock_behind", seconds=round(self.gate.clock.behind))
        made = {role: new_token() for role in secrets if self.gate.required and not self.gate.has(role)}
        for role, token in made.items():
            self.gate.add(token, role, label=f"{role} token made at a start", origin="start")
        return made

    def _bound_bytes(self, config: CoordinatorConfig) -> None:
        """Bound the bytes of updates, and say how fast they grow: now, or once there is an expert."""
        journal, blobs = self._state.journal, self._state.blobs
        bound = retention_bound(config.keep_gb, journal, blobs)
        self.service.keep_below(bound.most, blobs)
        interval = config.min_sync_interval or ADVISED_SYNC_INTERVAL
        report = partial(report_disk, journal, blobs, interval, bound)
        if experts := self.service.coordinator.experts:
            report(experts.values())
        else:
            self.service.on_first_expert = lambda expert: report([expert])

    def serve(self) -> int:
        """Listen until SIGTERM or SIGINT; finishes requests under way, then returns the exit status."""
        listener = listen(self.config.host, self.config.port)
        server = uvicorn.Server(
            uvicorn.Config(
                self.app,
                http=GuardedProtocol,
                ws="none",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=_DRAIN_SECONDS,
                ssl_certfile=self.config.tls_cert,
                ssl_keyfile=self.config.tls_key,
            )
        )
        self.service.start()
        try:
            # uvicorn's own choice of loop: uvloop where there is one, which halves the time of a push.
            with own_signals(server), asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
                # Said once a signal is answered: whoever reads it may send one at once.
                _log.info("listening", host=self.config.host, port=listener.getsockname()[1], pid=os.getpid())
                runner.run(self._run(server, listener))
        finally:
            self.close()
        if self.service.committer.failed:
            _log.error("stopped", reason=self.service.committer.failed)
            return EXIT_STORAGE_FAILED
        _log.info("stopped")
        return 0

    async def _run(self, server: uvicorn.Server, listener: socket.socket) -> None:
        beside = (self._stop_when_failed(server), self._keep_notes(), self._tidy())
        watches = [asyncio.create_task(watch) for watch in beside]
        try:
            await server.serve(sockets=[listener])
        finally:
            for watch in watches:
                watch.cancel()

    async def _keep_notes(self) -> None:
        """Make durable, beside the requests, when tokens were used, that one has ended, and where the audit log is."""
        audit_kept = time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            self._watch_descriptors()
            due = time.monotonic() - audit_kept >= KEEP_SECONDS
            if due:
                audit_kept = time.monotonic()
            if due or self.gate.keeping_is_due:
                await asyncio.to_thread(self._keep)

    def _watch_descriptors(self) -> None:
        """Say that descriptors run out, once each time: new connections are closed at once then."""
        used = in_use()
        few = few_left(used, self._descriptors)
        if few and not self._few_descriptors:
            _log.error("few_file_descriptors", used=used, limit=self._descriptors, fix="raise 'ulimit -n'")
        self._few_descriptors = few

    def _keep(self, at_the_end: bool = False) -> None:
        try:
            if at_the_end or self.gate.keeping_is_due:
                self.gate.keep()
            if self._audit.head != self._noted:
                self._noted = self._audit.head
                self._state.journal.set_meta(AUDIT_HEAD, str(self._noted))
        except (RefusedError, StorageFailedError) as error:
            _log.warning("notes_not_kept", reason=str(error))

    async def _tidy(self) -> None:
        """Give back the memory of uploads once they are over, and sweep once a day."""
        used = False
        while True:
            await asyncio.sleep(_TIDY_SECONDS)
            if used and not self.service.intake.uploads:
                await asyncio.to_thread(trim)
            used = self.service.intake.uploads > 0
            if self._sweeping.due() and not self.service.committer.failed:
                await asyncio.to_thread(self._sweeping.sweep)

    async def _stop_when_failed(self, server: uvicorn.Server) -> None:
        """After a failed fsync, or without its folder, nothing can be promised: answer 503 for a moment, then leave."""
        while not self.service.committer.failed:
            await asyncio.sleep(0.2)
            with contextlib.suppress(StorageFailedError):
                await asyncio.to_thread(self.service.committer.check_storage)
        await asyncio.sleep(_FAILED_SECONDS)
        server.should_exit = True

    def close(self) -> None:
        """Finish what was accepted and give the state directory back."""
        self.service.close()
        self._audit.write(what="stop")
        self._audit.close()
        self._keep(at_the_end=True)
        self._state.close()


def _aggregation(config: CoordinatorConfig) -> Aggregation:
    return Aggregation(
        config.server_learning_rate,
        config.staleness,
        config.max_staleness,
        config.server_optimizer,
        config.buffer_size,
        config.clip_norm,
        config.enable_gateway,
        config.strategy,
        config.gateway_rank,
        config.merge_after if config.start_from == "gateway" else None,
        config.fold_staleness,
        config.evaluation_gate,
        config.hold_norm,
    )
