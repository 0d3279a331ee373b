"""HTTP client of the coordinator: typed calls, checked answers, retries."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Self

import httpx2
import stamina
from pydantic import BaseModel

from fedmoe import __version__ as _OURS
from fedmoe.lora.codec import WireDtype
from fedmoe.lora.manifest import Manifest
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.answers import (
    Answer,
    BodySizeLimits,
    CoordinatorUnavailableError,
    expect_nothing,
    foreign,
    parsed,
    parsed_problem,
    read,
    seconds_asked,
)
from fedmoe.wire.contract import administration, experts, messages
from fedmoe.wire.contract.messages import PROBLEM, SAFETENSORS
from fedmoe.wire.contract.replicas import ReplicaListing
from fedmoe.wire.contract.status import Heartbeat, StatusInfo, WorkerLog
from fedmoe.wire.contract.versions import PROTOCOL, PROTOCOL_HEADER, mismatch
from fedmoe.wire.pulled_weights import (
    ANY,
    ExpectedWeights,
    PulledExpert,
    PulledGateway,
    body_headers,
    check_promise,
    pulled_expert,
    pulled_gateway,
)
from fedmoe.wire.transport import ConnectionSettingError, address_of, check_url, proxy_of, transport_for
from fedmoe.wire.unreachable import clock_difference, unreachable

__all__ = [
    "ANOTHER_HISTORY",
    "ConnectionSettingError",
    "CoordinatorClient",
    "CoordinatorUnavailableError",
    "ExpectedWeights",
    "PulledExpert",
    "PulledGateway",
    "PushResult",
    "TooStaleError",
]

# Between two pushes; no coordinator can be started that asks for more.
_LONGEST_INTERVAL = 3600.0
_LONGEST_WAIT = 60.0
_JSON = BodySizeLimits()
# Every expert with its workers.
_LISTING = BodySizeLimits(json=32 << 20)
_TENSORS = {"Accept": SAFETENSORS}
_SHORT = {"Prefer": f"{messages.MINIMAL}, {messages.WITH_OTHER}"}
# Answers of a coordinator under load that a later try may not get.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 507})
#: Refusals of a coordinator whose history is another than that of the base: only it may be at an earlier version.
ANOTHER_HISTORY = frozenset({"unknown_version", "other_history"})


class TooStaleError(RefusedError):
    """The update is older than the coordinator takes; `newest` is the version to rebase onto, if it came along."""

    newest: PulledExpert | None = None


@dataclass(frozen=True)
class PushResult:
    """What became of a push; `newest` holds the newest weights, or `other` the bytes of the result's other update."""

    result: messages.UpdateResult
    newest: PulledExpert | None
    other: bytes | None = None


