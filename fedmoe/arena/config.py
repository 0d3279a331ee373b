"""The configuration of an arena run: a TOML file; an unknown key is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from fedmoe.arena.learning.config import LearningConfig, PositiveFloat, PositiveInt
from fedmoe.runtime.errors import ExpectedError
from fedmoe.runtime.toml_file import read_toml
from fedmoe.wire.contract.messages import ExpertName, WorkerName

Option = int | float | str | bool


class ArenaConfigError(ExpectedError, ValueError):
    """A configuration that cannot be used; every problem is named with its key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Phase(_Section):
    """A stretch of iterations in one mode."""

    mode: str
    iterations: PositiveInt


class TaskSection(_Section):
    """The environment. `options` are the task's own, for example a data set's settings."""

    name: str = "committee:chain_sum"
    options: dict[str, Option] = {}


class PolicySection(_Section):
    """The policies: how many, their LoRA shape and the names they get (policy_1, ... unless given)."""

    count: Annotated[int, Field(ge=1, le=64)] = 4
    names: tuple[ExpertName, ...] = ()
    rank: Annotated[int, Field(ge=1, le=512)] = 16
    alpha: PositiveFloat | None = None
    max_rank: Annotated[int, Field(ge=1, le=512)] = 64

    @model_validator(mode="after")
    def _names_fit(self) -> PolicySection:
        if self.names and not len(self.names) == len(set(self.names)) == self.count:
            raise ValueError(f"count is {self.count}, so as many different names are needed, got {list(self.names)}")
        reserved = sorted({"base", "random"} & set(self.names))
        if reserved:
            raise ValueError(f"{', '.join(reserved)} means a frozen opponent; choose another name")
        if self.max_rank < self.rank:
            raise ValueError(f"max_rank {self.max_rank} is below rank {self.rank}")
        return self

    @property
    def scaled_alpha(self) -> float:
        """alpha, or twice the rank."""
        return self.alpha if self.alpha is not None else 2.0 * self.rank

    @property
    def all_names(self) -> tuple[str, ...]:
        """One name a policy."""
        return self.names or tuple(f"policy_{number}" for number in range(1, self.count + 1))


class EvaluationSection(_Section):
    """Held-out episodes: at the start, the end of every phase, and every `every` iterations (0: not between)."""

    episodes: Annotated[int, Field(ge=2)] = 100
    every: Annotated[int, Field(ge=0)] = 0


class CheckpointSection(_Section):
    """`every` iterations (and at the end, and on SIGTERM); the newest `keep` stay."""

    every: PositiveInt = 5
    keep: PositiveInt = 3


class EpisodesSection(_Section):
    """`per_iteration` episodes of every iteration are kept to be read (0: none), the newest within `megabytes`."""

    per_iteration: Annotated[int, Field(ge=0)] = 4
    megabytes: Annotated[float, Field(gt=0, le=1 << 20)] = 16.0


class EngineSection(_Section):
    """Where rollouts are computed: `transformers`, or vLLM (a server's `url`, or `python` of its environment).

    Installed packages can offer further kinds, see `fedmoe.arena.run.engines`. With `actors` an engine of this kind
    runs in each of so many Ray actors, with `gpus_per_actor` (a share of one, or whole ones).
    """

    kind: str = "transformers"
    url: str | None = None
    python: Path | None = None
    rows: PositiveInt = 128
    actors: Annotated[int, Field(ge=0, le=1024)] = 0
    gpus_per_actor: Annotated[float, Field(ge=0, le=64)] = 0.0

    @property
    def elsewhere(self) -> bool:
        """Whether other processes have copies of the weights, which have to be compared with the learner's."""
        return self.kind != "transformers" or self.actors > 0

    @model_validator(mode="after")
    def _actors_fit(self) -> EngineSection:
        if self.gpus_per_actor and not self.actors:
            raise ValueError("gpus_per_actor is for Ray actors; set actors too")
        if self.gpus_per_actor > 1 and self.gpus_per_actor % 1:
            raise ValueError(f"gpus_per_actor is a share of one GPU or a whole number, got {self.gpus_per_actor:g}")
        if self.actors and self.kind == "vllm" and self.python is None:
            raise ValueError("each actor starts a vLLM server of its own: give python instead of url")
        return self

    @model_validator(mode="after")
    def _vllm_is_named(self) -> EngineSection:
        if self.kind == "vllm" and (self.url is None) == (self.python is None):
            raise ValueError("engine vllm needs either url (a running server) or python (of vLLM's own environment)")
        return self


class FederationSection(_Section):
    """`url` of a coordinator: every policy is an expert there; `every` iterations updates go and come."""

    url: str
    worker_id: WorkerName = "arena"
    every: PositiveInt = 5
    opponents: bool = True


class ArenaConfig(_Section):
    """Everything that decides what a run computes. Where and on what it runs are options of the command."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    base_model: str = "smollm2"
    chat_template: str | None = None
    chat_template_kwargs: dict[str, JsonValue] = {}
    phases: tuple[Phase, ...] = (Phase(mode="mixed", iterations=30),)
    task: TaskSection = TaskSection()
    policies: PolicySection = PolicySection()
    learning: LearningConfig = LearningConfig()
    evaluation: EvaluationSection = EvaluationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    episodes: EpisodesSection = EpisodesSection()
    engine: EngineSection = EngineSection()
    federation: FederationSection | None = None

    @field_validator("phases")
    @classmethod
    def _some_phase(cls, value: tuple[Phase, ...]) -> tuple[Phase, ...]:
        if not value:
            raise ValueError("at least one phase is needed, for example [[phases]] mode = 'mixed', iterations = 30")
        return value

    @property
    def iterations(self) -> int:
        """Of all phases."""
        return sum(phase.iterations for phase in self.phases)

    def phase_at(self, iteration: int) -> tuple[int, Phase]:
        """The phase that iteration (from 0) belongs to, and its index."""
        end = 0
        for index, phase in enumerate(self.phases):
            end += phase.iterations
            if iteration < end:
                return index, phase
        raise IndexError(f"the run has {self.iterations} iterations, there is no iteration {iteration}")

    def ends_phase(self, iteration: int) -> bool:
        """Whether an iteration is the last of its phase."""
        following = iteration + 1
        return following >= self.iterations or self.phase_at(following)[0] != self.phase_at(iteration)[0]


def read_config(path: Path) -> ArenaConfig:
    """The configuration in a TOML file; raises ArenaConfigError naming the file, the key and what is allowed."""
    return read_toml(path, ArenaConfig, ArenaConfigError, "demo/arena.toml")
