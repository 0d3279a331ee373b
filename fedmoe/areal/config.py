"""The configuration of an AReaL learner: base model, adapter, optimizer, loss."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fedmoe.arena.learning.config import LossConfig
from fedmoe.models.identity import BaseModelError, checkpoint_files
from fedmoe.runtime.errors import ExpectedError

ALL_LINEAR = "all-linear"
# The losses and aggregations that AReaL's PPO actor computes, or computes once advantages are scaled.
_LOSSES = ("decoupled",)
_AGGREGATIONS = ("token_mean", "sequence_mean")
_CONFIG_FILES = ("config.json", "tokenizer_config.json")


class ArealError(ExpectedError, RuntimeError):
    """A learner or workflow on AReaL that cannot go on; says what was got and what to do."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """The adapter's shape: `target_modules` are last parts of module names, or `all-linear`; `alpha` is whole."""

    rank: int = 8
    alpha: int = 16
    target_modules: tuple[str, ...] = (ALL_LINEAR,)

    def __post_init__(self) -> None:
        for name in ("rank", "alpha"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArealError(f"{name} must be a whole number from 1 on (AReaL takes no other), got {value!r}")
        if not self.target_modules or not all(self.target_modules):
            raise ArealError(f"target_modules must name modules or {ALL_LINEAR}, got {self.target_modules}")
        if ALL_LINEAR in self.target_modules and len(self.target_modules) > 1:
            raise ArealError(f"{ALL_LINEAR} stands alone, got {self.target_modules}")


@dataclass(frozen=True, slots=True)
class AdamSettings:
    """AdamW with a constant learning rate; a gradient longer than `gradient_clipping` is scaled down to it."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0
    gradient_clipping: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ArealError(f"learning_rate must be a positive number, got {self.learning_rate}")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ArealError(f"beta1 and beta2 must lie in [0, 1), got {self.beta1} and {self.beta2}")
        if not (self.epsilon > 0 and self.weight_decay >= 0 and self.gradient_clipping > 0):
            raise ArealError(
                "epsilon and gradient_clipping must be positive and weight_decay at least 0, got "
                f"{self.epsilon}, {self.gradient_clipping}, {self.weight_decay}"
            )


@dataclass(frozen=True, slots=True)
class ArealConfig:
    """One learner. `base_folder` is a checkpoint folder (`fedmoe.models.base.prepare_base` gives one).

    `temperature`: that of the rollouts; log-probabilities are computed at it. `epochs`: how often an update goes
    through its examples; `minibatches`: optimizer steps each time. `tokens_per_micro_batch`: sequences packed into one
    forward pass, None for one sequence at a time. `seed`: of the random factor A of a new adapter.
    """

    base_folder: str
    lora: LoraSettings = field(default_factory=LoraSettings)
    optimizer: AdamSettings = field(default_factory=AdamSettings)
    loss: LossConfig = field(default_factory=LossConfig)
    temperature: float = 1.0
    epochs: int = 1
    minibatches: int = 1
    tokens_per_micro_batch: int | None = 512
    seed: int = 0

    def __post_init__(self) -> None:
        _check_loss(self.loss)
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ArealError(f"temperature must be a positive number, got {self.temperature}")
        if self.epochs < 1 or self.minibatches < 1:
            raise ArealError(f"epochs and minibatches must be at least 1, got {self.epochs} and {self.minibatches}")
        if self.tokens_per_micro_batch is not None and self.tokens_per_micro_batch < 1:
            raise ArealError(f"tokens_per_micro_batch must be at least 1 or None, got {self.tokens_per_micro_batch}")

    def as_json(self) -> str:
        """The configuration as one JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ArealConfig:
        """The configuration that `as_json` wrote; raises `ArealError` for anything else."""
        try:
            values = dict(json.loads(text))
            lora = dict(values.pop("lora"))
            lora["target_modules"] = tuple(lora["target_modules"])
            return cls(
                lora=LoraSettings(**lora),
                optimizer=AdamSettings(**values.pop("optimizer")),
                loss=LossConfig(**values.pop("loss")),
                **values,
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ArealError(f"not the configuration of an AReaL learner: {error}") from error


def _check_loss(loss: LossConfig) -> None:
    if loss.loss not in _LOSSES:
        raise ArealError(f"the AReaL learner computes the loss {', '.join(_LOSSES)}; got {loss.loss!r}")
    if loss.aggregation not in _AGGREGATIONS:
        raise ArealError(f"the AReaL learner aggregates by {', '.join(_AGGREGATIONS)}; got {loss.aggregation!r}")


def check_base_folder(folder: Path) -> None:
    """Refuse a base model folder that is incomplete, pickled, or brings code of its own, with ArealError.

    AReaL loads models with `trust_remote_code=True`; a folder with an `auto_map` would run its code here.
    """
    for name in _CONFIG_FILES:
        file = folder / name
        if not file.is_file():
            raise ArealError(f"{file} is missing; give the folder of a base model (prepare_base makes one)")
        if "auto_map" in _json_object(file):
            raise ArealError(f"{file} has an auto_map: the model brings code of its own, and AReaL would run it")
    try:
        checkpoint_files(folder)
    except BaseModelError as error:
        raise ArealError(str(error)) from error


def _json_object(file: Path) -> Mapping[str, object]:
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (ValueError, TypeError) as error:
        raise ArealError(f"{file} is not a JSON object: {error}") from error