class CoordinatorClient:
    """Calls one coordinator; every call raises `RefusedError` or `CoordinatorUnavailableError`, nothing else from HTTP.

    `url` may end with `#FINGERPRINT`: then only who has that key is the coordinator.

    `attempts` tries of reads and idempotent writes are made, with exponential, jittered pauses; pushes are tried once:
    whoever pushes keeps the update and decides when to send it again.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        attempts: int = 4,
        timeout: float = 60.0,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        headers = {"Accept-Encoding": "identity", PROTOCOL_HEADER: str(PROTOCOL)}
        headers |= {"Authorization": f"Bearer {token}"} if token else {}
        check_url(url)
        url, fingerprint = address_of(url)
        self._proxy = proxy_of(url, token) if transport is None else None
        # No redirects: a token must not follow one to another host.
        self._http = httpx2.Client(
            base_url=url,
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=10.0),
            follow_redirects=False,
            transport=transport or transport_for(url, self._proxy, fingerprint),
        )
        self._attempts = attempts
        self._answered = False
        #: Without the fingerprint, which is beside it.
        self.url = url
        self.fingerprint = fingerprint

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def healthy(self) -> bool:
        """Whether the coordinator answers and trusts its storage; one try."""
        try:
            return bool(json.loads(self._once("GET", "/healthz", timeout=2.0).body)["status"] == "ok")
        except (CoordinatorUnavailableError, RefusedError, ValueError, KeyError, TypeError):
            return False

    def date(self) -> float | None:
        """The coordinator's clock, seconds since 1970; None where it does not say. One try."""
        text = str(self._once("GET", "/healthz", timeout=5.0).headers.get("date", ""))
        try:
            return parsedate_to_datetime(text).timestamp()
        except ValueError:
            return None

    def federation(self) -> messages.FederationInfo:
        """The federation's manifest and limits."""
        answer = self._retried("GET", "/federation")
        info = parsed(answer, messages.FederationInfo)
        if not 0 <= info.min_sync_interval <= _LONGEST_INTERVAL:
            raise foreign(
                answer, f"it asks for {info.min_sync_interval} seconds between pushes; no worker can keep that"
            )
        return info

    def list_experts(self, retired: bool = False) -> experts.ExpertListing:
        """Every expert and the gateway, with the held-out losses that workers reported; with `retired` those too."""
        params: dict[str, bool | str] = {"held_out": True, "flags": True, **({"retired": True} if retired else {})}
        listing = page = self._listing(params)
        infos = list(page.experts)
        while page.more and page.experts:
            page = self._listing(params | {"after": page.experts[-1].name})
            infos += page.experts
        return listing.model_copy(update={"experts": infos, "more": False})

    def _listing(self, params: dict[str, bool | str]) -> experts.ExpertListing:
        return parsed(self._retried("GET", "/list_experts", _LISTING, params=params), experts.ExpertListing)

    def gateway_info(self, merged: bool = False) -> experts.GatewayInfo:
        """The gateway without its weights; with `merged` also what only a merge tells, such as rank and digest."""
        return parsed(self._retried("GET", "/get_gateway_info", params={"merged": merged}), experts.GatewayInfo)

    def register(
        self, expert: str, worker: str, manifest: Manifest, start_from: messages.StartFrom | None = None
    ) -> experts.ExpertInfo:
        """Make the expert, or confirm that it is there with this manifest, and starts from where it should."""
        shape = messages.ManifestMessage.of(manifest)
        message = messages.RegisterRequest(expert=expert, worker=worker, manifest=shape, start_from=start_from)
        return parsed(self._post("/register_expert", message), experts.ExpertInfo)

    def pull_expert(
        self, expert: str, etag: str | None = None, dtype: WireDtype = "fp32", expected: ExpectedWeights = ANY
    ) -> PulledExpert | None:
        """The expert's newest weights, as `expected`; None if they are still those of `etag`."""
        headers = _TENSORS | ({"If-None-Match": etag} if etag else {})
        body, bounds = {"expert": expert, "dtype": dtype}, BodySizeLimits.of(expected.manifest)
        answer = self._retried("POST", "/get_expert_weights", bounds, json=body, headers=headers)
        return None if answer.status == 304 and etag else pulled_expert(answer, expert, expected, dtype)

    def pull_gateway(self) -> PulledGateway:
        """The newest gateway, in full precision."""
        return pulled_gateway(self._retried("GET", "/get_gateway_weights", headers=_TENSORS))

    def push(
        self, header: messages.UpdateHeader, body: bytes, manifest: Manifest | None = None, minimal: bool = False
    ) -> PushResult:
        """Send an update once; sending the same one again later is safe.

        `manifest` is the one the expert was registered with: newest weights of another are refused. With `minimal` no
        weights need to come where the newest are the base plus this update, and perhaps another one.
        """
        headers = body_headers(body) | _TENSORS | (_SHORT if minimal else {})
        bounds = BodySizeLimits.of(manifest)
        params = header.model_dump(exclude_none=True)
        answer = self._once("POST", "/push_expert_update", bounds, params=params, content=body, headers=headers)
        if answer.type != SAFETENSORS:
            return PushResult(_result(answer, header), None)
        beside, least = answer.headers.get("fedmoe-result", ""), header.base_version
        if answer.status == 409:
            problem = parsed_problem(answer, beside)
            error = TooStaleError(problem.code, problem.detail, problem.fix)
            error.facts = dict(problem.model_extra or {})
            least = 0 if problem.code in ANOTHER_HISTORY else least
            error.newest = pulled_expert(answer, header.expert, ExpectedWeights(manifest, least))
            raise error
        if "preference-applied" in answer.headers:
            check_promise(answer)
            return PushResult(_result(answer, header, beside), None, bytes(answer.body))
        newest = pulled_expert(answer, header.expert, ExpectedWeights(manifest, least))
        return PushResult(_result(answer, header, beside, newest.version), newest)

    def push_statistic(self, statistic: messages.StatisticRequest) -> None:
        """Disclose a small fact, for example a held-out loss."""
        expect_nothing(self._post("/push_statistics", statistic))

    def push_data_statistics(self, header: messages.DataStatisticsHeader, body: bytes) -> messages.DataStatisticsResult:
        """Disclose statistics of a worker's data, once; sending the same ones again later is safe."""
        params, headers = header.model_dump(), body_headers(body)
        answer = self._once("POST", "/push_data_statistics", params=params, content=body, headers=headers)
        return parsed(answer, messages.DataStatisticsResult)

    def data_statistics(self, expert: str, kind: messages.StatisticsKind) -> bytes:
        """What all workers of an expert report about their data, merged, checked against the answer's digest.

        Raises `RefusedError` with the code `no_statistics` where no worker has sent any.
        """
        params = {"expert": expert, "kind": kind}
        answer = self._retried("GET", "/data_statistics", params=params, headers=_TENSORS)
        check_promise(answer)
        return bytes(answer.body)

    def gateway_candidates(self, request: experts.CandidatesRequest) -> experts.CandidatesAnswer:
        """The gateways that wait for this evaluator's scores; from now on sets wait for them."""
        try:
            answer = self._post("/gateway_candidates", request)
        except RefusedError as error:
            if error.code != "method_not_allowed":
                raise
            # A coordinator of before waits for whoever asks.
            answer = self._retried("GET", "/gateway_candidates", params=request.model_dump())
        return parsed(answer, experts.CandidatesAnswer)

    def pull_candidate(self, request: experts.CandidateWeightsRequest) -> PulledGateway:
        """An adapter of the open set, at scale 1; refused with `candidates_closed` once the set is not open."""
        params = request.model_dump()
        return pulled_gateway(self._retried("GET", "/gateway_candidate_weights", params=params, headers=_TENSORS))

    def push_gateway_scores(self, scores: experts.GatewayScores) -> experts.ScoresResult:
        """Send held-out losses of everything in the open set; sending them again is safe."""
        return parsed(self._post("/push_gateway_scores", scores), experts.ScoresResult)

    def gateway_verdicts(self, limit: int = 20) -> list[experts.VerdictInfo]:
        """The newest verdicts of the evaluation gate, the newest first."""
        answer = self._retried("GET", "/gateway_verdicts", params={"limit": limit})
        return parsed(answer, experts.VerdictsAnswer).verdicts

    def roll_back(
        self, expert: str, to_version: int, reason: str = "", to_digest: str | None = None
    ) -> messages.ChangeResult:
        """Give the expert the content of an earlier version, as a new version; with its digest, only if it is that."""
        body = {"expert": expert, "to_version": to_version, "reason": reason}
        body |= {"to_digest": to_digest} if to_digest is not None else {}
        return parsed(self._once("POST", "/rollback", json=body), messages.ChangeResult)

    def retract(self, expert: str, worker: str, reason: str = "", erase: bool = False) -> messages.ChangeResult:
        """Take one worker's updates out of the expert, as a new version; with `erase` their bytes go for good."""
        body = {"expert": expert, "worker": worker, "reason": reason} | ({"erase": True} if erase else {})
        return parsed(self._once("POST", "/retract", json=body), messages.ChangeResult)

    def quarantine(self) -> list[administration.HeldUpdateInfo]:
        """The updates that wait for an administrator, the oldest first."""
        return parsed(self._retried("GET", "/quarantine"), administration.QuarantineListing).held

    def release_held(self, number: int) -> messages.UpdateResult:
        """Let a held update land."""
        return parsed(self._once("POST", "/quarantine/release", json={"number": number}), messages.UpdateResult)

    def reject_held(self, number: int, reason: str = "") -> None:
        """Never let a held update land."""
        expect_nothing(self._once("POST", "/quarantine/reject", json={"number": number, "reason": reason}))

    def rename_expert(self, expert: str, name: str) -> experts.ExpertInfo:
        """Give an expert another name; its former ones still mean it."""
        return parsed(self._post("/rename_expert", experts.RenameRequest(expert=expert, name=name)), experts.ExpertInfo)

    def retire_expert(self, expert: str, reason: str = "") -> experts.ExpertInfo:
        """Take an expert out of the gateway and refuse updates of it; what it is stays."""
        message = experts.RetireRequest(expert=expert, reason=reason)
        return parsed(self._post("/retire_expert", message), experts.ExpertInfo)

    def unretire_expert(self, expert: str) -> experts.ExpertInfo:
        """Bring a retired expert back as it was."""
        return parsed(self._post("/unretire_expert", experts.UnretireRequest(expert=expert)), experts.ExpertInfo)

    def make_token(self, request: administration.TokenRequest) -> administration.TokenAnswer:
        """A new token; shown once."""
        return parsed(self._once("POST", "/tokens", json=request.model_dump()), administration.TokenAnswer)

    def join(self, token_hash: str, worker: str) -> administration.JoinAnswer:
        """Exchange a join line's token, this client's, for the token with this hash; the same again is safe."""
        request = administration.JoinRequest(token_hash=token_hash, worker=worker)
        return parsed(self._post("/join", request), administration.JoinAnswer)

    def tokens(self) -> administration.TokenListing:
        """All tokens, without what they are."""
        return parsed(self._retried("GET", "/tokens"), administration.TokenListing)

    def replicas(self) -> ReplicaListing:
        """Who owns what, where the federation has several coordinators."""
        return parsed(self._retried("GET", "/replicas"), ReplicaListing)

    def heartbeat(self, heartbeat: Heartbeat) -> None:
        """Say what a worker does now; tried once, since the next one says more."""
        expect_nothing(self._once("POST", "/heartbeat", json=heartbeat.model_dump(mode="json")))

    def status(self) -> StatusInfo:
        """What goes on in the federation, as far as the token may see it."""
        return parsed(self._retried("GET", "/status", _LISTING), StatusInfo)

    def worker_log(self, worker: str, expert: str | None = None, after: int = 0) -> WorkerLog:
        """The newest lines of a worker's log, from number `after` on."""
        params = {"worker": worker, "after": str(after), **({} if expert is None else {"expert": expert})}
        return parsed(self._retried("GET", "/worker_log", params=params), WorkerLog)

    def revoke_token(self, token_hash: str) -> None:
        """Refuse a token from now on."""
        expect_nothing(self._once("POST", "/tokens/revoke", json={"hash": token_hash}))

    def _post(self, path: str, message: BaseModel) -> Answer:
        return self._retried("POST", path, json=message.model_dump(mode="json"))

    def _retried(self, method: str, path: str, bounds: BodySizeLimits = _JSON, **options: object) -> Answer:
        for attempt in stamina.retry_context(
            on=_wait_hint, attempts=self._attempts, timeout=None, wait_initial=0.2, wait_max=5.0, wait_jitter=0.5
        ):
            with attempt:
                return self._once(method, path, bounds, **options)
        raise AssertionError("the last attempt returns or raises")

    def _once(self, method: str, path: str, bounds: BodySizeLimits = _JSON, **options: object) -> Answer:
        sent = content if isinstance(content := options.get("content"), bytes) else b""
        try:
            with self._http.stream(method, path, **options) as response:  # type: ignore[arg-type]
                answer = read(response, bounds, self._proxy.shown if self._proxy else "", sent)
        except httpx2.HTTPError as error:
            raise unreachable(self.url, error, self._proxy, len(sent), self._answered) from error
        self._answered = True
        version = answer.headers.get(PROTOCOL_HEADER)
        if (refused := mismatch(version, "this program", f"the coordinator {self.url}", _OURS)) is not None:
            raise refused
        _raise_for_refusal(answer)
        return answer


