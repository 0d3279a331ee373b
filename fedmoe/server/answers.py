"""How weights leave the coordinator: safetensors for programs, JSON for people with curl, 304 when nothing is new."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fedmoe.coordinator import GatewayModel
from fedmoe.experts import ExpertModel
from fedmoe.lora.adapter import Adapter, Layout, ModuleShape
from fedmoe.lora.codec import WireDtype, encode
from fedmoe.server.receive import content_digest
from fedmoe.wire.messages import SAFETENSORS

Info = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights about to leave: the adapter, the content hash, and what accompanies them."""

    name: str
    version: int
    adapter: Adapter
    digest: str
    info: Info


@dataclass(frozen=True, slots=True)
class _Encoded:
    version: int
    body: bytes
    sha256: bytes


class EncodedCache:
    """The newest encoded body of every (name, dtype), so that many pulls of one version encode it once."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, WireDtype], _Encoded] = {}
        self._locks: dict[tuple[str, WireDtype], threading.Lock] = {}
        self._guard = threading.Lock()

    def get(self, name: str, version: int, dtype: WireDtype, make: Callable[[], bytes]) -> _Encoded:
        """The body of this version, encoded now unless it is the one kept."""
        key = (name, dtype)
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            kept = self._kept.get(key)
            if kept is None or kept.version != version:
                body = make()
                kept = _Encoded(version, body, hashlib.sha256(body).digest())
                self._kept[key] = kept
            return kept


def expert_weights(expert: ExpertModel) -> Weights:
    """An expert's weights with its manifest."""
    info = {
        "expert": expert.name,
        "version": expert.version,
        "digest": expert.digest,
        "manifest": expert.manifest.to_json(),
    }
    return Weights(expert.name, expert.version, expert.adapter, expert.digest, info)


def gateway_weights(gateway: GatewayModel, experts: Mapping[str, ExpertModel]) -> Weights:
    """The gateway's weights with the experts and versions it is made of."""
    manifest = next(iter(experts.values())).manifest
    info = {
        "version": gateway.version,
        "digest": gateway.digest,
        "strategy": gateway.strategy,
        "sources": dict(gateway.sources),
        "weights": dict(gateway.weights),
        "truncation_error": gateway.truncation_error,
        "alpha": gateway.adapter.alpha,
        "rank": gateway.adapter.rank,
        "base": manifest.to_json()["base"],
    }
    # A gateway has no expert's name: "@" keeps the two apart in the cache.
    return Weights("@gateway", gateway.version, gateway.adapter, gateway.digest, info)


def all_weights(experts: Mapping[str, ExpertModel], version: int) -> Weights:
    """All experts as one set of tensors, each module's name prefixed with `EXPERT/`."""
    ordered = [experts[name] for name in sorted(experts)]
    modules = tuple(
        ModuleShape(f"{expert.name}/{module.name}", module.in_features, module.out_features)
        for expert in ordered
        for module in expert.manifest.layout.modules
    )
    factors = {
        f"{expert.name}/{module.name}": (a, b) for expert in ordered for module, a, b in expert.adapter.factors()
    }
    layout = Layout(modules, ordered[0].manifest.layout.rank)
    adapter = Adapter.from_factors(factors, ordered[0].manifest.alpha)
    assert adapter.layout == layout, "prefixed modules keep their order"
    digest = hashlib.sha256("".join(expert.digest for expert in ordered).encode()).hexdigest()
    info = {
        "version": version,
        "digest": digest,
        "manifest": ordered[0].manifest.to_json(),
        "experts": {expert.name: {"version": expert.version, "digest": expert.digest} for expert in ordered},
    }
    return Weights("@all", version, adapter, digest, info)


def etag(weights: Weights, dtype: WireDtype) -> str:
    """Names the content, not the place: the same weights have the same tag on every coordinator."""
    return f'"{weights.version}-{weights.digest[:32]}-{dtype}"'


def answer_weights(
    request: Request,
    weights: Weights,
    dtype: WireDtype,
    cache: EncodedCache,
    status: int = 200,
    extra: Info | None = None,
) -> Response:
    """304 if the caller has them, safetensors if the caller takes them, else JSON, streamed module by module."""
    tag = etag(weights, dtype)
    headers = {
        "ETag": tag,
        "Vary": "Accept",
        "FedMoE-Version": str(weights.version),
        "FedMoE-Digest": weights.digest,
    }
    if extra is None and tag in [item.strip() for item in request.headers.get("if-none-match", "").split(",")]:
        return Response(status_code=304, headers=headers)
    if SAFETENSORS not in request.headers.get("accept", ""):
        return StreamingResponse(_json(weights), status, headers, "application/json")
    encoded = cache.get(weights.name, weights.version, dtype, lambda: _body(weights, dtype))
    headers["Content-Digest"] = content_digest(encoded.sha256)
    if extra is not None:
        headers["FedMoE-Result"] = json.dumps(extra, separators=(",", ":"))
    return Response(encoded.body, status, headers, SAFETENSORS)


def _body(weights: Weights, dtype: WireDtype) -> bytes:
    metadata = {"fedmoe": json.dumps(weights.info, separators=(",", ":"))}
    return encode(weights.adapter.layout, weights.adapter.flat, dtype, metadata)


def _json(weights: Weights) -> Iterator[str]:
    """One JSON object; numbers as Python prints float32 values in double precision, so none is lost."""
    yield json.dumps(dict(weights.info))[:-1] + ', "modules": {'
    separator = ""
    for module, a, b in weights.adapter.factors():
        factors = {"lora_A": a.tolist(), "lora_B": b.tolist()}
        yield f"{separator}{json.dumps(module.name)}: {json.dumps(factors)}"
        separator = ", "
    yield "}}\n"
