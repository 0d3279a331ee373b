"""Taking weights from the coordinator, which is not trusted blindly."""

from __future__ import annotations

import numpy as np
import structlog

from fedmoe.manifest import Manifest
from fedmoe.wire.client import CoordinatorClient, PulledExpert
from fedmoe.worker.group import WorkerFailedError

_log = structlog.get_logger("fedmoe.worker")


def pull(client: CoordinatorClient, expert: str, manifest: Manifest) -> PulledExpert:
    """The expert's newest version, checked."""
    pulled = client.pull_expert(expert)
    assert pulled is not None, "without an ETag there is always an answer"
    _log.info("pulled", expert=pulled.name, version=pulled.version, digest=pulled.digest[:12])
    return checked(pulled, manifest, client.url)


def checked(pulled: PulledExpert, manifest: Manifest, url: str) -> PulledExpert:
    """The same, if it fits this worker's model and holds only numbers; raises WorkerFailedError otherwise."""
    differences = manifest.differences(pulled.manifest)
    if differences:
        raise WorkerFailedError(f"{url} sent another kind of expert than it registered: {'; '.join(differences[:5])}")
    if not np.isfinite(pulled.weights).all():
        raise WorkerFailedError(f"{url} sent weights that are not finite; roll the expert back there")
    return pulled
