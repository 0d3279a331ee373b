"""Rollouts by Ray actors: each has the base model and an engine of its own, the learner stays in this process.

The weights of a version go once into Ray's object store, as safetensors. Everything else that travels (prompts, tokens,
log-probabilities) are arguments and answers of calls inside the cluster; nothing of it is ever stored.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedmoe import __version__
from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.run.engines import make_engine
from fedmoe.arena.run.ray_cluster import ActorNeeds, gpus_beside, ray_cluster, reserved
from fedmoe.inference.engine import AdapterKey, Engine, EngineError, Sample, SampleRequest, context_limit
from fedmoe.inference.fleet import FleetEngine, ReplicaLostError
from fedmoe.inference.verify import Proof, SyncReport, verify_sync
from fedmoe.lora.adapter import FloatArray
from fedmoe.lora.codec import decode_adapter, digest
from fedmoe.models.base import ChatTemplate, LoadedBase, load_base
from fedmoe.models.multilora import MultiLora
from fedmoe.runtime.device import DTYPES, pin_threads

#: To load a base model, or to start a vLLM server with it.
_OPEN_SECONDS = 1800.0
_CLOSE_SECONDS = 60.0


@dataclass(frozen=True)
class ActorReport:
    """What an actor is: its version of this package, its base model and how much that takes."""

    version: str
    weights_hash: str
    tokenizer_hash: str
    context: int | None


class RolloutActor:
    """An engine in a process of a Ray cluster; every method is one call."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._engine: Engine | None = None

    def open(self, config: str, device: str, dtype: str, threads: int) -> ActorReport:
        """Load the base model and make the engine of a configuration (JSON)."""
        pin_threads(threads)
        settings = ArenaConfig.model_validate_json(config)
        chat = ChatTemplate.from_options(settings.chat_template, settings.chat_template_kwargs)
        # Another engine than ours has a model of its own: here only its tokenizer is needed.
        base = load_base(settings.base_model, device if settings.engine.kind == "transformers" else "cpu", dtype, chat)
        folder = Path(self._stack.enter_context(TemporaryDirectory(prefix="fedmoe-rollouts-")))
        (folder / "logs").mkdir()
        made = make_engine(settings, folder, base, MultiLora(base.model), base.device)
        self._engine = self._stack.enter_context(made)
        identity = base.identity
        return ActorReport(__version__, identity.weights_hash, identity.tokenizer_hash, context_limit(self._engine))

    @property
    def engine(self) -> Engine:
        """The engine, once it is open."""
        assert self._engine is not None, "open() comes first"
        return self._engine

    def load(self, key: AdapterKey, weights: bytes) -> str:
        """Make a version available that is not there yet; returns the digest of its adapter."""
        adapter = decode_adapter(weights)
        if key not in self.engine.loaded():
            self.engine.load(key, adapter)
        return digest(adapter)

    def unload(self, key: AdapterKey) -> None:
        """Unload a version that is there."""
        if key in self.engine.loaded():
            self.engine.unload(key)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        """Answer one batch."""
        return self.engine.sample(requests)

    def score(self, key: AdapterKey | None, prompt: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        """The log-probability of each of `tokens` after `prompt`."""
        return self.engine.score(key, prompt, tokens)

    def verify(self, proof: Proof) -> SyncReport:
        """Compare with the trainer's log-probabilities."""
        return verify_sync(
            self.engine, proof.reference_scores, proof.key, proof.probes, proof.tolerance, proof.previous_key
        )

    def close(self) -> None:
        """Close the engine."""
        self._stack.close()


class RayReplica:
    """A `Replica` that is a rollout actor."""

    def __init__(self, ray: Any, handle: Any, number: int) -> None:
        self._ray, self._handle, self._number = ray, handle, number
        self.context: int | None = None

    def open(self, config: str, device: str, dtype: str, threads: int) -> ActorReport:
        """Load model and engine there."""
        report: ActorReport = self._call("open", config, device, dtype, threads, seconds=_OPEN_SECONDS)
        self.context = report.context
        return report

    def load(self, key: AdapterKey, weights: object) -> str:
        return str(self._call("load", key, weights))

    def unload(self, key: AdapterKey) -> None:
        self._call("unload", key)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        samples: list[Sample] = self._call("sample", list(requests))
        # Arrays that Ray gives back cannot be written to, as PyTorch would have them.
        return [replace(sample, logprobs=sample.logprobs.copy()) for sample in samples]

    def score(self, key: AdapterKey | None, prompt: Sequence[int], tokens: Sequence[int]) -> FloatArray:
        scores: FloatArray = self._call("score", key, tuple(prompt), tuple(tokens))
        return scores.copy()

    def verify(self, proof: Proof) -> SyncReport:
        report: SyncReport = self._call("verify", proof)
        return report

    def close(self) -> None:
        try:
            self._call("close", seconds=_CLOSE_SECONDS)
        finally:
            self._ray.kill(self._handle)

    def _call(self, method: str, *arguments: object, seconds: float | None = None) -> Any:
        errors = self._ray.exceptions
        try:
            return self._ray.get(getattr(self._handle, method).remote(*arguments), timeout=seconds)
        except errors.RayTaskError as error:  # what our own code there raised
            raise EngineError(f"rollout actor {self._number}: {error.cause}") from error
        except errors.GetTimeoutError as error:
            raise EngineError(f"rollout actor {self._number} did not {method} within {seconds:g} s") from error
        except errors.RayError as error:
            raise ReplicaLostError(f"rollout actor {self._number}: {' '.join(str(error).split())}") from error


class RayLauncher:
    """A `Launcher` that starts actors in the places of a placement group."""

    def __init__(self, ray: Any, group: Any, needs: ActorNeeds, config: ArenaConfig, base: LoadedBase) -> None:
        self._ray, self._group, self._needs, self._base = ray, group, needs, base
        engine = config.engine.model_copy(update={"actors": 0, "gpus_per_actor": 0.0})
        self._config = config.model_copy(update={"engine": engine}).model_dump_json()
        self._dtype = next(name for name, dtype in DTYPES.items() if dtype == base.dtype)
        self._actor = ray.remote(RolloutActor)

    def start(self, number: int) -> RayReplica:
        """The actor of this place, once its model is loaded; EngineError where it has another model or version."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
        needs = self._needs
        handle = self._actor.options(num_cpus=needs.cpus, num_gpus=needs.gpus, scheduling_strategy=place).remote()
        replica = RayReplica(self._ray, handle, number)
        try:
            # Ray shows an actor its own GPUs only.
            report = replica.open(self._config, "cuda:0" if needs.gpus else "cpu", self._dtype, needs.cpus)
            identity = self._base.identity
            wanted = (__version__, identity.weights_hash, identity.tokenizer_hash)
            got = (report.version, report.weights_hash, report.tokenizer_hash)
            if got != wanted:
                raise EngineError(
                    f"rollout actor {number} has other software or another base model (version, hashes): {got}, the "
                    f"learner has {wanted}; install the same on every node"
                )
        except BaseException:
            self._ray.kill(handle)
            raise
        return replica

    def store(self, data: bytes) -> object:
        """Put weights into the object store; they go with the last reference."""
        reference: object = self._ray.put(data)
        return reference


def rollout_engine(
    config: ArenaConfig,
    folder: Path,
    base: LoadedBase,
    multi: MultiLora,
    device: torch.device,
    ray_address: str | None = None,
) -> AbstractContextManager[Engine]:
    """The engine of a configuration: in this process or on one server (see `make_engine`), or Ray actors."""
    if not config.engine.actors:
        return make_engine(config, folder, base, multi, device)
    return _actors(config, base, ray_address)


@contextmanager
def _actors(config: ArenaConfig, base: LoadedBase, ray_address: str | None) -> Iterator[Engine]:
    needs = ActorNeeds(config.engine.actors, _threads(), config.engine.gpus_per_actor)
    with ray_cluster(ray_address, needs, _local_gpus(base.device)) as ray, reserved(ray, needs) as group:
        engine = FleetEngine(RayLauncher(ray, group, needs, config, base), needs.actors, config.engine.rows)
        try:
            yield engine
        finally:
            engine.close()


def _threads() -> int:
    """With which an actor computes: OMP_NUM_THREADS, else one; not what the node has, so that all compute alike."""
    return pin_threads() if os.environ.get("OMP_NUM_THREADS") else 1


def _local_gpus(learner: torch.device) -> list[str]:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")[:count]
    return gpus_beside(learner.index if learner.type == "cuda" else None, visible)
