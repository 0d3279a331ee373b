"""Held-out loss during training: when it is measured, on which blocks, and when it ends the training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedmoe.datasets.tokens.packing import Block

#: Blocks of one measurement hold at most so many tokens: bounded by work, and the same blocks on every machine.
MAX_EVALUATION_TOKENS = 16_384


@dataclass(frozen=True, eq=False)
class HeldOutPlan:
    """The held-out blocks of a worker and when their loss is measured; names as in Hugging Face's TrainingArguments.

    `blocks` are measured before the first step, every `eval_steps` steps and after the last. `patience` measurements
    in a row of which none is below the lowest so far by more than `threshold` (nats) end the training; None never
    does. `digest` names the content of the blocks.
    """

    blocks: Sequence[Block]
    digest: str
    eval_steps: int = 50
    patience: int | None = None
    threshold: float = 0.0

    def due(self, state: HeldOutState, step: int, last: bool) -> bool:
        """Whether the loss is to be measured after step `step`, which is the `last` one or not."""
        return step != state.step and (state.step is None or last or step % self.eval_steps == 0)

    def exhausted(self, state: HeldOutState) -> bool:
        """Whether the patience is over."""
        return self.patience is not None and state.worse >= self.patience


@dataclass(frozen=True, slots=True)
class HeldOutState:
    """The losses so far, on blocks named by `digest`: the newest and its step, the first and the lowest.

    `worse` counts the measurements in a row that were no improvement.
    """

    digest: str = ""
    step: int | None = None
    loss: float = math.nan
    first: float = math.nan
    best: float = math.inf
    worse: int = 0

    def after(self, step: int, loss: float, threshold: float) -> HeldOutState:
        """With one more measurement; a loss that is no number is no improvement.

        As Hugging Face's EarlyStoppingCallback counts: the lowest loss goes down with every lower one, the count
        starts anew only with one that is lower by more than `threshold`.
        """
        improved = self.step is None or self.best - loss > threshold
        return replace(
            self,
            step=step,
            loss=loss,
            first=loss if self.step is None else self.first,
            best=min(self.best, loss) if math.isfinite(loss) else self.best,
            worse=0 if improved else self.worse + 1,
        )

    def to_json(self) -> dict[str, object]:
        """For a checkpoint; floats as hexadecimal text, which keeps every bit."""
        floats = {name: getattr(self, name).hex() for name in ("loss", "first", "best")}
        return {"digest": self.digest, "step": self.step, "worse": self.worse, **floats}

    @classmethod
    def of(cls, saved: Mapping[str, object], digest: str) -> HeldOutState:
        """The state in a checkpoint; empty where it was measured on other blocks, whose losses cannot be compared."""
        step = saved.get("step")
        if saved.get("digest") != digest or step is None:
            return cls(digest)
        loss, first, best = (float.fromhex(str(saved[name])) for name in ("loss", "first", "best"))
        return cls(digest, int(str(step)), loss, first, best, int(str(saved["worse"])))


def first_blocks(blocks: Sequence[Block], most_tokens: int = MAX_EVALUATION_TOKENS) -> Sequence[Block]:
    """The first blocks, of at most `most_tokens` tokens together with their padding, at least one."""
    return blocks[: max(1, most_tokens // len(blocks[0].input_ids))] if blocks else blocks
