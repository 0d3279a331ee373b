"""Workers in this process on the tiny model, a coordinator that can go away, and a road between them that can break."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx2
import numpy as np
from live import listening
from support import free_port

from fedmoe.config import CoordinatorConfig
from fedmoe.coordinator import seed_of
from fedmoe.datasets.tokens.packing import Block, BlockSampler, pack
from fedmoe.datasets.tokens.tokenized_sample import TokenizedSample
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.distributed_worker import DistributedWorker, SyncSettings
from fedmoe.experts import ExpertModel
from fedmoe.federation.events import UpdateAccepted
from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.codec import WireDtype, decode
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.held_out import HeldOutPlan
from fedmoe.qwen_finetune import LoraConfig, QwenLoRAExpert, TrainingConfig
from fedmoe.qwen_worker import QwenWorker, StepRecord
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import PROBLEM, StartFrom
from fedmoe.wire.outbox import Outbox

EXPERT = "python"
PUSH = "/push_expert_update"


@dataclass
class Federation:
    """A coordinator on a folder and a port of its own, to be stopped and started again."""

    folder: Path
    options: dict[str, object] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    house: DistributedCoordinator | None = None
    _running: ExitStack = field(default_factory=ExitStack)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        options = {"min_sync_interval": 0.0, **self.options}
        config = CoordinatorConfig(state_dir=str(self.folder), **options)  # type: ignore[arg-type]
        self.house = DistributedCoordinator(config)
        self._running.callback(self.house.close)
        self.house.service.start()
        self._running.enter_context(listening(self.house.app, self.port))

    def stop(self) -> None:
        self._running.close()

    @property
    def expert(self) -> ExpertModel:
        assert self.house is not None
        return self.house.service.coordinator.expert(EXPERT)

    @property
    def weights(self) -> FloatVector:
        return self.expert.state.weights

    def updates(self) -> list[UpdateAccepted]:
        """Every accepted update, in the journal's order."""
        assert self.house is not None
        return [event for event in self.house.service.journal.events() if isinstance(event, UpdateAccepted)]

    def delta(self, update: UpdateAccepted) -> FloatVector:
        """What an update brought, as it travelled."""
        file = next((self.folder / "blobs").rglob(f"{update.digest}*"))
        return decode(file.read_bytes(), self.expert.manifest.layout).flat


@contextmanager
def federation(folder: Path, **options: object) -> Iterator[Federation]:
    running = Federation(folder, options)
    running.start()
    try:
        yield running
    finally:
        running.stop()


class Road(httpx2.BaseTransport):
    """The way to the coordinator. `faults` befall the next pushes, one each; `closed`, nothing gets through.

    A fault is `lost` (never arrives), `answer_lost` (arrives, but the answer does not), `damaged` (other bytes arrive)
    or `busy` (503 with Retry-After 2).
    """

    def __init__(self, *faults: str) -> None:
        self.faults = deque(faults)
        self.closed = threading.Event()
        self.open_for_pushes = threading.Event()
        self.open_for_pushes.set()
        self.pushes: list[httpx2.URL] = []
        #: The bytes of every answer to a push.
        self.answers: list[int] = []
        #: What is taken out of the heads of pushes, as an older program would not send it.
        self.without = ""
        self._inner = httpx2.HTTPTransport(verify=False)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if self.closed.is_set():
            raise httpx2.ConnectError("closed by the test", request=request)
        if request.url.path != PUSH:
            return self._inner.handle_request(request)
        self.open_for_pushes.wait(20)
        self.pushes.append(request.url)
        fault = self.faults.popleft() if self.faults else ""
        if fault == "lost":
            raise httpx2.ConnectError("lost by the test", request=request)
        if fault == "busy":
            return _busy()
        if fault == "damaged":
            body = request.read()
            request = httpx2.Request("POST", request.url, headers=request.headers, content=body[:-1] + b"!")
        if self.without:
            request.headers.pop(self.without, None)
        response = self._inner.handle_request(request)
        self.answers.append(int(response.headers["content-length"]))
        if fault == "answer_lost":
            response.read()
            response.close()
            raise httpx2.ReadError("answer lost by the test", request=request)
        return response

    def sequences(self) -> list[int]:
        """The number of every update that was tried."""
        return [int(url.params["sequence"]) for url in self.pushes]

    def close(self) -> None:
        self._inner.close()


