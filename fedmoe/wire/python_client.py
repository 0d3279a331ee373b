"""`fedmoe.Client` and `fedmoe.AsyncClient`: what the command line asks a coordinator, as typed Python methods."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial, update_wrapper
from typing import Concatenate, ParamSpec, Self, TypeVar

from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient, PulledExpert, PulledGateway
from fedmoe.wire.contract.administration import (
    INVITE,
    JOIN_LINE_SECONDS,
    HeldUpdateInfo,
    TokenAnswer,
    TokenInfo,
    TokenRequest,
)
from fedmoe.wire.contract.experts import ExpertInfo, GatewayInfo, VerdictInfo
from fedmoe.wire.contract.messages import DEFAULT_PORT, ChangeResult, FederationInfo, UpdateResult
from fedmoe.wire.contract.replicas import ReplicaListing
from fedmoe.wire.contract.status import EventInfo, StatusInfo, WorkerLog
from fedmoe.wire.pin import join_line

P = ParamSpec("P")
T = TypeVar("T")

_WHOLE_HASH = 64
# Requests of one AsyncClient that are under way at once; further ones wait.
_THREADS = 8


class Client:
    """Asks one coordinator; use it in a `with` statement, or close it.

    `url`: as for the command line, `https://HOST:PORT#FINGERPRINT` to accept that key only; by default
    FEDMOE_COORDINATOR_URL, then this machine. `token`: by default FEDMOE_TOKEN. Reads are tried `attempts` times, each
    for `timeout` seconds without a byte; changes once. Methods may be called from several threads.

    Every method raises `RefusedError`, whose `code` is stable, where the coordinator says no, and
    `CoordinatorUnavailableError` where there is no answer. Raises `ConnectionSettingError` for a URL that is none.
    """

    def __init__(
        self, url: str | None = None, token: str | None = None, attempts: int = 4, timeout: float = 60.0
    ) -> None:
        url = url or os.environ.get("FEDMOE_COORDINATOR_URL") or f"http://127.0.0.1:{DEFAULT_PORT}"
        self._api = CoordinatorClient(url, token or os.environ.get("FEDMOE_TOKEN") or None, attempts, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the connections."""
        self._api.close()

    @property
    def url(self) -> str:
        """Where the coordinator listens, without a fingerprint."""
        return self._api.url

    def status(self) -> StatusInfo:
        """Experts, workers, gateway, disk and newest events as they are now; a worker's token sees its own."""
        return self._api.status()

    def events(self, after: int = 0) -> list[EventInfo]:
        """Of the newest 100 events, which the coordinator holds ready, those with an `id` above `after`, oldest first.

        To follow a federation, ask again with the last `id` that came: events further back are left out, and so
        are those of experts and workers that the token may not see.
        """
        return sorted((event for event in self.status().events if event.id > after), key=lambda event: event.id)

    def federation(self) -> FederationInfo:
        """What all experts share: base model, LoRA shapes, limits."""
        return self._api.federation()

    def experts(self, retired: bool = False) -> list[ExpertInfo]:
        """Every expert with its workers and their held-out losses; with `retired` those too."""
        return self._api.list_experts(retired).experts

    def expert_weights(self, expert: str) -> PulledExpert:
        """The newest version of an expert: `adapter` has its factors as float32 arrays, A (r x in) and B (out x r)."""
        pulled = self._api.pull_expert(expert)
        assert pulled is not None, "without an ETag there is always an answer"
        return pulled

    def create_expert(self, expert: str) -> ExpertInfo:
        """Make an expert with the LoRA configuration of those there are.

        Raises `RefusedError` with the code `unknown_expert` before the first worker has made one.
        """
        manifest = self._api.federation().manifest
        if manifest is None:
            reason = "this federation has no experts yet, and so no LoRA configuration."
            raise RefusedError("unknown_expert", reason, "Start its first worker instead.")
        return self._api.register(expert, "operator", manifest.manifest())

    def rename_expert(self, expert: str, name: str) -> ExpertInfo:
        """Give an expert another name; workers that still use the former one are served as before."""
        return self._api.rename_expert(expert, name)

    def retire_expert(self, expert: str, reason: str = "") -> ExpertInfo:
        """Take an expert out of the gateway and refuse its updates; what it is stays."""
        return self._api.retire_expert(expert, reason)

    def unretire_expert(self, expert: str) -> ExpertInfo:
        """Bring a retired expert back as it was."""
        return self._api.unretire_expert(expert)

    def roll_back(self, expert: str, to_version: int, reason: str = "", digest: str | None = None) -> ChangeResult:
        """Give an expert the content of an earlier version, as a new version; with `digest` only if it is that one."""
        return self._api.roll_back(expert, to_version, reason, digest)

    def retract(self, expert: str, worker: str, reason: str = "", erase: bool = False) -> ChangeResult:
        """Take all updates of one worker out of an expert; with `erase` their bytes go for good."""
        return self._api.retract(expert, worker, reason, erase)

    def gateway(self) -> GatewayInfo:
        """The gateway's version, sources and shapes."""
        return self._api.gateway_info(merged=True)

    def gateway_weights(self) -> PulledGateway:
        """The newest gateway: `adapter` has its factors as float32 arrays, as an expert's has."""
        return self._api.pull_gateway()

    def verdicts(self, limit: int = 20) -> list[VerdictInfo]:
        """The newest verdicts of the evaluation gate, the newest first."""
        return self._api.gateway_verdicts(limit)

    def worker_log(self, worker: str, expert: str | None = None, after: int = 0) -> WorkerLog:
        """The newest lines of a worker's log from number `after` on; `next` is the number to ask from next."""
        return self._api.worker_log(worker, expert, after)

    def replicas(self) -> ReplicaListing:
        """Which replica owns what; empty where one coordinator serves the federation alone."""
        return self._api.replicas()

    def quarantine(self) -> list[HeldUpdateInfo]:
        """The updates that wait for an administrator, the oldest first."""
        return self._api.quarantine()

    def release(self, number: int) -> UpdateResult:
        """Let a held update land, as if it had arrived now."""
        return self._api.release_held(number)

    def reject(self, number: int, reason: str = "") -> None:
        """Never let a held update land; its worker is told the reason."""
        self._api.reject_held(number, reason)

    def tokens(self) -> list[TokenInfo]:
        """All tokens there ever were, without what they are, the oldest first."""
        return self._api.tokens().tokens

    def issue_token(
        self,
        role: str = "worker",
        worker: str | None = None,
        experts: Sequence[str] | None = None,
        expires_in: float | None = None,
        label: str = "",
    ) -> TokenAnswer:
        """Make a token of the role worker, join, viewer or admin; it comes in clear this once.

        `worker` and `experts` narrow what it may do, `expires_in` is seconds from now. Raises pydantic's
        `ValidationError`, a ValueError, for what no token can be.
        """
        fields = {"role": role, "worker": worker, "experts": experts, "expires_in": expires_in, "label": label}
        return self._api.make_token(TokenRequest.model_validate(fields))

    def join_line(
        self,
        worker: str | None = None,
        experts: Sequence[str] | None = None,
        expires_in: float = JOIN_LINE_SECONDS,
        label: str = "",
    ) -> str:
        """A line for `fedmoe join`: it works once, within `expires_in` seconds, on one machine."""
        answer = self.issue_token(INVITE, worker, experts, expires_in, label)
        return join_line(answer.token, self._api.url, self._api.fingerprint)

    def revoke_token(self, token_hash: str) -> None:
        """Refuse a token from now on, by its hash or the beginning of it; stops what is under way with it."""
        self._api.revoke_token(whole_hash(token_hash, self.tokens))


