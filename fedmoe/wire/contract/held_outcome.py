"""The outcome of a held update, as its sender is told."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class HeldOutcome(BaseModel):
    """Number and outcome of a held update: `held` still, `released` as `version`, or `rejected` with a reason."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    held: int
    sequence: int
    status: Literal["held", "released", "rejected"]
    version: int | None = None
    reason: str = ""
