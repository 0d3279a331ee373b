"""Taking weights from the coordinator, which is not trusted blindly: its client checks what it sends."""

from __future__ import annotations

import structlog

from fedmoe.manifest import Manifest
from fedmoe.wire.client import CoordinatorClient, Expected, PulledExpert

_log = structlog.get_logger("fedmoe.worker")


def pull(client: CoordinatorClient, expert: str, manifest: Manifest) -> PulledExpert:
    """The expert's newest version, if it fits this worker's model."""
    pulled = client.pull_expert(expert, expected=Expected(manifest))
    assert pulled is not None, "without an ETag there is always an answer"
    _log.info("pulled", expert=pulled.name, version=pulled.version, digest=pulled.digest[:12])
    return pulled
