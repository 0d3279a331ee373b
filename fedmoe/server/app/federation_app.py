"""A federation recovered from a journal and blobs: service, tokens, audit log, HTTP application, and their upkeep."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import structlog

from fedmoe.config import ADVISED_SYNC_INTERVAL, CoordinatorConfig
from fedmoe.coordinator import Aggregation
from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.memory import trim
from fedmoe.server.access.tokens import KEEP_SECONDS, TokenGate
from fedmoe.server.access.turns import Rate
from fedmoe.server.gate.gate import GatePolicy
from fedmoe.server.history.history import History
from fedmoe.server.page.login import LoginLinks
from fedmoe.server.registrations import RegistrationLimits
from fedmoe.server.routes.json_weights import JsonPolicy
from fedmoe.server.routes.routes import create_app
from fedmoe.server.service import CoordinatorService
from fedmoe.server.storage.audit import AUDIT_HEAD, AuditHead, AuditLog
from fedmoe.server.storage.blobs import BlobStore, StorageFailedError
from fedmoe.server.storage.journal import Journal, NotOwnerError
from fedmoe.server.updates.in_flight import CrashMarkers
from fedmoe.server.upkeep.retention import report_disk, retention_bound
from fedmoe.server.upkeep.sweep import DailySweep
from fedmoe.wire.contract.administration import INVITE, JOIN_LINE_SECONDS
from fedmoe.wire.contract.replicas import OwnerInfo
from fedmoe.wire.http.bearer import new_token
from fedmoe.wire.http.middleware import is_loopback

_log = structlog.get_logger("fedmoe.coordinator")

# A machine's clock that is further behind than this was set back.
_CLOCK_BEHIND = 5.0
_TIDY_SECONDS = 1.0


class FederationApp:
    """Everything that decides for a federation, on a journal and blobs that it does not own; `app` answers requests.

    Opening recovers what was acknowledged before. `folder` is this process's own: its audit log and its marks of what
    is in flight. Tokens made at the first start are in `new_tokens`, and nowhere else.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        journal: Journal,
        blobs: BlobStore,
        folder: Path,
        storage_problem: Callable[[], str | None] = lambda: None,
        audit_head: str = AUDIT_HEAD,
        owners: Callable[[], Sequence[OwnerInfo]] = lambda: (),
    ) -> None:
        self._journal = journal
        aggregation = aggregation_of(config)
        history = History(journal, blobs, aggregation, config.keep_updates, skip_damaged=config.skip_damaged)
        started = time.perf_counter()
        coordinator = history.recover()
        versions = {name: expert.version for name, expert in coordinator.experts.items()}
        seconds = round(time.perf_counter() - started, 3)
        _log.info("recovered", state_dir=str(folder), experts=versions, seconds=seconds)
        self.service = CoordinatorService(
            coordinator,
            journal,
            blobs,
            history,
            ADVISED_SYNC_INTERVAL if config.min_sync_interval is None else config.min_sync_interval,
            gate_policy=GatePolicy(config.gate_tolerance, config.gate_seconds),
            storage_problem=storage_problem,
            limits=RegistrationLimits(config.max_parameters, config.max_experts),
            in_flight=CrashMarkers(folder / "in_flight"),
            max_length=config.max_length,
        )
        self._sweeping = DailySweep(journal, blobs, history)
        self._bound_bytes(config, blobs)
        self._audit_head = audit_head
        self._noted = AuditHead.of_text(journal.meta(audit_head))
        with contextlib.ExitStack() as opened:
            self._audit = AuditLog(folder, time.time, self._noted)
            opened.callback(self._audit.close)
            self.new_tokens = self._prepare_tokens(config)
            made = ", ".join(self.new_tokens)
            self._audit.write(what="start", asks_for_tokens=self.gate.required, address=config.host, tokens_made=made)
            self.links = LoginLinks(self.gate)
            rate = config.requests_per_second
            self.app = create_app(
                self.service,
                self.gate,
                _on_loopback(config),
                JsonPolicy(config.json_limit),
                config.min_sync_interval,
                token_rate=Rate(rate, math.ceil(2 * rate)) if rate else None,
                audit=self._audit,
                owners=owners,
                links=self.links,
            )
            opened.pop_all()

    def _prepare_tokens(self, config: CoordinatorConfig) -> dict[str, str]:
        """Open the gate; on an address others can reach, and where there ever were tokens, make those missing."""
        secrets = {"join": config.token, "admin": config.admin_token}
        tokens = {role: secret.get_secret_value() for role, secret in secrets.items() if secret is not None}
        self.gate = TokenGate(self._journal, False, time.time)
        needed = not _on_loopback(config) or bool(tokens) or self.gate.ever_had_tokens or config.tls is not None
        self.gate.required = needed and not config.insecure
        for record in self.gate.adopt(tokens):
            _log.warning("token_replaced", role=record.role, hash=record.hash[:12], reason="another one was given")
            self._audit.write(what="token replaced at start", named=record.hash[:12], role=record.role)
        if config.insecure:
            _log.warning("insecure", tokens_not_asked_for=len(self.gate.listed()))
        if self.gate.clock.behind > _CLOCK_BEHIND:
            _log.warning("clock_behind", seconds=round(self.gate.clock.behind))
        roles = [role for role in self._roles_at_start(config) if self.gate.required and not self.gate.has(role)]
        made = {role: new_token("fmj" if role == INVITE else "fmt") for role in roles}
        for role, token in made.items():
            expires_in = JOIN_LINE_SECONDS if role == INVITE else None
            label = f"{'join line' if role == INVITE else f'{role} token'} made at a start"
            self.gate.add(token, role, label=label, origin="start", expires_in=expires_in)
        return made

    def _roles_at_start(self, config: CoordinatorConfig) -> tuple[str, ...]:
        """Which tokens a federation cannot begin without; a join line can only be of use where it pins a key."""
        if config.tls is None:
            return ("join", "admin")
        return ("admin",) if self.gate.any_joined else ("admin", INVITE)

    def _bound_bytes(self, config: CoordinatorConfig, blobs: BlobStore) -> None:
        """Bound the bytes of updates, and say how fast they grow: now, or once there is an expert."""
        bound = retention_bound(config.keep_gb, self._journal, blobs)
        if bound.most is not None:
            self.service.keep_below(bound.most, blobs)
        interval = config.min_sync_interval or ADVISED_SYNC_INTERVAL
        report = partial(report_disk, self._journal, blobs, interval, bound)
        if experts := self.service.coordinator.experts:
            report(experts.values())
        else:
            self.service.on_first_expert = lambda expert: report([expert])

    async def look_after(self) -> None:
        """Keep notes and tidy up beside the requests, until it is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_notes())
            tasks.create_task(self._tidy())

    async def _keep_notes(self) -> None:
        """Make durable, beside the requests, when tokens were used, that one has ended, and where the audit log is."""
        audit_kept = time.monotonic()
        while True:
            await asyncio.sleep(1.0)
            due = time.monotonic() - audit_kept >= KEEP_SECONDS
            if due:
                audit_kept = time.monotonic()
            if due or self.gate.keeping_is_due:
                await asyncio.to_thread(self._keep)

    def _keep(self, at_the_end: bool = False) -> None:
        try:
            if at_the_end or self.gate.keeping_is_due:
                self.gate.keep()
            if self._audit.head != self._noted:
                self._noted = self._audit.head
                self._journal.set_meta(self._audit_head, str(self._noted))
        except (RefusedError, StorageFailedError, NotOwnerError) as error:
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

    def end_streams(self) -> None:
        """End what pages listen to; a stop would wait for it else."""
        self.app.state.parts.live.close()

    def close(self, abandoned: bool = False) -> None:
        """Finish what was accepted, and note where the audit log ends; journal and blobs stay open.

        Where it is `abandoned`, nothing can be written any more.
        """
        self.end_streams()
        self.service.close()
        self._audit.write(what="owner lost" if abandoned else "stop")
        self._audit.close()
        if not abandoned:
            self._keep(at_the_end=True)


def _on_loopback(config: CoordinatorConfig) -> bool:
    """Whether only this machine can reach the coordinator, or any of its replicas."""
    advertised = urlsplit(config.advertise).hostname if config.advertise is not None else None
    return is_loopback(config.host) and (advertised is None or is_loopback(advertised))


def aggregation_of(config: CoordinatorConfig) -> Aggregation:
    """How updates become experts, and experts a gateway, as the options say."""
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
