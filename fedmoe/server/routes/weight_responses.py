"""Responses with weights: safetensors or JSON by `Accept`, ETags, a cache of encoded bodies."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from fedmoe.coordinator import GatewayModel, GatewayPlan
from fedmoe.experts import ExpertModel
from fedmoe.lora.adapter import Adapter, FloatMatrix
from fedmoe.lora.codec import WireDtype, encode
from fedmoe.lora.manifest import BaseModel
from fedmoe.lora.safetensors_bytes import read_header
from fedmoe.server.routes.json_weights import JsonPolicy, JsonWeights
from fedmoe.server.updates.upload import content_digest
from fedmoe.wire.contract.messages import SAFETENSORS
from fedmoe.wire.http.middleware import JSON, excludes, is_head, not_acceptable, weight_form

Info = Mapping[str, object]
Part = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights about to leave: what accompanies them, and the adapter or the experts that they are.

    An adapter is given by a function, called when its numbers are needed: an expert that nothing landed on keeps none.
    """

    name: str
    version: int
    digest: str
    info: Info
    #: How many numbers they are.
    size: int
    content: Callable[[], Adapter] | tuple[Weights, ...]

    def encode(self, dtype: WireDtype, cache: EncodedCache) -> tuple[Part, ...]:
        """A safetensors body in parts that follow each other; of several experts, made of those in the cache."""
        metadata = {"fedmoe": json.dumps(self.info, separators=(",", ":"))}
        if isinstance(self.content, tuple):
            return _joined([(expert.name, cache.get(expert, dtype).parts[0]) for expert in self.content], metadata)
        adapter = self.content()
        return (encode(adapter.layout, adapter.flat, dtype, metadata),)

    def modules(self) -> Iterator[tuple[str, FloatMatrix, FloatMatrix]]:
        """Name and both factors of each module; of several experts the names are `EXPERT/MODULE`."""
        if isinstance(self.content, tuple):
            for expert in self.content:
                yield from ((f"{expert.name}/{module}", a, b) for module, a, b in expert.modules())
        else:
            yield from ((module.name, a, b) for module, a, b in self.content().factors())


@dataclass(frozen=True, slots=True)
class EncodedBody:
    """A safetensors body in parts that follow each other, and the sha256 of the whole."""

    of: tuple[int, str]
    parts: tuple[Part, ...]
    sha256: bytes

    @property
    def size(self) -> int:
        return sum(len(part) for part in self.parts)


class EncodedCache:
    """The newest encoded body of every (name, dtype), so that many pulls of one version encode it once.

    Those asked for last are kept, up to `most_bytes` in all, and the very last one however large it is.
    """

    def __init__(self, most_bytes: int = 64 << 20) -> None:
        self._most_bytes = most_bytes
        self._bodies: OrderedDict[tuple[str, WireDtype], EncodedBody] = OrderedDict()
        self._locks: dict[tuple[str, WireDtype], threading.Lock] = {}
        self._guard = threading.Lock()

    def get(self, weights: Weights, dtype: WireDtype) -> EncodedBody:
        """The body of exactly these weights, encoded now unless it is the one kept."""
        key, content = (weights.name, dtype), (weights.version, weights.digest)
        with self._guard:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            with self._guard:
                body = self._bodies.get(key)
            if body is None or body.of != content:
                parts = weights.encode(dtype, self)
                hasher = hashlib.sha256()
                for part in parts:
                    hasher.update(part)
                body = EncodedBody(content, parts, hasher.digest())
            with self._guard:
                self._bodies[key] = body
                self._bodies.move_to_end(key)
                size = sum(encoded.size for encoded in self._bodies.values())
                while size > self._most_bytes and len(self._bodies) > 1:
                    size -= self._bodies.popitem(last=False)[1].size
            return body


def expert_weights(expert: ExpertModel, name: str = "") -> Weights:
    """An expert's weights with its manifest, under the name that it was asked for by."""
    shown, manifest = name or expert.title, expert.manifest
    info = {"expert": shown, "version": expert.version, "digest": expert.digest, "manifest": manifest.to_json()}
    return Weights(shown, expert.version, expert.digest, info, manifest.layout.size, lambda: expert.adapter)


def all_weights(experts: Mapping[str, ExpertModel], version: int) -> Weights:
    """All experts as one set of tensors, each module's name prefixed with `EXPERT/`."""
    ordered = [experts[name] for name in sorted(experts)]
    listed = {expert.title: {"version": expert.version, "digest": expert.digest} for expert in ordered}
    digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()
    info = {"version": version, "digest": digest, "manifest": ordered[0].manifest.to_json(), "experts": listed}
    members = tuple(expert_weights(expert) for expert in ordered)
    # Neither all experts nor a gateway has an expert's name: "@" keeps them apart in the cache.
    return Weights("@all", version, digest, info, sum(expert.size for expert in members), members)


def gateway_facts(gateway: GatewayPlan) -> dict[str, object]:
    """What a gateway is made of, as it stands beside its weights and in `/get_gateway_info`."""
    facts: dict[str, object] = {
        "version": gateway.version,
        "strategy": gateway.strategy,
        "sources": dict(gateway.sources),
        "source_digests": dict(gateway.source_digests),
        "weights": dict(gateway.weights),
        "statistics": dict(gateway.statistics),
        "statistics_tokens": dict(gateway.statistics_tokens),
        "notes": list(gateway.notes),
        "scale": gateway.scale,
    }
    if isinstance(gateway, GatewayModel):
        facts |= {"digest": gateway.digest, "truncation_error": gateway.truncation_error}
    return facts


