"""Publication of a gateway: stores its bytes, journals the verdict, then serves it.

What is published is frozen: after a crash the very same bytes are served again, whatever the experts have become.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

import structlog
from pydantic import TypeAdapter

from fedmoe.coordinator import GatewayModel
from fedmoe.federation.events import ExpertRolledBack, WorkerRetracted
from fedmoe.lora.adapter import Adapter, Layout
from fedmoe.lora.codec import decode, encode
from fedmoe.lora.safetensors_bytes import CodecError
from fedmoe.runtime import failpoints
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.blobs import BlobReferences, BlobStore, CorruptBlobError, MissingBlobError, put
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.records import GatewayVerdict

_log = structlog.get_logger("fedmoe.gate")


@dataclass(frozen=True)
class _GatewayDescription:
    """A published gateway without its numbers, as the journal keeps it."""

    version: int
    sources: dict[str, int]
    weights: dict[str, float]
    strategy: str
    scale: float
    truncation_error: float
    digest: str
    statistics: dict[str, str]
    notes: tuple[str, ...]
    rank: int
    alpha: float
    statistics_tokens: dict[str, int] = field(default_factory=dict)
    source_digests: dict[str, str] = field(default_factory=dict)


_described = TypeAdapter(_GatewayDescription)


class Publications:
    """The published gateway in a journal and its blobs; one thread publishes, any number read `current`."""

    def __init__(self, journal: Journal, blobs: BlobStore) -> None:
        self._journal = journal
        self._blobs = blobs
        self.current: GatewayModel | None = None
        self._blob: str | None = None

    def recover(self, layout: Layout) -> None:
        """Read what was published last, of experts with the modules of `layout`; what is lost or damaged is logged."""
        for verdict in self._journal.verdicts(1, published_only=True):
            assert verdict.digest is not None, "only verdicts that published were asked for"
            described = _described.validate_python(verdict.payload["published"])
            try:
                body = self._blobs.read(verdict.digest)
                ranked = layout.with_rank(described.rank)
                adapter = Adapter(ranked, described.alpha, decode(body, ranked).flat)
            except (MissingBlobError, CorruptBlobError, CodecError) as error:
                _log.error("gateway_lost", version=described.version, reason=str(error))
                return
            self._blob, self.current = verdict.digest, _gateway(described, adapter)

    def decide(self, gateway: GatewayModel | None, payload: Mapping[str, object], at: float) -> None:
        """Keep a verdict, and make the gateway that it lets out, if any, the one that is served; `at` is since 1970.

        Returns once it is on disk. The blob of the gateway before is let go of.
        """
        if gateway is None:
            self._journal.add_verdict(GatewayVerdict(None, {**payload, "published": None}, at))
            return
        layout, flat = gateway.adapter.layout, gateway.adapter.flat
        # The version makes these bytes unlike those of any update, which may be deleted on its own.
        blob = put(self._blobs, encode(layout, flat, "fp32", {"gateway": str(gateway.version)}))
        failpoints.reached("gateway.stored")
        self._journal.add_verdict(GatewayVerdict(blob, {**payload, "published": _description(gateway)}, at))
        failpoints.reached("gateway.journalled")
        before, self._blob, self.current = self._blob, blob, gateway
        if before is not None and before != blob:
            try:
                self._blobs.delete(before)
            except RefusedError as error:  # what is published is published; a sweep removes what was
                _log.warning("gateway_not_deleted", blob=before, reason=str(error))

    def taken_back(self) -> list[str]:
        """Experts that were rolled back or retracted from after the published gateway was made of them."""
        if self.current is None:
            return []
        return [name for name, version in self.current.sources.items() if taken_back(self._journal, name, version)]


def taken_back(journal: Journal, expert: str, version: int) -> bool:
    """Whether a version after this one takes back what went before."""
    later = journal.events(expert, after_version=version)
    return any(isinstance(event, ExpertRolledBack | WorkerRetracted) for event in later)


def published_blobs(journal: Journal) -> BlobReferences:
    """The blob that must be kept, and those of the gateways that were published before."""
    published = journal.verdicts(sys.maxsize, published_only=True)
    digests = [verdict.digest for verdict in published if verdict.digest is not None]
    return BlobReferences(set(digests[:1]), set(digests))


def _description(gateway: GatewayModel) -> dict[str, object]:
    values: dict[str, Any] = {field.name: getattr(gateway, field.name, None) for field in fields(_GatewayDescription)}
    values |= {name: dict(value) for name, value in values.items() if isinstance(value, Mapping)}
    values |= {"rank": gateway.adapter.rank, "alpha": gateway.adapter.alpha}
    return dict(_described.dump_python(_GatewayDescription(**values), mode="json"))


def _gateway(described: _GatewayDescription, adapter: Adapter) -> GatewayModel:
    values: dict[str, Any] = {field.name: getattr(described, field.name) for field in fields(described)}
    values |= {name: MappingProxyType(value) for name, value in values.items() if isinstance(value, dict)}
    del values["rank"], values["alpha"]
    return GatewayModel(adapter=adapter, layout=adapter.layout, **values)
