"""The configuration of an AReaL learner: base model, adapter, optimizer, loss."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from fedmoe.arena.learning.config import LossConfig, PositiveFloat, PositiveInt
from fedmoe.models.identity import BaseModelError, checkpoint_files
from fedmoe.runtime.errors import ExpectedError

_CONFIG_FILES = ("config.json", "tokenizer_config.json")


class ArealError(ExpectedError, RuntimeError):
    """A learner or workflow on AReaL that cannot go on; says what was got and what to do."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class ArealConfig:
    """One learner. `base_folder` is a checkpoint folder (`fedmoe.models.base.prepare_base` gives one).

    The adapter is one of all linear modules. The learning rate is constant; a gradient longer than `max_grad_norm` is
    scaled down to it. `temperature`: that of the rollouts; log-probabilities are computed at it. `epochs`: how often an
    update goes through its examples, with one optimizer step each. `tokens_per_micro_batch`: sequences packed into one
    forward pass, None for one sequence at a time. `seed`: of the random factor A of a new adapter.
    """

    base_folder: str
    rank: PositiveInt = 8
    alpha: PositiveInt = 16
    learning_rate: PositiveFloat = 1e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    loss: LossConfig = LossConfig()
    temperature: PositiveFloat = 1.0
    epochs: PositiveInt = 1
    tokens_per_micro_batch: PositiveInt | None = 512
    seed: int = 0

    def __post_init__(self) -> None:
        # What AReaL's PPO actor computes, or computes once advantages are scaled.
        if self.loss.loss != "decoupled":
            raise ArealError(f"the AReaL learner computes the loss decoupled; got {self.loss.loss!r}")
        if self.loss.aggregation == "constant":
            raise ArealError("the AReaL learner aggregates by token_mean, sequence_mean; got 'constant'")

    def as_json(self) -> str:
        """The configuration as one JSON object."""
        return _JSON.dump_json(self).decode()

    @classmethod
    def from_json(cls, text: str) -> ArealConfig:
        """The configuration that `as_json` wrote; raises `ArealError` for anything else."""
        try:
            return _JSON.validate_json(text)
        except ValidationError as error:
            raise ArealError(f"not the configuration of an AReaL learner: {error}") from error


_JSON = TypeAdapter(ArealConfig)


def check_base_folder(folder: Path) -> None:
    """Refuse a base model folder that is incomplete, pickled, or brings code of its own, with ArealError.

    AReaL loads models with `trust_remote_code=True`; a folder with an `auto_map` would run its code here.
    """
    for name in _CONFIG_FILES:
        file = folder / name
        if not file.is_file():
            raise ArealError(f"{file} is missing; give the folder of a base model (prepare_base makes one)")
        try:
            settings: Mapping[str, object] = dict(json.loads(file.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise ArealError(f"{file} is not a JSON object: {error}") from error
        if "auto_map" in settings:
            raise ArealError(f"{file} has an auto_map: the model brings code of its own, and AReaL would run it")
    try:
        checkpoint_files(folder)
    except BaseModelError as error:
        raise ArealError(str(error)) from error
