"""HTTP client of the coordinator: typed calls, checked answers, retries."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
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
from fedmoe.wire.contract.administration import (
    HeldUpdateInfo,
    QuarantineListing,
    TokenAnswer,
    TokenListing,
    TokenRequest,
)
from fedmoe.wire.contract.experts import ExpertInfo, ExpertListing, RenameRequest, RetireRequest, UnretireRequest
from fedmoe.wire.contract.gateway import (
    CandidatesAnswer,
    CandidatesRequest,
    CandidateWeightsRequest,
    GatewayInfo,
    GatewayScores,
    ScoresResult,
    VerdictInfo,
    VerdictsAnswer,
)
from fedmoe.wire.contract.messages import (
    PROBLEM,
    SAFETENSORS,
    ChangeResult,
    DataStatisticsHeader,
    DataStatisticsResult,
    FederationInfo,
    ManifestMessage,
    RegisterRequest,
    StartFrom,
    StatisticRequest,
    StatisticsKind,
    UpdateHeader,
    UpdateResult,
)
from fedmoe.wire.contract.versions import PROTOCOL, PROTOCOL_HEADER, mismatch
from fedmoe.wire.proxy import ConnectionSettingError
from fedmoe.wire.pulled_weights import (
    ANY,
    ExpectedWeights,
    PulledExpert,
    PulledGateway,
    PulledStatistics,
    body_headers,
    check_promise,
    pulled_expert,
    pulled_gateway,
)
from fedmoe.wire.transport import check_url, proxy_of, transport_for
from fedmoe.wire.unreachable import clock_difference, unreachable

__all__ = [
    "ANOTHER_HISTORY",
    "ConnectionSettingError",
    "CoordinatorClient",
    "CoordinatorUnavailableError",
    "ExpectedWeights",
    "PulledExpert",
    "PulledGateway",
    "PulledStatistics",
    "PushResult",
    "TooStaleError",
]

# Between two pushes; no coordinator can be started that asks for more.
_LONGEST_INTERVAL = 3600.0
_JSON = BodySizeLimits()
# Every expert with its workers.
_LISTING = BodySizeLimits(json=32 << 20)


@dataclass(frozen=True)
class PushResult:
    """What became of a push; `newest` holds the newest weights if they were asked for."""

    result: UpdateResult
    newest: PulledExpert | None


class CoordinatorClient:
    """Calls one coordinator; every call raises `RefusedError` or `CoordinatorUnavailableError`, nothing else from HTTP.

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
        self._proxy = proxy_of(url, token) if transport is None else None
        # No redirects: a token must not follow one to another host.
        self._http = httpx2.Client(
            base_url=url,
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=10.0),
            follow_redirects=False,
            transport=transport or transport_for(url, self._proxy),
        )
        self._attempts = attempts
        self._answered = False
        self.url = url

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def healthy(self) -> bool:
        """Whether the coordinator answers and trusts its storage; one try."""
        try:
            answer = self._once("GET", "/healthz", timeout=2.0)
            return bool(json.loads(answer.body)["status"] == "ok")
        except (CoordinatorUnavailableError, RefusedError, ValueError, KeyError, TypeError):
            return False

    def date(self) -> float | None:
        """The coordinator's clock, seconds since 1970; None where it does not say. One try."""
        text = str(self._once("GET", "/healthz", timeout=5.0).headers.get("date", ""))
        try:
            return parsedate_to_datetime(text).timestamp()
        except ValueError:
            return None

    def federation(self) -> FederationInfo:
        """The federation's manifest and limits."""
        answer = self._get("/federation")
        info = parsed(answer, FederationInfo)
        if not 0 <= info.min_sync_interval <= _LONGEST_INTERVAL:
            raise foreign(
                answer, f"it asks for {info.min_sync_interval} seconds between pushes; no worker can keep that"
            )
        return info

    def list_experts(self, retired: bool = False) -> ExpertListing:
        """Every expert and the gateway, with the held-out losses that workers reported; retired ones too if wanted."""
        params: dict[str, bool | str] = {"held_out": True, "flags": True, **({"retired": True} if retired else {})}
        listing = parsed(self._retried("GET", "/list_experts", _LISTING, params=params), ExpertListing)
        experts, page = list(listing.experts), listing
        while page.more and page.experts:
            following = params | {"after": page.experts[-1].name}
            page = parsed(self._retried("GET", "/list_experts", _LISTING, params=following), ExpertListing)
            experts += page.experts
        return listing.model_copy(update={"experts": experts, "more": False})

    def gateway_info(self) -> GatewayInfo:
        """The gateway without its weights."""
        return parsed(self._get("/get_gateway_info"), GatewayInfo)

    def register(
        self,
        expert: str,
        worker: str,
        manifest: Manifest,
        seed: int | None = None,
        start_from: StartFrom | None = None,
    ) -> ExpertInfo:
        """Make the expert, or confirm that it is there with this manifest, and starts from where it should."""
        message = RegisterRequest(
            expert=expert, worker=worker, manifest=ManifestMessage.of(manifest), seed=seed, start_from=start_from
        )
        return parsed(self._post("/register_expert", message), ExpertInfo)

    def pull_expert(
        self, expert: str, etag: str | None = None, dtype: WireDtype = "fp32", expected: ExpectedWeights = ANY
    ) -> PulledExpert | None:
        """The expert's newest weights, as `expected`; None if they are still those of `etag`."""
        headers = {"Accept": SAFETENSORS} | ({"If-None-Match": etag} if etag else {})
        body, bounds = {"expert": expert, "dtype": dtype}, BodySizeLimits.of(expected.manifest)
        answer = self._retried("POST", "/get_expert_weights", bounds, json=body, headers=headers)
        return None if answer.status == 304 and etag else pulled_expert(answer, expert, expected, dtype)

    def pull_gateway(self, etag: str | None = None, dtype: WireDtype = "fp32") -> PulledGateway | None:
        """The newest gateway; None if it is still that of `etag`."""
        headers = {"Accept": SAFETENSORS} | ({"If-None-Match": etag} if etag else {})
        answer = self._retried("GET", "/get_gateway_weights", params={"dtype": dtype}, headers=headers)
        return None if answer.status == 304 and etag else pulled_gateway(answer, dtype)

    def push(self, header: UpdateHeader, body: bytes, manifest: Manifest | None = None) -> PushResult:
        """Send an update once; sending the same one again later is safe.

        `manifest` is the one the expert was registered with: newest weights of another are refused.
        """
        headers = body_headers(body) | {"Accept": SAFETENSORS}
        params, bounds = header.model_dump(exclude_none=True), BodySizeLimits.of(manifest)
        answer = self._once("POST", "/push_expert_update", bounds, params=params, content=body, headers=headers)
        if answer.type != SAFETENSORS:
            return PushResult(_result(answer, header), None)
        if answer.status == 409:
            problem = parsed_problem(answer, answer.headers.get("fedmoe-result", ""))
            error = TooStaleError(problem.code, problem.detail, problem.fix)
            least = 0 if problem.code in ANOTHER_HISTORY else header.base_version
            error.facts = dict(problem.model_extra or {})
            error.newest = pulled_expert(answer, header.expert, ExpectedWeights(manifest, least))
            raise error
        newest = pulled_expert(answer, header.expert, ExpectedWeights(manifest, header.base_version))
        return PushResult(_result(answer, header, answer.headers.get("fedmoe-result", ""), newest.version), newest)

    def push_statistic(self, statistic: StatisticRequest) -> None:
        """Disclose a small fact, for example a held-out loss."""
        expect_nothing(self._post("/push_statistics", statistic))

    def push_data_statistics(self, header: DataStatisticsHeader, body: bytes) -> DataStatisticsResult:
        """Disclose statistics of a worker's data, once; sending the same ones again later is safe."""
        params, headers = header.model_dump(), body_headers(body)
        answer = self._once("POST", "/push_data_statistics", params=params, content=body, headers=headers)
        return parsed(answer, DataStatisticsResult)

    def data_statistics(self, expert: str, kind: StatisticsKind, etag: str | None = None) -> PulledStatistics | None:
        """What all workers of an expert tell of their data, merged; None if it is still that of `etag`.

        Raises `RefusedError` with the code `no_statistics` where no worker has sent any.
        """
        headers = {"Accept": SAFETENSORS} | ({"If-None-Match": etag} if etag else {})
        params = {"expert": expert, "kind": kind}
        answer = self._retried("GET", "/data_statistics", params=params, headers=headers)
        if answer.status == 304 and etag:
            return None
        check_promise(answer)
        return PulledStatistics(bytes(answer.body), answer.headers.get("etag", ""))

    def gateway_candidates(self, request: CandidatesRequest) -> CandidatesAnswer:
        """The gateways that wait for this evaluator's scores; from now on sets wait for them."""
        try:
            return parsed(self._post("/gateway_candidates", request), CandidatesAnswer)
        except RefusedError as error:
            if error.code != "method_not_allowed":
                raise
            # A coordinator of before waits for whoever asks.
            return parsed(self._retried("GET", "/gateway_candidates", params=request.model_dump()), CandidatesAnswer)

    def pull_candidate(self, request: CandidateWeightsRequest) -> PulledGateway:
        """An adapter of the open set, at scale 1; refused with `candidates_closed` once the set is not open."""
        headers, params = {"Accept": SAFETENSORS}, request.model_dump()
        return pulled_gateway(self._retried("GET", "/gateway_candidate_weights", params=params, headers=headers))

    def push_gateway_scores(self, scores: GatewayScores) -> ScoresResult:
        """Send held-out losses of everything in the open set; sending them again is safe."""
        return parsed(self._post("/push_gateway_scores", scores), ScoresResult)

    def gateway_verdicts(self, limit: int = 20) -> list[VerdictInfo]:
        """The newest verdicts of the evaluation gate, the newest first."""
        return parsed(self._retried("GET", "/gateway_verdicts", params={"limit": limit}), VerdictsAnswer).verdicts

    def roll_back(self, expert: str, to_version: int, reason: str = "", to_digest: str | None = None) -> ChangeResult:
        """Give the expert the content of an earlier version, as a new version; with its digest, only if it is that."""
        body = {"expert": expert, "to_version": to_version, "reason": reason}
        body |= {"to_digest": to_digest} if to_digest is not None else {}
        return parsed(self._once("POST", "/rollback", json=body), ChangeResult)

    def retract(self, expert: str, worker: str, reason: str = "", erase: bool = False) -> ChangeResult:
        """Take one worker's updates out of the expert, as a new version; with `erase` their bytes go for good."""
        body = {"expert": expert, "worker": worker, "reason": reason} | ({"erase": True} if erase else {})
        return parsed(self._once("POST", "/retract", json=body), ChangeResult)

    def quarantine(self) -> list[HeldUpdateInfo]:
        """The updates that wait for an administrator, the oldest first."""
        return parsed(self._get("/quarantine"), QuarantineListing).held

    def release_held(self, number: int) -> UpdateResult:
        """Let a held update land."""
        return parsed(self._once("POST", "/quarantine/release", json={"number": number}), UpdateResult)

    def reject_held(self, number: int, reason: str = "") -> None:
        """Never let a held update land."""
        expect_nothing(self._once("POST", "/quarantine/reject", json={"number": number, "reason": reason}))

    def rename_expert(self, expert: str, name: str) -> ExpertInfo:
        """Give an expert another name; its former ones still mean it."""
        return parsed(self._post("/rename_expert", RenameRequest(expert=expert, name=name)), ExpertInfo)

    def retire_expert(self, expert: str, reason: str = "") -> ExpertInfo:
        """Take an expert out of the gateway and refuse updates of it; what it is stays."""
        return parsed(self._post("/retire_expert", RetireRequest(expert=expert, reason=reason)), ExpertInfo)

    def unretire_expert(self, expert: str) -> ExpertInfo:
        """Bring a retired expert back as it was."""
        return parsed(self._post("/unretire_expert", UnretireRequest(expert=expert)), ExpertInfo)

    def make_token(self, request: TokenRequest) -> TokenAnswer:
        """A new token; shown once."""
        return parsed(self._once("POST", "/tokens", json=request.model_dump()), TokenAnswer)

    def tokens(self) -> TokenListing:
        """All tokens, without what they are."""
        return parsed(self._get("/tokens"), TokenListing)

    def revoke_token(self, token_hash: str) -> None:
        """Refuse a token from now on."""
        expect_nothing(self._once("POST", "/tokens/revoke", json={"hash": token_hash}))

    def _get(self, path: str) -> Answer:
        return self._retried("GET", path)

    def _post(self, path: str, message: BaseModel) -> Answer:
        return self._retried("POST", path, json=message.model_dump(mode="json"))

    def _retried(self, method: str, path: str, bounds: BodySizeLimits = _JSON, **options: object) -> Answer:
        for attempt in stamina.retry_context(
            on=wait_hint, attempts=self._attempts, timeout=None, wait_initial=0.2, wait_max=5.0, wait_jitter=0.5
        ):
            with attempt:
                return self._once(method, path, bounds, **options)
        raise AssertionError("the last attempt returns or raises")

    def _once(self, method: str, path: str, bounds: BodySizeLimits = _JSON, **options: object) -> Answer:
        content = options.get("content")
        sent = content if isinstance(content, bytes) else b""
        try:
            with self._http.stream(method, path, **options) as response:  # type: ignore[arg-type]
                answer = read(response, bounds, self._proxy.shown if self._proxy else "", sent)
        except httpx2.HTTPError as error:
            raise unreachable(self.url, error, self._proxy, len(sent), self._answered) from error
        self._answered = True
        version = answer.headers.get(PROTOCOL_HEADER)
        if (refused := mismatch(version, "this program", f"the coordinator {self.url}", _OURS)) is not None:
            raise refused
        raise_for_refusal(answer)
        return answer