def _busy() -> httpx2.Response:
    told = {"title": "Service Unavailable", "status": 503, "code": "busy", "detail": "by the test"}
    headers = {"Content-Type": PROBLEM, "Retry-After": "2"}
    return httpx2.Response(503, headers=headers, stream=httpx2.ByteStream(json.dumps(told).encode()))


class StepClock:
    """A clock by which every training step takes one second, and all else no time."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def blocks(seed: int = 0, count: int = 24, step: int = 1) -> list[Block]:
    """Sequences that count up byte by byte, or by `step`: something a model can learn."""
    random = np.random.default_rng(seed)
    starts = random.integers(0, 200, count)
    counted = (np.arange(s, s + 20 * step, step) % 256 for s in starts)
    return pack([TokenizedSample(ids, ids) for ids in counted], 32, 0)


def tiny_base() -> LoadedBase:
    return load_base("tiny", "cpu", "fp32")


@dataclass
class Setup:
    """One worker with everything it is made of."""

    url: str
    state_dir: Path
    name: str = "w1"
    steps: int = 0
    every: float = 3.0
    max_unsynced: float = 1000.0
    wire: WireDtype = "fp32"
    road: Road = field(default_factory=Road)
    data: list[Block] = field(default_factory=blocks)
    rank: int = 4
    clock: StepClock | None = field(default_factory=StepClock)
    expert: str = EXPERT
    start_from: StartFrom | None = None
    allow_changed_data: bool = False
    held_out: HeldOutPlan | None = None
    on_registered: Callable[[], None] = lambda: None
    after_step: Callable[[DistributedWorker, StepRecord], None] = lambda worker, record: None
    _closing: list[Callable[[], None]] = field(default_factory=list)

    def build(self) -> DistributedWorker:
        """A worker; `close` when it is done with."""
        training = TrainingConfig(learning_rate=5e-3, max_steps=self.steps, warmup_steps=2)
        expert = QwenLoRAExpert(tiny_base(), LoraConfig(self.rank, 8, seed=seed_of(self.expert) % 2**63), training)
        sampler = BlockSampler(self.data, seed=1)
        clock: Callable[[], float] = self.clock or time.monotonic
        start = (self.start_from, self.allow_changed_data)
        settings = SyncSettings(self.name, self.expert, self.every, self.max_unsynced, self.wire, *start)
        client = CoordinatorClient(self.url, transport=self.road, attempts=1)
        outbox = Outbox(self.state_dir, self.name, self.expert)

        def on_step(record: StepRecord) -> None:
            if self.clock:
                self.clock.now += 1
            self.after_step(worker, record)

        worker = DistributedWorker(
            QwenWorker(expert, sampler, held_out=self.held_out, clock=clock),
            client,
            settings,
            self.state_dir,
            outbox,
            on_step,
            self.on_registered,
            clock,
        )
        self._closing = [outbox.close, client.close]
        self.last = worker
        return worker

    def close(self) -> None:
        """Release the folder and the connections, as the end of a process would."""
        for close in self._closing:
            close()
        self._closing = []

    def run(self, change: Callable[[DistributedWorker], None] = lambda worker: None) -> DistributedWorker:
        """Build it, `change` it, run it to its end, and close."""
        worker = self.build()
        change(worker)
        try:
            worker.run()
        finally:
            self.close()
        return worker


def wait_for_answer(worker: DistributedWorker, record: StepRecord) -> None:
    """After each step, until no update is under way: an answer is taken in one step after the cut at the latest."""
    delivery = worker._delivery
    if delivery is not None:
        delivery.wait(20)


def answered_after_a_step(setup: Setup) -> Callable[[DistributedWorker, StepRecord], None]:
    """Like `wait_for_answer`, and no update travels before the next step is done, or all are: the moment of a rebase
    is the same in every run, however quick the coordinator is."""
    gate = setup.road.open_for_pushes
    gate.clear()

    def after_step(worker: DistributedWorker, record: StepRecord) -> None:
        gate.set()
        wait_for_answer(worker, record)
        if record.step < setup.steps:
            gate.clear()

    return after_step


def set_patience(worker: DistributedWorker, seconds: float) -> None:
    """From now on it goes on without an answer for so long only."""
    worker._settings = replace(worker._settings, max_unsynced=seconds)


def local(worker: DistributedWorker) -> FloatVector:
    return worker.worker.weights()


def replayed(house: Federation, start: FloatVector) -> FloatVector:
    """What the accepted updates make of the expert's first weights, by the specification's formula."""
    weights = start.copy()
    for update in house.updates():
        weights = weights + np.float32(update.coefficient) * house.delta(update)
    return weights