def _result(
    answer: Answer, header: messages.UpdateHeader, text: str | None = None, newest: int | None = None
) -> messages.UpdateResult:
    """What became of an update, if it can be: of this expert, not older than its base nor newer than the weights."""
    result = parsed(answer, messages.UpdateResult, text)
    usual = result.expert == header.expert and result.version >= header.base_version
    if not usual or (newest is not None and newest < result.version):
        with_weights = "" if newest is None else f" with weights of version {newest}"
        raise foreign(
            answer,
            f"it answered an update of {header.expert} from version {header.base_version} with version "
            f"{result.version} of {result.expert}{with_weights}; nothing of it was taken",
        )
    return result


def _raise_for_refusal(answer: Answer) -> None:
    """Raise the error that an answer is; nothing for a success, or a refusal that comes with weights."""
    if answer.status in (200, 202, 204, 304) or (answer.status == 409 and answer.type == SAFETENSORS):
        return
    if answer.type != PROBLEM:
        raise foreign(answer)
    problem = parsed_problem(answer)
    if answer.status in _PASSING:
        text = f"{problem.code}: {problem.detail} {problem.fix}".strip()
        raise CoordinatorUnavailableError(text, seconds_asked(answer))
    facts = dict(problem.model_extra or {})
    clocks = clock_difference(facts.get("coordinator_time"), time.time()) if answer.status == 401 else ""
    kind = TooStaleError if problem.code == "too_stale" else RefusedError
    error = kind(problem.code, f"{problem.detail} {clocks}".strip(), problem.fix)
    error.facts = facts
    raise error


def _wait_hint(error: Exception) -> bool | float:
    """Whether to try again, and how long to wait if the server said so."""
    if not isinstance(error, CoordinatorUnavailableError):
        return False
    return min(error.retry_after, _LONGEST_WAIT) if error.retry_after is not None else True