def whole_hash(beginning: str, tokens: Callable[[], Iterable[TokenInfo]]) -> str:
    """The one hash among those of `tokens` that begins so; a whole one is not looked up.

    Raises `RefusedError` with the code `unknown_token` for none or several.
    """
    if len(beginning) >= _WHOLE_HASH:
        return beginning
    if not set(beginning) <= set("0123456789abcdef"):
        # What was given may be a token: it is not shown.
        reason = "that is no hash, of which every digit is 0-9 or a-f; 'fedmoe token list' shows the hashes"
        raise RefusedError("unknown_token", reason)
    hashes = [info.hash for info in tokens() if info.hash.startswith(beginning)]
    if len(hashes) != 1 or not beginning:
        reason = f"{len(hashes)} tokens have a hash that begins with {beginning!r}; see 'fedmoe token list'"
        raise RefusedError("unknown_token", reason)
    return hashes[0]


def _awaited(
    method: Callable[Concatenate[Client, P], T],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[None, None, T]]:
    """A method of `Client` that runs in a thread and is awaited."""

    async def call(front: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        work = partial(method, front.client, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(front.threads, work)

    update_wrapper(call, method)
    return call


class AsyncClient:
    """`Client` for asyncio: the same methods and errors, awaited; use it in an `async with` statement.

    Requests run in up to eight threads of its own. A cancelled one is not waited for, but may still take effect.
    """

    def __init__(
        self, url: str | None = None, token: str | None = None, attempts: int = 4, timeout: float = 60.0
    ) -> None:
        self.client = Client(url, token, attempts, timeout)
        self.threads = ThreadPoolExecutor(_THREADS, "fedmoe-client")

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Wait for requests under way, drop those that wait, release threads and connections."""
        await asyncio.to_thread(self.threads.shutdown, cancel_futures=True)
        self.client.close()

    @property
    def url(self) -> str:
        """Where the coordinator listens, without a fingerprint."""
        return self.client.url

    status = _awaited(Client.status)
    events = _awaited(Client.events)
    federation = _awaited(Client.federation)
    experts = _awaited(Client.experts)
    expert_weights = _awaited(Client.expert_weights)
    create_expert = _awaited(Client.create_expert)
    rename_expert = _awaited(Client.rename_expert)
    retire_expert = _awaited(Client.retire_expert)
    unretire_expert = _awaited(Client.unretire_expert)
    roll_back = _awaited(Client.roll_back)
    retract = _awaited(Client.retract)
    gateway = _awaited(Client.gateway)
    gateway_weights = _awaited(Client.gateway_weights)
    verdicts = _awaited(Client.verdicts)
    worker_log = _awaited(Client.worker_log)
    replicas = _awaited(Client.replicas)
    quarantine = _awaited(Client.quarantine)
    release = _awaited(Client.release)
    reject = _awaited(Client.reject)
    tokens = _awaited(Client.tokens)
    issue_token = _awaited(Client.issue_token)
    join_line = _awaited(Client.join_line)
    revoke_token = _awaited(Client.revoke_token)