def _result(answer: Answer, header: UpdateHeader, text: str | None = None, newest: int | None = None) -> UpdateResult:
    """What became of an update, if it can be: of this expert, not older than its base nor newer than the weights."""
    result = parsed(answer, UpdateResult, text)
    usual = result.expert == header.expert and result.version >= header.base_version
    if not usual or (newest is not None and newest < result.version):
        with_weights = "" if newest is None else f" with weights of version {newest}"
        raise foreign(
            answer,
            f"it answered an update of {header.expert} from version {header.base_version} with version "
            f"{result.version} of {result.expert}{with_weights}; nothing of it was taken",
        )
    return result


# Answers of a coordinator under load that a later try may not get.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 507})
_LONGEST_WAIT = 60.0
#: Refusals of a coordinator whose history is another than that of the base: only it may be at an earlier version.
ANOTHER_HISTORY = frozenset({"unknown_version", "other_history"})


class TooStaleError(RefusedError):
    """The update is older than the coordinator takes; `newest` is the version to go on from, if it came along."""

    newest: PulledExpert | None = None


def raise_for_refusal(answer: Answer) -> None:
    """Raise the error that an answer is; nothing for a success, or a refusal that comes with weights."""
    if answer.status in (200, 202, 204, 304) or (answer.status == 409 and answer.type == SAFETENSORS):
        return
    if answer.type != PROBLEM:
        raise foreign(answer)
    problem = parsed_problem(answer)
    if answer.status in _PASSING:
        seconds = seconds_asked(answer)
        raise CoordinatorUnavailableError(f"{problem.code}: {problem.detail} {problem.fix}".strip(), seconds)
    kind = TooStaleError if problem.code == "too_stale" else RefusedError
    facts = dict(problem.model_extra or {})
    clocks = clock_difference(facts.get("coordinator_time"), time.time()) if answer.status == 401 else ""
    error = kind(problem.code, f"{problem.detail} {clocks}".strip(), problem.fix)
    error.facts = facts
    raise error


def wait_hint(error: Exception) -> bool | float:
    """Whether to try again, and how long to wait if the server said so."""
    if not isinstance(error, CoordinatorUnavailableError):
        return False
    return min(error.retry_after, _LONGEST_WAIT) if error.retry_after is not None else True
