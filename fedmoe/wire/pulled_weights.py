"""Downloaded weights and statistics: checked against digest and manifest, then decoded."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from dataclasses import dataclass

import numpy as np

from fedmoe.lora.adapter import Adapter, FloatVector, Layout, ModuleShape
from fedmoe.lora.codec import WireDtype, decode, digest
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.safetensors_bytes import CodecError, read_header
from fedmoe.runtime.safe_text import inert, inert_json, shortened
from fedmoe.wire.answers import Answer, CoordinatorUnavailableError, foreign
from fedmoe.wire.contract.messages import INCARNATION_HEADER, SAFETENSORS, ManifestMessage

#: The largest number of an adapter; real ones are near 1, and a coordinator takes no update of a norm above it.
LARGEST_NUMBER = 1e9


@dataclass(frozen=True)
class PulledExpert:
    """An expert's weights as downloaded: float32, checked against the answer's digest, with the version they are."""

    name: str
    version: int
    digest: str
    manifest: Manifest
    weights: FloatVector
    etag: str
    #: The history it is of; None where the coordinator does not say, or says nothing that can be one.
    incarnation: str | None = None

    @property
    def adapter(self) -> Adapter:
        return Adapter(self.manifest.layout, self.manifest.alpha, self.weights)


@dataclass(frozen=True)
class ExpectedWeights:
    """What weights have to be: of this manifest if one is given, and of no earlier version than `least_version`."""

    manifest: Manifest | None = None
    least_version: int = 0


#: Any expert, of any version that there can be.
ANY = ExpectedWeights()


@dataclass(frozen=True)
class PulledGateway:
    """The gateway as downloaded, with what it is made of and the base model it belongs on."""

    version: int
    digest: str
    adapter: Adapter
    sources: dict[str, int]
    base: dict[str, str]
    info: dict[str, object]
    incarnation: str | None = None

    @property
    def source_digests(self) -> dict[str, str]:
        """The content hashes of its sources, where they are known."""
        digests = self.info.get("source_digests")
        return {str(name): str(digest) for name, digest in digests.items()} if isinstance(digests, dict) else {}


def body_headers(body: bytes | bytearray) -> dict[str, str]:
    """Headers of a safetensors body."""
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    return {"Content-Type": SAFETENSORS, "Content-Digest": f"sha-256=:{digest}:"}


def check_promise(answer: Answer) -> None:
    """The body must be safetensors, and have the digest the answer promises."""
    if answer.type != SAFETENSORS:
        raise foreign(answer)
    if answer.headers.get("content-digest", "") != body_headers(answer.body)["Content-Digest"]:
        raise CoordinatorUnavailableError("the weights were damaged on their way (digest mismatch)")


def _info(answer: Answer) -> dict[str, object]:
    """What accompanies weights, once the body has the digest the answer promises."""
    check_promise(answer)
    try:
        _, metadata, _ = read_header(answer.body)
        info = json.loads(metadata["fedmoe"])
    except (CodecError, KeyError, ValueError):
        raise foreign(answer) from None
    if not isinstance(info, dict):
        raise foreign(answer)
    return {inert(str(key)): inert_json(value) for key, value in info.items()}


def pulled_expert(
    answer: Answer, expert: str, expected: ExpectedWeights = ANY, dtype: WireDtype = "fp32"
) -> PulledExpert:
    """An expert's weights in an answer; raises what `foreign` gives for weights that cannot be those asked for."""
    info = _info(answer)
    try:
        manifest = ManifestMessage.model_validate(info["manifest"], extra="ignore").manifest()
        name, version = str(info["expert"]), int(str(info["version"]))
        if problem := _mistaken(expert, expected, name, version, manifest):
            raise foreign(answer, problem)
        weights = decode(answer.body, manifest.layout).flat
        etag, incarnation = answer.headers.get("etag", ""), _incarnation(answer)
        pulled = PulledExpert(name, version, str(info["digest"]), manifest, weights, etag, incarnation)
    except (KeyError, ValueError, RecursionError) as error:
        raise foreign(answer) from error
    _check_numbers(answer, pulled.adapter, pulled.digest, dtype)
    return pulled


def _mistaken(expert: str, expected: ExpectedWeights, name: str, version: int, manifest: Manifest) -> str:
    """Why these are not the weights that were asked for; empty if they are."""
    if name != expert:
        return f"it sent the expert '{shortened(name, 80)}' instead of '{expert}'; nothing of it was taken"
    least = max(0, expected.least_version)
    if version < least:
        return (
            f"it sent version {version} of {expert}, though version {least} was there before; nothing of it was taken"
        )
    differences = expected.manifest.differences(manifest) if expected.manifest is not None else []
    if differences:
        return f"it sent another kind of expert than was registered: {'; '.join(differences[:5])}"
    return ""


def _check_numbers(answer: Answer, adapter: Adapter, promised: str, dtype: WireDtype) -> None:
    """Refuse numbers no adapter can be made of, and others than those whose digest the coordinator names."""
    with np.errstate(over="ignore", invalid="ignore"):
        largest = float(np.abs(adapter.flat).max(initial=0.0))
    if not largest <= LARGEST_NUMBER:
        kind = f"as large as {largest:.3g}" if math.isfinite(largest) else "that are not finite"
        raise foreign(answer, f"it sent weights {kind}; nothing of them was taken. Roll the expert back there")
    if dtype == "fp32" and digest(adapter) != promised:
        raise foreign(answer, "it sent other weights than its digest names; nothing of them was taken")


def pulled_gateway(answer: Answer) -> PulledGateway:
    """A gateway's weights in an answer, or a candidate's, in full precision."""
    info = _info(answer)
    try:
        layout = _layout_of(answer.body)
        adapter = Adapter(layout, float(str(info["alpha"])), decode(answer.body, layout).flat)
        sources = {str(name): int(str(version)) for name, version in _mapping(info["sources"]).items()}
        base = {str(key): str(value) for key, value in _mapping(info["base"]).items()}
        version = int(str(info["version"]))
        if version < 0 or not 0 < adapter.alpha < math.inf:
            raise ValueError(f"no gateway has version {version} and alpha {adapter.alpha}")
    except (KeyError, ValueError, RecursionError, OverflowError) as error:
        raise foreign(answer) from error
    _check_numbers(answer, adapter, str(info["digest"]), "fp32")
    return PulledGateway(version, str(info["digest"]), adapter, sources, base, info, _incarnation(answer))


def _incarnation(answer: Answer) -> str | None:
    incarnation = str(answer.headers.get(INCARNATION_HEADER, ""))
    return incarnation if re.fullmatch(r"[a-z0-9]{1,32}", incarnation) else None


def _mapping(value: object) -> dict[object, object]:
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, got {type(value)}")
    return value


def _layout_of(body: bytes | bytearray) -> Layout:
    """The layout that a body's own tensors describe; a gateway's rank is not known beforehand."""
    entries, _, _ = read_header(body)
    modules, ranks = [], set()
    for name in (name.removesuffix(".lora_A") for name in entries if name.endswith(".lora_A")):
        (rank, n_in), (n_out, _) = entries[f"{name}.lora_A"].shape, entries[f"{name}.lora_B"].shape
        ranks.add(rank)
        modules.append(ModuleShape(name, n_in, n_out))
    if len(ranks) != 1:
        raise ValueError(f"the gateway's factors have ranks {sorted(ranks)}, expected one")
    return Layout(tuple(modules), ranks.pop())
