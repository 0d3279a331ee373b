"""The `[learning]` section of a run's configuration: loss, learning rate, batch sizes, staleness."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LossConfig:
    """Which loss, and its settings: the ratio counts within [1 - `clip_low`, 1 + `clip_high`]."""

    loss: Literal["reinforce", "clipped", "decoupled"] = "decoupled"
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: PositiveFloat = 0.2


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class LearningConfig(LossConfig):
    """How policies learn: `groups` problems an iteration, `samples` episodes of each; names as in the literature.

    `epochs`: steps made from the same examples; from the second on the ratio is clipped. `warmup_steps`: the learning
    rate rises over the first steps of a policy. `micro_batch_tokens` bounds what is computed at once (gradients
    accumulate over micro-batches). `kind`: the learner, `multilora` in this process or `areal` in processes of
    `python`, the interpreter of AReaL's environment. `device`: where it trains, unless the command says so.
    """

    kind: str = "multilora"
    python: str | None = None
    device: str = "auto"
    clip_high: PositiveFloat = 0.28
    groups: PositiveInt = 8
    samples: Annotated[int, Field(ge=2)] = 8
    learning_rate: PositiveFloat = 5e-4
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 3
    epochs: PositiveInt = 1
    temperature: PositiveFloat = 1.0
    max_staleness: Annotated[int, Field(ge=0, le=8)] = 1
    adapt: bool = True
    micro_batch_tokens: Annotated[int, Field(ge=64)] = 1024
    max_prompt_tokens: Annotated[int, Field(ge=16)] = 1024
