"""What tests of the coordinator share: a tiny expert, updates by seed, a running coordinator process."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from forks import Fork, Process

from fedmoe.coordinator import Aggregation, Submission
from fedmoe.federation.events import ExpertRegistered, UpdateAccepted
from fedmoe.lora.adapter import Adapter, FloatVector, Layout, ModuleShape
from fedmoe.lora.codec import encode
from fedmoe.lora.manifest import BaseModel, Manifest
from fedmoe.server.history.history import History
from fedmoe.server.service import CoordinatorService
from fedmoe.server.storage.blobs import BlobStore
from fedmoe.server.storage.journal import Journal
from fedmoe.server.updates.upload import Body
from fedmoe.wire.contract.messages import UpdateHeader

LAYOUT = Layout((ModuleShape("layers.0.q", 6, 4), ModuleShape("layers.0.v", 6, 3)), 2)
MANIFEST = Manifest(BaseModel("tiny/base", "main", "a" * 64, "b" * 64), LAYOUT, 4.0)
EPOCH = "e1"


def make_flat(seed: int, layout: Layout = LAYOUT) -> FloatVector:
    """Numbers around 0.01, like an update's."""
    return np.random.default_rng(seed).normal(0, 0.01, layout.size).astype(np.float32)


def make_adapter(seed: int, layout: Layout = LAYOUT, alpha: float = 4.0) -> Adapter:
    """Random factors, A and B both away from zero."""
    return Adapter(layout, alpha, make_flat(seed, layout))


def make_body(seed: int, layout: Layout = LAYOUT) -> bytes:
    """The bytes of the update with this seed."""
    return encode(layout, make_flat(seed, layout))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def make_submission(
    expert: str = "python", base_version: int = 0, sequence: int = 0, worker: str = "w1", digest: str = "0" * 64
) -> Submission:
    return Submission(expert, worker, EPOCH, sequence, base_version, digest)


def registered(expert: str = "python", seed: int = 1) -> ExpertRegistered:
    return ExpertRegistered(expert, "w1", MANIFEST, seed, 10.0)


def accepted(
    version: int, worker: str = "w1", expert: str = "python", sequence: int | None = None, digest: str | None = None
) -> UpdateAccepted:
    """The update that made `version`, with what a journal needs of it."""
    number = version if sequence is None else sequence
    content = digest or sha256(f"{expert} {version}".encode())
    return UpdateAccepted(expert, worker, EPOCH, number, version - 1, content, 0, 1.0, version, 10.0 + version)


class EagerHistory(History):
    """Takes snapshots so often that short tests meet them."""

    every = 3

    def snapshot_if_due(self, expert: object, every: int = 0) -> None:
        super().snapshot_if_due(expert, every or self.every)  # type: ignore[arg-type]


def open_service(
    journal: Journal,
    blobs: BlobStore,
    aggregation: Aggregation | None = None,
    keep_updates: int | None = None,
    merges_by_itself: bool = True,
    clock: Callable[[], float] = lambda: 1000.0,
) -> CoordinatorService:
    """A started service on what the journal and the blobs hold, with a snapshot every three versions.

    One that does not fold by itself is asked to with `fold`, so that a test knows when.
    """
    history = EagerHistory(journal, blobs, aggregation or Aggregation(), keep_updates)
    service = CoordinatorService(history.recover(), journal, blobs, history, clock=clock)
    if merges_by_itself:
        service.start()
    else:
        service.committer.start()
    return service


def fold(service: CoordinatorService) -> int:
    """Fold until nobody is ready; how many merges there are then."""
    while service._background_merge.merge_ready():
        pass
    living = service.coordinator.transaction().online_gateway
    assert living is not None
    return living.number


async def chunks(data: bytes) -> AsyncIterator[bytes]:
    yield data


def make_push(
    data: bytes,
    base_version: int,
    sequence: int,
    worker: str = "w1",
    expert: str = "python",
    steps: int | None = None,
) -> tuple[UpdateHeader, Body]:
    """The arguments of `CoordinatorService.push`."""
    header = UpdateHeader(
        expert=expert, worker=worker, epoch=EPOCH, sequence=sequence, base_version=base_version, loss=1.0, steps=steps
    )
    return header, Body(chunks(data), len(data), sha256(data))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class CoordinatorProcess:
    """A coordinator in a process of its own, to be started, killed and started again on one state directory.

    Forked, unless it is to be `fresh`: for tests of the start itself, of its memory and of what it inherits.
    """

    state_dir: Path
    port: int = field(default_factory=free_port)
    arguments: Sequence[str] = ()
    process: Process | None = None
    fresh: bool = False

    @property
    def url(self) -> str:
        return f"{'https' if '--tls' in self.arguments else 'http'}://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.state_dir.parent / "coordinator.log"

    def command(self) -> list[str]:
        """What is run."""
        command = [sys.executable, "-m", "fedmoe", "coordinator", "--port", str(self.port)]
        return [*command, "--state-dir", str(self.state_dir), *self.arguments]

    def launch(self, failpoints: str) -> Process:
        """Start it, and do not wait."""
        environment = os.environ | {"FEDMOE_FAILPOINTS": failpoints, "OMP_NUM_THREADS": "1"}
        if not self.fresh:
            return Fork(self.command()[1:], self.log, environment=environment)
        with self.log.open("ab") as log:
            return subprocess.Popen(self.command(), stdout=log, stderr=log, env=environment)

    def start(self, failpoints: str = "") -> None:
        """Start it and wait until it answers."""
        self.process = self.launch(failpoints)
        deadline = time.monotonic() + 120  # a busy machine takes its time
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the coordinator did not start: {self.log.read_text()[-2000:]}")
            time.sleep(0.01)

    def answers(self) -> bool:
        """Whether it says that it is well."""
        try:
            anybody = ssl._create_unverified_context()
            with urllib.request.urlopen(f"{self.url}/healthz", timeout=5, context=anybody) as response:
                return bool(response.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def wait(self, timeout: float = 20.0) -> int:
        """The exit status, once it is gone by itself."""
        assert self.process is not None
        return self.process.wait(timeout)

    def kill(self) -> None:
        """SIGKILL: no clean-up of any kind."""
        self._end(signal.SIGKILL)

    def stop(self) -> int:
        """SIGTERM, as a supervisor would."""
        return self._end(signal.SIGTERM)

    def _end(self, number: signal.Signals) -> int:
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)
