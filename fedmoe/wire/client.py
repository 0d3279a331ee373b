"""The coordinator as seen by its callers: typed calls, checked answers, and a plain word for "not reachable"."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

import httpx2
import numpy as np
import stamina
from pydantic import BaseModel, TypeAdapter, ValidationError

from fedmoe.errors import RefusedError
from fedmoe.lora.adapter import Adapter, FloatVector, Layout, ModuleShape
from fedmoe.lora.codec import CodecError, WireDtype, decode
from fedmoe.lora.container import read_header
from fedmoe.manifest import Manifest
from fedmoe.wire.messages import (
    SAFETENSORS,
    ChangeResult,
    ExpertInfo,
    FederationInfo,
    GatewayInfo,
    Listing,
    ManifestMessage,
    RegisterRequest,
    StatisticRequest,
    TokenAnswer,
    TokenRequest,
    UpdateHeader,
    UpdateResult,
)

# Answers of proxies and of a coordinator under load that a later try may not get.
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504, 507})


_Message = TypeVar("_Message", bound=BaseModel)


class CoordinatorUnavailableError(Exception):
    """No usable answer: not reachable, shedding load, or something in between answered; try again later.

    `retry_after` is what the server asked to wait, in seconds.
    """

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class PulledExpert:
    """An expert's weights as downloaded: float32, checked against the answer's digest, with the version they are."""

    name: str
    version: int
    digest: str
    manifest: Manifest
    weights: FloatVector
    etag: str

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.manifest.layout, self.manifest.alpha, self.weights)


@dataclass(frozen=True)
class PulledGateway:
    """The gateway as downloaded, with what it is made of and the base model it belongs on."""

    version: int
    digest: str
    adapter: Adapter
    sources: dict[str, int]
    base: dict[str, str]
    info: dict[str, object]
    etag: str


@dataclass(frozen=True)
class Pushed:
    """What became of a push; `newest` holds the newest weights if they were asked for."""

    result: UpdateResult
    newest: PulledExpert | None


class TooStaleError(RefusedError):
    """The update is older than the coordinator takes; `newest` is the version to go on from, if it came along."""

    newest: PulledExpert | None = None


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
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {token}"} if token else {})
        # No redirects: a token must not follow one to another host.
        self._http = httpx2.Client(
            base_url=url,
            headers=headers,
            timeout=httpx2.Timeout(timeout, connect=10.0),
            follow_redirects=False,
            transport=transport,
        )
        self._attempts = attempts
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
            return self._http.get("/healthz", timeout=2.0).status_code == 200
        except httpx2.HTTPError:
            return False

    def federation(self) -> FederationInfo:
        """The federation's manifest and limits."""
        return self._json(self._get("/federation"), FederationInfo)

    def list_experts(self) -> Listing:
        """Every expert and the gateway."""
        return self._json(self._get("/list_experts"), Listing)

    def gateway_info(self) -> GatewayInfo:
        """The gateway without its weights."""
        return self._json(self._get("/get_gateway_info"), GatewayInfo)

    def register(self, expert: str, worker: str, manifest: Manifest, seed: int | None = None) -> ExpertInfo:
        """Make the expert, or confirm that it is there with this manifest."""
        message = RegisterRequest(expert=expert, worker=worker, manifest=ManifestMessage.of(manifest), seed=seed)
        return self._json(self._post("/register_expert", message), ExpertInfo)

    def pull_expert(self, expert: str, etag: str | None = None, dtype: WireDtype = "fp32") -> PulledExpert | None:
        """The expert's newest weights; None if they are still those of `etag`."""
        headers = {"Accept": SAFETENSORS} | ({"If-None-Match": etag} if etag else {})
        body = {"expert": expert, "dtype": dtype}
        response = self._retried("POST", "/get_expert_weights", json=body, headers=headers)
        return None if response.status_code == 304 else _pulled_expert(response)

    def pull_gateway(self, etag: str | None = None, dtype: WireDtype = "fp32") -> PulledGateway | None:
        """The newest gateway; None if it is still that of `etag`."""
        headers = {"Accept": SAFETENSORS} | ({"If-None-Match": etag} if etag else {})
        response = self._retried("GET", "/get_gateway_weights", params={"dtype": dtype}, headers=headers)
        return None if response.status_code == 304 else _pulled_gateway(response)

    def push(self, header: UpdateHeader, body: bytes) -> Pushed:
        """Send an update once; sending the same one again later is safe."""
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        headers = {"Content-Type": SAFETENSORS, "Content-Digest": f"sha-256=:{digest}:", "Accept": SAFETENSORS}
        params = header.model_dump(exclude_none=True)
        response = self._once("POST", "/push_expert_update", params=params, content=body, headers=headers)
        if response.headers.get("content-type") != SAFETENSORS:
            return Pushed(self._json(response, UpdateResult), None)
        facts = json.loads(response.headers["fedmoe-result"])
        newest = _pulled_expert(response)
        if response.status_code == 409:
            error = TooStaleError(**facts)
            error.newest = newest
            raise error
        return Pushed(UpdateResult.model_validate(facts), newest)

    def push_statistic(self, statistic: StatisticRequest) -> None:
        """Disclose a small fact, for example a held-out loss."""
        self._post("/push_statistics", statistic)

    def roll_back(self, expert: str, to_version: int, reason: str = "") -> ChangeResult:
        """Give the expert the content of an earlier version, as a new version."""
        body = {"expert": expert, "to_version": to_version, "reason": reason}
        return self._json(self._once("POST", "/rollback", json=body), ChangeResult)

    def retract(self, expert: str, worker: str, reason: str = "") -> ChangeResult:
        """Take one worker's updates out of the expert, as a new version."""
        body = {"expert": expert, "worker": worker, "reason": reason}
        return self._json(self._once("POST", "/retract", json=body), ChangeResult)

    def make_token(self, request: TokenRequest) -> TokenAnswer:
        """A new token; shown once."""
        return self._json(self._once("POST", "/tokens", json=request.model_dump()), TokenAnswer)

    def revoke_token(self, token_hash: str) -> None:
        """Refuse a token from now on."""
        self._once("POST", "/tokens/revoke", json={"hash": token_hash})

    def _get(self, path: str) -> httpx2.Response:
        return self._retried("GET", path)

    def _post(self, path: str, message: BaseModel) -> httpx2.Response:
        return self._retried("POST", path, json=message.model_dump(mode="json"))

    def _retried(self, method: str, path: str, **options: object) -> httpx2.Response:
        for attempt in stamina.retry_context(
            on=_wait_hint, attempts=self._attempts, timeout=None, wait_initial=0.2, wait_max=5.0, wait_jitter=0.5
        ):
            with attempt:
                return self._once(method, path, **options)
        raise AssertionError("the last attempt returns or raises")

    def _once(self, method: str, path: str, **options: object) -> httpx2.Response:
        try:
            response = self._http.request(method, path, **options)  # type: ignore[arg-type]
        except httpx2.HTTPError as error:
            raise CoordinatorUnavailableError(f"{self.url} does not answer: {error!r}") from error
        _raise_for_refusal(response)
        return response

    def _json(self, response: httpx2.Response, kind: type[_Message]) -> _Message:
        try:
            return TypeAdapter(kind).validate_json(response.content)
        except ValidationError as error:
            raise _foreign(response) from error