def gateway_weights(gateway: GatewayModel, experts: Mapping[str, ExpertModel]) -> Weights:
    """The gateway's weights with the experts and versions it is made of."""
    base = next(iter(experts.values())).manifest.base
    return _of_adapter("@gateway", gateway.version, gateway.digest, gateway.adapter, base, gateway_facts(gateway))


def adapter_weights(
    version: int, adapter: Adapter, digest: str, sources: Mapping[str, int], base: BaseModel
) -> Weights:
    """Any adapter's weights in the form of a gateway's: an adapter to be scored."""
    facts: Info = {"version": version, "digest": digest, "sources": dict(sources)}
    return _of_adapter("@candidate", version, digest, adapter, base, facts)


def _of_adapter(name: str, version: int, digest: str, adapter: Adapter, base: BaseModel, facts: Info) -> Weights:
    info = {**facts, "alpha": adapter.alpha, "rank": adapter.rank, "base": asdict(base)}
    return Weights(name, version, digest, info, adapter.layout.size, lambda: adapter)


def _joined(bodies: list[tuple[str, Part]], metadata: dict[str, str]) -> tuple[Part, ...]:
    """Several safetensors bodies as one, their tensors prefixed; the numbers are shared, not copied.

    The header is not held to our reader's cap: with many experts it outgrows it, and safetensors itself reads 100 MB.
    """
    header: dict[str, object] = {"__metadata__": metadata}
    numbers: list[Part] = []
    offset = 0
    for name, body in bodies:
        entries, _, data = read_header(body)
        for tensor, entry in entries.items():
            offsets = [offset + entry.start, offset + entry.stop]
            header[f"{name}/{tensor}"] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": offsets}
        offset += len(data)
        numbers.append(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return (len(text).to_bytes(8, "little") + text, *numbers)


def etag(weights: Weights, form: str) -> str:
    """Names the content, not the place: the same weights in the same form have the same tag on every coordinator."""
    return f'"{weights.version}-{weights.digest[:32]}-{form}"'


@dataclass(frozen=True)
class WeightAnswers:
    """Answers with weights: the bodies that are kept encoded, and what answers in JSON may cost."""

    json: JsonPolicy
    cache: EncodedCache = field(default_factory=EncodedCache)

    def check(self, request: Request, numbers: int) -> None:
        """Refuse a caller who takes neither form, or JSON only and asks for more numbers than are written as that."""
        if _form(request) == JSON:
            self.json.check(numbers)

    def answer(
        self,
        request: Request,
        weights: Weights,
        dtype: WireDtype,
        status: int = 200,
        result: Info | None = None,
        keep: bool = True,
    ) -> Response:
        """304 if the caller has them, safetensors if the caller takes them, else JSON, streamed in pieces.

        JSON carries every number as it is, whatever `dtype`. `result` is what became of the push that is answered;
        with `keep` the encoded body is kept for the next who asks.
        """
        form = _form(request)
        binary = form == SAFETENSORS
        tag = etag(weights, dtype if binary else "json")
        headers = {
            "ETag": tag,
            "Vary": "Accept",
            "FedMoE-Version": str(weights.version),
            "FedMoE-Digest": weights.digest,
        }
        if result is None and has_etag(request, tag):
            return Response(status_code=304, headers=headers)
        if is_head(request):
            return Response(None, status, headers, form)
        if not binary:
            self.json.check(weights.size)
            head = dict(weights.info) if result is None else {"result": dict(result), **weights.info}
            return JsonWeights(head, weights.modules(), self.json, status, headers, waits=result is not None)
        encoded = (self.cache if keep else EncodedCache()).get(weights, dtype)
        headers["Content-Digest"] = content_digest(encoded.sha256)
        if result is not None:
            headers["FedMoE-Result"] = json.dumps(result, separators=(",", ":"))
        if len(encoded.parts) == 1:
            return Response(encoded.parts[0], status, headers, SAFETENSORS)
        headers["Content-Length"] = str(encoded.size)
        return StreamingResponse(_pieces(encoded), status, headers, SAFETENSORS)


def _form(request: Request) -> str:
    """JSON or safetensors, as the caller takes weights; raises `RefusedError` for one that takes neither."""
    form = weight_form(request.headers.getlist("accept"))
    if form is None:
        raise not_acceptable(JSON)
    return form


def refuse_without(request: Request, form: str) -> None:
    """Refuse a caller who never takes the only form of an answer."""
    if excludes(request.headers.getlist("accept"), form):
        raise not_acceptable(form)


def has_etag(request: Request, tag: str) -> bool:
    """Whether the caller says it has what this ETag names."""
    header = ",".join(request.headers.getlist("if-none-match"))
    return tag in [item.strip().removeprefix("W/") for item in header.split(",")]


async def _pieces(encoded: EncodedBody) -> AsyncIterator[Part]:
    for part in encoded.parts:
        yield part
