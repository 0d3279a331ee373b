"""The configuration of a simulation: a TOML file; an unknown key is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedmoe.federation.aggregation import HOLD_NORM, Aggregation
from fedmoe.lora.codec import WireDtype
from fedmoe.runtime.errors import ExpectedError
from fedmoe.runtime.toml_file import read_toml

#: Numbers in a recorded delta: so many that its coding costs what a real one's does, so few that 10,000 fit in memory.
MAX_RECORDED_PARAMETERS = 10_000
#: Each of these workers has a model of its own.
MAX_TRAINING_WORKERS = 200

Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Megabits = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Factor = Annotated[float, Field(ge=1, le=1e4, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class SimulationConfigError(ExpectedError, ValueError):
    """A configuration that cannot be used; every problem is named with its key."""


class _SimulationSection(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RecordedWork(_SimulationSection):
    """Deltas without training: of a `recording` that a training simulation left, or of a seeded process.

    The process: every expert has an optimum, every worker one of its own `drift` away from it, and each step goes the
    share `rate` of the way there and a little astray. Its distances are no losses, and no report shows them as such.
    """

    kind: Literal["recorded"] = "recorded"
    recording: Path | None = None
    parameters: Annotated[int, Field(ge=32, le=MAX_RECORDED_PARAMETERS)] = 8192
    drift: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] = 0.5
    rate: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.02


class TrainingWork(_SimulationSection):
    """Workers that really train the tiny model on texts of their own, and a held-out loss.

    Every expert has its own topics; `concentration` is the parameter of the Dirichlet distribution from which a
    worker's mix of them is drawn: the smaller, the less its texts are like those of others.
    """

    kind: Literal["training"] = "training"
    rank: Annotated[int, Field(ge=1, le=16)] = 4
    learning_rate: Positive = 5e-3
    batch_size: Annotated[int, Field(ge=1, le=64)] = 1
    block_length: Annotated[int, Field(ge=16, le=512)] = 64
    texts: Annotated[int, Field(ge=4, le=10_000)] = 48
    topics: Annotated[int, Field(ge=1, le=64)] = 4
    concentration: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 0.5
    evaluate_every: Seconds = 60.0
    held_out_texts: Annotated[int, Field(ge=4, le=10_000)] = 48


class Outages(_SimulationSection):
    """Times when a worker is off: it neither trains nor sends, and what it was sending begins anew afterwards.

    `every` is the mean time from one's end to the next one's start, `length` the mean length, both exponential.
    """

    every: Seconds
    length: Seconds


class Churn(_SimulationSection):
    """Shares of the workers that come late or leave for good, each at a moment drawn from the whole run."""

    joining: Share = 0.0
    leaving: Share = 0.0


class Fleet(_SimulationSection):
    """The workers: how many, how fast, on which links, and when they are there.

    A step takes `step_seconds` times the worker's slowness; the workers of an expert take those of `slowness` in turn.
    Rates of links are drawn between two bounds, evenly on a logarithmic scale. Workers come within the first
    `start_within` seconds.
    """

    workers: Annotated[int, Field(ge=1, le=100_000)] = 100
    experts: Annotated[int, Field(ge=1, le=1024)] = 1
    step_seconds: Seconds = 1.0
    slowness: Annotated[tuple[Factor, ...], Field(min_length=1)] = (1.0,)
    up_mbit: tuple[Megabits, Megabits] = (10.0, 10.0)
    down_mbit: tuple[Megabits, Megabits] = (50.0, 50.0)
    start_within: Annotated[float, Field(ge=0, le=1e9, allow_inf_nan=False)] = 0.0
    latency_ms: Annotated[float, Field(ge=0, le=60_000, allow_inf_nan=False)] = 40.0
    outages: Outages | None = None
    churn: Churn = Churn()

    @field_validator("up_mbit", "down_mbit")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[0] > value[1]:
            raise ValueError(f"the lower bound comes first, got {list(value)}")
        return value

    @model_validator(mode="after")
    def _workers_for_every_expert(self) -> Fleet:
        if self.workers < self.experts:
            raise ValueError(f"{self.experts} experts need at least as many workers, got {self.workers}")
        return self

    @property
    def ideal(self) -> Fleet:
        """The same fleet with equal speeds, always there: what robustness is measured against."""
        return self.model_copy(update={"slowness": (min(self.slowness),), "outages": None, "churn": Churn()})


class _Scheme(_SimulationSection):
    name: Annotated[str, Field(min_length=1, max_length=60)]
    wire_dtype: WireDtype = "fp32"
    server_learning_rate: Positive = 1.0
    server_optimizer: str = "sgd"


class AsynchronousScheme(_Scheme):
    """FedMoE's own: workers push every `sync_interval` seconds, and nobody waits for another."""

    kind: Literal["asynchronous"] = "asynchronous"
    sync_interval: Seconds = 10.0
    staleness: str = "polynomial"
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    buffer_size: Annotated[int, Field(ge=1, le=1024)] = 1
    clip_norm: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    hold_norm: Annotated[float, Field(ge=0, allow_inf_nan=False)] = HOLD_NORM

    @model_validator(mode="after")
    def _aggregates(self) -> AsynchronousScheme:
        self.aggregation()
        return self

    def aggregation(self) -> Aggregation:
        """The settings of its coordinator; raises ValueError for a name that is not known."""
        return Aggregation(
            server_learning_rate=self.server_learning_rate,
            staleness=self.staleness,
            max_staleness=self.max_staleness,
            server_optimizer=self.server_optimizer,
            buffer_size=self.buffer_size,
            clip_norm=self.clip_norm,
            hold_norm=self.hold_norm,
        )


