"""Arenas on the tiny model: configurations of a few seconds, a trainer with everything around it, and what it wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from letters import LettersTask

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.learning.learner import Learner
from fedmoe.arena.learning.policies import Policies
from fedmoe.arena.rollout.chat import ChatCodec
from fedmoe.arena.trainer import Trainer
from fedmoe.inference.engine import AdapterKey, Sample, SampleRequest
from fedmoe.inference.transformers_engine import TransformersEngine
from fedmoe.lora.adapter import Adapter, initial_adapter
from fedmoe.models.base import load_base
from fedmoe.models.multilora import MultiLora
from fedmoe.runtime.records import Record, RecordValue, read_records

NAMES = ("ann", "bob", "cy", "dee")
#: Fields that say when or how fast, and differ from run to run.
TIMES = (
    *("at", "efficiency_second", "utilisation", "rollout_seconds", "learn_seconds", "iteration_seconds"),
    "tokens_per_second",
)


def tiny_config(
    phases: Sequence[tuple[str, int]] = (("competitive", 4),), names: Sequence[str] = NAMES, **learning: object
) -> ArenaConfig:
    """Four policies of rank 2 on the tiny model; a few milliseconds an iteration."""
    return ArenaConfig.model_validate(
        {
            "seed": 3,
            "base_model": "tiny",
            "phases": [{"mode": mode, "iterations": iterations} for mode, iterations in phases],
            "task": {"name": "test:letters"},
            "policies": {"count": len(names), "names": list(names), "rank": 2, "max_rank": 4},
            "learning": {"groups": 2, "samples": 4, "learning_rate": 0.02, "warmup_steps": 1, "adapt": False}
            | learning,
            "evaluation": {"episodes": 6},
            "checkpoint": {"every": 2, "keep": 2},
        }
    )


def write_config(path: Path, config: ArenaConfig) -> Path:
    """The configuration as a file; keys that are not set are left out."""
    values = config.model_dump(mode="json", exclude_none=True)
    phases = values.pop("phases")
    sections = {name: values.pop(name) for name in list(values) if isinstance(values[name], dict)}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    for name, section in sections.items():
        plain = {key: value for key, value in section.items() if not isinstance(value, dict)}
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in plain.items())]
        for key in section.keys() - plain.keys():
            lines += [f"[{name}.{key}]", *(f"{inner} = {json.dumps(value)}" for inner, value in section[key].items())]
    for phase in phases:
        lines += ["[[phases]]", *(f"{key} = {json.dumps(value)}" for key, value in phase.items())]
    path.write_text("\n".join(lines) + "\n")
    return path


@dataclass
class Kept:
    """Takes records and keeps them."""

    records: list[dict[str, RecordValue]] = field(default_factory=list)

    def write(self, kind: str, **values: RecordValue) -> None:
        self.records.append({"kind": kind, **values})

    def close(self) -> None:
        """Nothing to release."""

    def of(self, kind: str) -> list[dict[str, RecordValue]]:
        return [record for record in self.records if record["kind"] == kind]


class WatchedEngine(TransformersEngine):
    """Remembers what it was asked and every adapter it ever held."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.asked: list[list[SampleRequest]] = []
        self.held: dict[AdapterKey, Adapter] = {}

    def load(self, key: AdapterKey, adapter: Adapter) -> None:
        assert key not in self.held, "a version is never used again"
        self.held[key] = adapter
        super().load(key, adapter)

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        self.asked.append(list(requests))
        return super().sample(requests)

    def versions(self, name: str) -> list[int]:
        """Which version of a policy each batch was sampled with."""
        found = [
            {one.adapter.version for one in batch if one.adapter and one.adapter.name == name} for batch in self.asked
        ]
        assert all(len(versions) <= 1 for versions in found)
        return [version for versions in found for version in versions]


@dataclass
class Arena:
    """A trainer and what it works with."""

    trainer: Trainer
    policies: Policies
    engine: WatchedEngine
    multi: MultiLora
    kept: Kept

    def iterate(self, count: int = 1) -> None:
        """Iterations with what a run does at the end of a phase."""
        for _ in range(count):
            self.trainer.iterate()
            if self.trainer.at_phase_end:
                self.trainer.end_phase()


@contextmanager
def opened(config: ArenaConfig, task: LettersTask | None = None) -> Iterator[Arena]:
    """A fresh arena, closed afterwards."""
    base = load_base("tiny", "cpu", "fp32")
    multi = MultiLora(base.model)
    engine = WatchedEngine(base, multi)
    learning = config.learning
    learner = Learner(base, multi, learning)
    policies = Policies(learner, engine, learning.max_staleness, None)
    kept = Kept()
    found = task or LettersTask()
    trainer = Trainer(config, found, policies, engine, ChatCodec(base.tokenizer), kept)
    try:
        for index, name in enumerate(config.policies.all_names):
            policies.add(name, initial_adapter(multi.layout(config.policies.rank), 4.0, index))
        yield Arena(trainer, policies, engine, multi, kept)
    finally:
        trainer.close()
        engine.close()


def records_of(folder: Path) -> list[Record]:
    """The records of a run."""
    return list(read_records(folder / "metrics.jsonl"))


def curve(folder: Path) -> list[Record]:
    """The records that must be the same in every run of the same configuration, without times and loads."""
    return [timeless(record) for record in records_of(folder) if record["kind"] != "system"]


def timeless(record: Mapping[str, RecordValue]) -> Record:
    return {name: value for name, value in record.items() if name not in TIMES}
