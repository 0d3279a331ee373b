"""A fleet of replicas in this process, which can be made to die."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fedmoe.inference.engine import AdapterKey, Engine, Sample, SampleRequest, context_limit
from fedmoe.inference.fleet import ReplicaLostError
from fedmoe.inference.verify import Proof, SyncReport, verify_sync
from fedmoe.lora.adapter import FloatArray
from fedmoe.lora.codec import decode_adapter, digest


class LocalReplica:
    """A real engine; `dies_at`: the call of `sample` (from 1) in which it dies, None for never."""

    def __init__(self, engine: Engine, dies_at: int | None = None) -> None:
        self.engine = engine
        self.dies_at = dies_at
        self.dead = False
        self.samples = 0
        self.proofs: list[Proof] = []
        self.context = context_limit(engine)

    def alive(self) -> Engine:
        if self.dead:
            raise ReplicaLostError("its process is gone")
        return self.engine

    def load(self, key: AdapterKey, weights: object) -> str:
        assert isinstance(weights, bytes)
        adapter = decode_adapter(weights)
        if key not in self.alive().loaded():
            self.engine.load(key, adapter)
        return digest(adapter)

    def unload(self, key: AdapterKey) -> None:
        if key in self.alive().loaded():
            self.engine.unload(key)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        self.samples += 1
        self.dead = self.dead or self.samples == self.dies_at
        return self.alive().sample(requests)

    def score(self, key: AdapterKey | None, prompt: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        return self.alive().score(key, prompt, tokens)

    def verify(self, proof: Proof) -> SyncReport:
        self.proofs.append(proof)
        return verify_sync(
            self.alive(), proof.reference_scores, proof.key, proof.probes, proof.tolerance, proof.previous_key
        )

    def close(self) -> None:
        self.engine.close()


@dataclass
class LocalLauncher:
    """Makes replicas; `deaths`: for each replica made, in order, the sample in which it dies."""

    make: Callable[[], Engine]
    deaths: Sequence[int | None] = ()
    made: list[LocalReplica] = field(default_factory=list)
    stored: list[bytes] = field(default_factory=list)

    def start(self, number: int) -> LocalReplica:
        count = len(self.made)
        self.made.append(LocalReplica(self.make(), self.deaths[count] if count < len(self.deaths) else None))
        return self.made[-1]

    def store(self, data: bytes) -> object:
        self.stored.append(data)
        return data
