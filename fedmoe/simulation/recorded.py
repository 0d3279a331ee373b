"""Workers that do not train: they replay deltas of an earlier simulation, or draw them from a seed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmoe.experts import seed_of
from fedmoe.lora.adapter import FloatArray, FloatVector, Layout, ModuleShape, initial_adapter
from fedmoe.lora.manifest import BaseModel, Manifest
from fedmoe.lora.safetensors_bytes import CodecError, encode_named, read_header, read_named
from fedmoe.simulation.config import MAX_RECORDED_PARAMETERS, RecordedWork, SimulationConfigError
from fedmoe.simulation.fleet import WorkerProfile, expert_name
from fedmoe.simulation.work import FleetWork, Learned, LocalWorker

_RANK, _MODULES = 4, 4
_DISTANCE = 0.05
_NOISE = 0.1


@dataclass(frozen=True)
class Recording:
    """Deltas of updates as they landed, float32 (count, size), and the manifest they are of."""

    manifest: Manifest
    deltas: FloatArray

    @classmethod
    def of(cls, manifest: Manifest, deltas: Sequence[FloatVector]) -> Recording:
        """Of these deltas, one at least."""
        return cls(manifest, np.stack(deltas))


def write_recording(path: Path, recording: Recording) -> None:
    """Write a recording as a safetensors file."""
    about = {"manifest": json.dumps(recording.manifest.to_json())}
    path.write_bytes(encode_named({"deltas": recording.deltas}, about))


def read_recording(path: Path) -> Recording:
    """The recording in a file; raises SimulationConfigError where it is none, or its deltas are too large."""
    try:
        data = path.read_bytes()
        manifest = Manifest.from_json(json.loads(read_header(data)[1]["manifest"]))
        deltas = read_named(data)["deltas"]
    except OSError as error:
        raise SimulationConfigError(f"work.recording: {path} cannot be read: {error.strerror}") from error
    except (CodecError, KeyError, TypeError, ValueError) as error:
        raise SimulationConfigError(
            f"work.recording: {path} is no recording ({error}); 'fedmoe simulate' writes one where workers train"
        ) from error
    if deltas.ndim != 2 or deltas.shape[1:] != (manifest.layout.size,) or not len(deltas):
        raise SimulationConfigError(
            f"work.recording: {path} holds deltas of shape {deltas.shape}, its manifest has "
            f"{manifest.layout.size} numbers"
        )
    if manifest.layout.size > MAX_RECORDED_PARAMETERS:
        raise SimulationConfigError(
            f"work.recording: deltas in {path} have {manifest.layout.size} numbers, at most "
            f"{MAX_RECORDED_PARAMETERS} are replayed; record with a smaller work.rank"
        )
    return Recording(manifest, deltas)


class _Local:
    """Local weights that `QwenWorker` would keep in its model."""

    def __init__(self, size: int) -> None:
        self._local: FloatVector = np.zeros(size, np.float32)

    def weights(self) -> FloatVector:
        return self._local.copy()

    def load(self, weights: FloatVector) -> None:
        self._local = weights.copy()

    def rebase(self, new_base: FloatVector, sent_local: FloatVector) -> None:
        self._local -= sent_local
        self._local += new_base


class ReplayWorker(_Local):
    """Adds a recorded delta, drawn anew each time, for whatever steps it is asked."""

    def __init__(self, recording: Recording, random: np.random.Generator) -> None:
        super().__init__(recording.manifest.layout.size)
        self._deltas, self._random = recording.deltas, random

    def train(self, steps: int) -> Learned:
        self._local += self._deltas[self._random.integers(len(self._deltas))]
        return Learned(steps)


class DriftWorker(_Local):
    """Goes from where it is towards an optimum of its own, a share of the way each step and a little astray."""

    def __init__(self, work: RecordedWork, layout: Layout, optimum: FloatVector, seeds: tuple[int, int]) -> None:
        super().__init__(layout.size)
        self._work, self._optimum, self._seeds = work, optimum, seeds
        self._random = np.random.default_rng([*seeds, 1])

    def train(self, steps: int) -> Learned:
        # Drawn again instead of kept: of ten thousand workers they would fill the memory.
        own = np.random.default_rng([*self._seeds, 0]).standard_normal(self._local.size, np.float32)
        target = self._optimum + np.float32(self._work.drift * _DISTANCE) * own
        stays = np.float32((1.0 - self._work.rate) ** steps)
        astray = np.float32(_NOISE * _DISTANCE * (self._work.rate * steps) ** 0.5)
        noise = self._random.standard_normal(self._local.size, np.float32)
        self._local = target + stays * (self._local - target) + astray * noise
        return Learned(steps)


class RecordedFleet(FleetWork):
    """Workers of recorded deltas, or of the seeded process where there is no recording."""

    def __init__(self, work: RecordedWork, seed: int) -> None:
        self._work, self._seed = work, seed
        self._recording = read_recording(work.recording) if work.recording is not None else None
        self._manifest = self._recording.manifest if self._recording else _manifest(work.parameters)
        self._optima: dict[int, FloatVector] = {}

    @property
    def manifest(self) -> Manifest:
        return self._manifest

    def worker(self, profile: WorkerProfile) -> LocalWorker:
        if self._recording is not None:
            return ReplayWorker(self._recording, np.random.default_rng([self._seed, profile.number, 1]))
        seeds = (self._seed, profile.number)
        return DriftWorker(self._work, self._manifest.layout, self._optimum(profile.expert), seeds)

    def loss(self, expert: int, weights: FloatVector) -> float | None:
        return None

    def _optimum(self, expert: int) -> FloatVector:
        if expert not in self._optima:
            start = initial_adapter(self._manifest.layout, self._manifest.alpha, seed_of(expert_name(expert))).flat
            way = np.random.default_rng([self._seed, expert, 2]).standard_normal(start.size, np.float32)
            self._optima[expert] = start + np.float32(_DISTANCE) * way
        return self._optima[expert]


def _manifest(parameters: int) -> Manifest:
    """Of an adapter with so many numbers, rounded down to what its shape allows."""
    features = parameters // (2 * _RANK * _MODULES)
    modules = tuple(ModuleShape(f"layers.{number}.linear", features, features) for number in range(_MODULES))
    return Manifest(BaseModel("simulated", "1", "0" * 64, "0" * 64), Layout(modules, _RANK), 2.0 * _RANK)