def _wait_hint(error: Exception) -> bool | float:
    """Whether to try again, and how long to wait if the server said so."""
    if not isinstance(error, CoordinatorUnavailableError):
        return False
    return error.retry_after if error.retry_after is not None else True


def _raise_for_refusal(response: httpx2.Response) -> None:
    if response.status_code < 300 or response.status_code == 304:
        return
    if response.headers.get("content-type") == SAFETENSORS:
        return
    try:
        problem = json.loads(response.content)
        code, detail, fix = problem["code"], problem["detail"], problem.get("fix", "")
    except (ValueError, KeyError, TypeError):
        raise _foreign(response) from None
    if response.status_code in _PASSING:
        retry_after = response.headers.get("retry-after", "")
        seconds = float(retry_after) if retry_after.isdigit() else None
        raise CoordinatorUnavailableError(f"{code}: {detail} {fix}".strip(), seconds)
    known = {"type", "title", "status", "code", "detail", "fix"}
    facts = {key: value for key, value in problem.items() if key not in known}
    kind = TooStaleError if code == "too_stale" else RefusedError
    raise kind(code, detail, fix, **facts)


def _foreign(response: httpx2.Response) -> CoordinatorUnavailableError:
    kind = response.headers.get("content-type", "no content type")
    return CoordinatorUnavailableError(
        f"{response.request.url.host} answered {response.status_code} ({kind}), which is not a FedMoE coordinator's "
        "answer; check the URL, and whether a proxy stands in between"
    )


def _info(response: httpx2.Response) -> dict[str, object]:
    """What accompanies weights, once the body has the digest the answer promises."""
    promised = response.headers.get("content-digest", "")
    digest = base64.b64encode(hashlib.sha256(response.content).digest()).decode()
    if promised != f"sha-256=:{digest}:":
        raise CoordinatorUnavailableError("the weights were damaged on their way (digest mismatch)")
    try:
        _, metadata, _ = read_header(response.content)
        info = json.loads(metadata["fedmoe"])
    except (CodecError, KeyError, ValueError):
        raise _foreign(response) from None
    assert isinstance(info, dict)
    return info


def _pulled_expert(response: httpx2.Response) -> PulledExpert:
    info = _info(response)
    manifest = ManifestMessage.model_validate(info["manifest"]).manifest()
    weights = decode(response.content, manifest.layout).flat
    etag = response.headers.get("etag", "")
    return PulledExpert(str(info["expert"]), int(str(info["version"])), str(info["digest"]), manifest, weights, etag)


def _pulled_gateway(response: httpx2.Response) -> PulledGateway:
    info = _info(response)
    layout = _layout_of(response.content)
    adapter = Adapter(layout, float(str(info["alpha"])), np.ascontiguousarray(decode(response.content, layout).flat))
    sources = {str(name): int(str(version)) for name, version in _mapping(info["sources"]).items()}
    base = {str(key): str(value) for key, value in _mapping(info["base"]).items()}
    etag = response.headers.get("etag", "")
    return PulledGateway(int(str(info["version"])), str(info["digest"]), adapter, sources, base, info, etag)


def _mapping(value: object) -> dict[object, object]:
    if not isinstance(value, dict):
        raise CoordinatorUnavailableError("the answer's metadata is not a FedMoE coordinator's")
    return value


def _layout_of(body: bytes) -> Layout:
    """The layout that a body's own tensors describe; a gateway's rank is not known beforehand."""
    entries, _, _ = read_header(body)
    modules = []
    ranks = set()
    for name, entry in entries.items():
        if name.endswith(".lora_A"):
            module = name.removesuffix(".lora_A")
            ranks.add(entry.shape[0])
            modules.append(ModuleShape(module, entry.shape[1], entries[f"{module}.lora_B"].shape[0]))
    if len(ranks) != 1:
        raise CoordinatorUnavailableError(f"the gateway's factors have ranks {sorted(ranks)}, expected one")
    return Layout(tuple(modules), ranks.pop())
