"""One engine over several replicas elsewhere: batches are dealt out, and a replica that dies is replaced.

What is sampled does not depend on the number of replicas: every request has its own seed, and batches are cut as a
single engine with as many `rows` cuts them. A batch whose replica died is computed again by the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Protocol, TypeVar

import structlog

from fedmoe.inference.engine import AdapterKey, EngineError, Sample, SampleRequest
from fedmoe.inference.verify import Proof, SyncReport
from fedmoe.lora.adapter import Adapter, FloatArray
from fedmoe.lora.codec import digest, encode_adapter
from fedmoe.models.sample_batches import cut_batches, in_order

#: How often in a row the replica that a batch is on may die: a batch that kills them all must not go on for ever.
_ATTEMPTS = 3
_log = structlog.get_logger("fedmoe.arena")
Result = TypeVar("Result")


class ReplicaLostError(RuntimeError):
    """A replica that died or cannot be reached; what it was asked for is asked of the one that takes its place."""


class Replica(Protocol):
    """An engine elsewhere; every call waits for its answer, and raises ReplicaLostError where the replica died.

    `context`: as in `Engine`. What the engine there refuses is raised as EngineError.
    """

    context: int | None

    def load(self, key: AdapterKey, weights: object) -> str:
        """Make a version available, or leave it where it is there already; the digest of the adapter."""

    def unload(self, key: AdapterKey) -> None:
        """Unload a version, if it is there."""

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """Answer one batch, in its order."""

    def score(self, key: AdapterKey | None, prompt: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """As in `Engine`."""

    def verify(self, proof: Proof) -> SyncReport:
        """`verify_sync` beside the engine."""

    def close(self) -> None:
        """End it; of one that died nothing is left behind."""


class Launcher(Protocol):
    """Where replicas run."""

    def start(self, number: int) -> Replica:
        """The replica of this place, ready to load versions; EngineError where it cannot be had."""

    def store(self, data: bytes) -> object:
        """Put weights where all replicas can fetch them; what `Replica.load` takes. They go with the last reference."""


@dataclass
class _Slot:
    """The place of one replica; another one takes it when it dies."""

    number: int
    replica: Replica
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class _Version:
    weights: object
    digest: str
    proof: Proof | None = None


class FleetEngine:
    """An `Engine` and `ReplicatedEngine` over `count` replicas; batches have at most `rows` requests.

    Several threads may use it at once. A replica computes one batch at a time.
    """

    def __init__(self, launcher: Launcher, count: int, rows: int) -> None:
        self._launcher, self._rows = launcher, rows
        self._versions: dict[AdapterKey, _Version] = {}
        self._changing = threading.Lock()
        self._few_batches_logged = False
        # Two pools: what concerns every replica must not wait behind the batches of a whole wave.
        self._samplers = ThreadPoolExecutor(count, "fleet-sampler")
        self._others = ThreadPoolExecutor(count, "fleet")
        starts = [self._others.submit(launcher.start, number) for number in range(count)]
        wait(starts)
        self._slots = [
            _Slot(number, start.result()) for number, start in enumerate(starts) if start.exception() is None
        ]
        self._idle: SimpleQueue[_Slot] = SimpleQueue()
        for slot in self._slots:
            self._idle.put(slot)
        try:
            for start in starts:
                start.result()
        except ReplicaLostError as error:
            self.close()
            raise EngineError(str(error)) from error
        except BaseException:
            self.close()
            raise

    @property
    def context(self) -> int | None:
        """The least that any replica takes."""
        return min((slot.replica.context for slot in self._slots if slot.replica.context is not None), default=None)

    def load(self, key: AdapterKey, adapter: Adapter) -> None:
        """Make a version available on every replica; its weights are stored once."""
        version = _Version(self._launcher.store(encode_adapter(adapter)), digest(adapter))
        with self._changing:
            if key in self._versions:
                raise EngineError(f"{key} is loaded already; a version is never loaded twice")
            self._versions[key] = version
        try:
            self._everywhere(lambda replica: _give(replica, key, version))
        except BaseException:
            with self._changing:
                del self._versions[key]
            with suppress(EngineError):
                self._everywhere(lambda replica: replica.unload(key))
            raise

    def unload(self, key: AdapterKey) -> None:
        """Unload a version everywhere; raises EngineError for one that is not loaded."""
        with self._changing:
            self._check(key)
            del self._versions[key]
        self._everywhere(lambda replica: replica.unload(key))

    def loaded(self) -> frozenset[AdapterKey]:
        """The versions that can be sampled from."""
        with self._changing:
            return frozenset(self._versions)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """Answer all requests, in their order, in batches that do not depend on the number of replicas."""
        with self._changing:
            for request in requests:
                self._check(request.adapter)
        asked = [(str(request.adapter) if request.adapter else "", len(request.prompt)) for request in requests]
        batches = cut_batches(asked, self._rows)
        self._log_few(len(requests), len(batches))
        futures = [self._samplers.submit(self._batch, [requests[place] for place in batch]) for batch in batches]
        wait(futures, return_when=FIRST_EXCEPTION)
        for future in futures:
            future.cancel()  # does nothing to those that are done or under way
        wait(futures)
        answers = _results(futures)
        return in_order(batches, answers)

    def score(self, key: AdapterKey | None, prompt: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """The log-probability of each of `tokens` after `prompt`, by the first replica."""
        with self._changing:
            self._check(key)
        return self._on(self._slots[0], lambda replica: replica.score(key, prompt, tokens))

    def verify(self, proof: Proof) -> SyncReport:
        """Every replica proves a version, also one that takes a place later; EngineError names one that cannot."""
        reports = self._everywhere(lambda replica: replica.verify(proof))
        with self._changing:
            self._check(proof.key)
            self._versions[proof.key] = replace(self._versions[proof.key], proof=proof)
        changes = [report.change for report in reports if report.change is not None]
        largest, mean = (
            max(gaps) for gaps in zip(*((each.largest_gap, each.mean_gap) for each in reports), strict=True)
        )
        return SyncReport(largest, mean, min(changes, default=None))

    def close(self) -> None:
        """End all replicas."""
        with self._changing:
            self._versions.clear()
            slots, self._slots = self._slots, []
        if slots:
            for future in [self._others.submit(slot.replica.close) for slot in slots]:
                with suppress(ReplicaLostError, EngineError):
                    future.result()
        self._samplers.shutdown(cancel_futures=True)
        self._others.shutdown()

    def _check(self, key: AdapterKey | None) -> None:
        if key is not None and key not in self._versions:
            loaded = ", ".join(sorted(map(str, self._versions))) or "none"
            raise EngineError(f"{key} is not loaded; loaded are: {loaded}")

    def _log_few(self, requests: int, batches: int) -> None:
        if 0 < batches < len(self._slots) and requests > batches and not self._few_batches_logged:
            self._few_batches_logged = True
            _log.warning(
                "replicas_idle",
                reason=f"{requests} requests make {batches} batches of at most {self._rows} rows, for "
                f"{len(self._slots)} replicas; lower [engine] rows to keep them busy",
            )

    def _batch(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        slot = self._idle.get()
        try:
            return self._on(slot, lambda replica: replica.sample(requests))
        finally:
            self._idle.put(slot)

    def _everywhere(self, call: Callable[[Replica], Result]) -> list[Result]:
        futures = [self._others.submit(self._on, slot, call) for slot in self._slots]
        wait(futures)
        return _results(futures)

    def _on(self, slot: _Slot, call: Callable[[Replica], Result]) -> Result:
        reason: ReplicaLostError | None = None
        for _ in range(_ATTEMPTS):
            replica = slot.replica
            try:
                return call(replica)
            except ReplicaLostError as error:
                reason = error
            with suppress(ReplicaLostError):  # one that dies while it starts counts like one that dies later
                self._fill(slot, replica, reason)
        raise EngineError(
            f"replica {slot.number} died {_ATTEMPTS} times in a row, the last time by: {reason}; look into its log and "
            "the memory of its machine, then go on with --resume"
        ) from reason

    def _fill(self, slot: _Slot, dead: Replica, reason: ReplicaLostError) -> None:
        """Start another replica in a slot, with all versions, unless another thread has done so."""
        with slot.lock:
            if slot.replica is not dead:
                return
            _log.warning("replica_lost", replica=slot.number, reason=str(reason)[:300])
            with suppress(ReplicaLostError, EngineError):
                dead.close()
            with self._changing:
                versions = dict(self._versions)
            slot.replica = _caught_up(self._launcher.start(slot.number), versions)
            _log.info("replica_replaced", replica=slot.number, versions=len(versions))


def _caught_up(replica: Replica, versions: Mapping[AdapterKey, _Version]) -> Replica:
    """A new replica with all versions, proved as they were on the one before."""
    try:
        for key, version in versions.items():
            _give(replica, key, version)
        for version in versions.values():
            if version.proof is not None:
                there = version.proof.previous_key in versions
                replica.verify(version.proof if there else replace(version.proof, previous_key=None))
    except BaseException:
        with suppress(ReplicaLostError, EngineError):
            replica.close()
        raise
    return replica


def _give(replica: Replica, key: AdapterKey, version: _Version) -> None:
    received = replica.load(key, version.weights)
    if received != version.digest:
        raise EngineError(f"a replica has other weights for {key}: digest {received}, expected {version.digest}")


def _results(futures: Sequence[Future[Result]]) -> list[Result]:
    """What all futures came to, or the error of the first that failed by itself."""
    failed = [future for future in futures if not future.cancelled() and future.exception() is not None]
    return [future.result() for future in failed[:1] or futures]