class RoundScheme(_Scheme):
    """Synchronous federated averaging: a cohort of an expert's workers trains, all of it is waited for, and averaged.

    `cohort` is the share of the workers that are there, `local_steps` how many steps each takes in a round. After
    `deadline` seconds, or with the first update after that, a round ends without those who are late.
    """

    kind: Literal["rounds"]
    cohort: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 1.0
    local_steps: Annotated[int, Field(ge=1, le=100_000)] = 10
    deadline: Seconds | None = None

    @model_validator(mode="after")
    def _aggregates(self) -> RoundScheme:
        self.aggregation()
        return self

    def aggregation(self) -> Aggregation:
        """The settings of its coordinator: a mean is one update, fresh, whatever its norm."""
        return Aggregation(
            server_learning_rate=self.server_learning_rate, server_optimizer=self.server_optimizer, hold_norm=0.0
        )


Work = Annotated[RecordedWork | TrainingWork, Field(discriminator="kind")]
Scheme = Annotated[AsynchronousScheme | RoundScheme, Field(discriminator="kind")]


class ReportSection(_SimulationSection):
    """What schemes are compared by.

    The target is the loss that keeps the share `target` of the gain that the scheme `baseline` (by default the first)
    makes in the whole run. Budgets default to a third of the run, and to the traffic of the scheme that has least.
    The schemes that `robustness` names also run on workers of equal speed that are always there.
    """

    baseline: str | None = None
    target: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] = 0.95
    budget_seconds: Seconds | None = None
    budget_megabytes: Positive | None = None
    robustness: tuple[str, ...] = ()


class SimulationConfig(_SimulationSection):
    """Everything that decides what a simulation gives; `seconds` are those of the virtual clock.

    `updates_per_second` is what the coordinator can take, one after another; none sets no limit.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    seconds: Seconds = 600.0
    updates_per_second: Positive | None = None
    work: Work = RecordedWork()
    fleet: Fleet = Fleet()
    schemes: Annotated[tuple[Scheme, ...], Field(min_length=1)] = (AsynchronousScheme(name="asynchronous"),)
    report: ReportSection = ReportSection()

    @model_validator(mode="after")
    def _fits_together(self) -> SimulationConfig:
        names = [scheme.name for scheme in self.schemes]
        if len(set(names)) != len(names):
            raise ValueError(f"every scheme needs a name of its own, got {names}")
        baseline = () if self.report.baseline is None else (self.report.baseline,)
        for key, chosen in (("baseline", baseline), ("robustness", self.report.robustness)):
            if unknown := [name for name in chosen if name not in names]:
                raise ValueError(f"report.{key} names no scheme: {unknown[0]!r}; there are {names}")
        if self.work.kind == "training" and self.fleet.workers > MAX_TRAINING_WORKERS:
            raise ValueError(
                f"fleet.workers is {self.fleet.workers}, but at most {MAX_TRAINING_WORKERS} can train; "
                'set work.kind = "recorded" for more'
            )
        return self

    @property
    def baseline(self) -> str:
        """The name of the scheme that others are compared with."""
        return self.report.baseline or self.schemes[0].name


def read_config(path: Path) -> SimulationConfig:
    """The configuration in a TOML file; raises SimulationConfigError naming the file, the key and what is allowed."""
    return read_toml(path, SimulationConfig, SimulationConfigError, "demo/simulation.toml")
