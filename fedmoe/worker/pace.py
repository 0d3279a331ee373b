"""The pace of training: a mean over the last steps, and how long the rest takes at it."""

from __future__ import annotations

from fedmoe.qwen_worker import StepRecord

# The weight of a new step in the mean of the last ones.
_NEW_SHARE = 0.2


class Pace:
    """How fast steps follow each other; `steps` is how many there will be in all, None without an end."""

    def __init__(self, steps: int | None = None) -> None:
        self.steps = steps
        self.newest: StepRecord | None = None
        self._seconds_a_step: float | None = None
        self._tokens_a_step = 0.0

    def add(self, record: StepRecord) -> None:
        """A step is done."""
        share = 1.0 if self._seconds_a_step is None else _NEW_SHARE
        self._seconds_a_step = share * record.seconds + (1 - share) * (self._seconds_a_step or 0.0)
        self._tokens_a_step = share * record.tokens + (1 - share) * self._tokens_a_step
        self.newest = record

    @property
    def steps_per_second(self) -> float | None:
        """None before the first step."""
        return 1.0 / self._seconds_a_step if self._seconds_a_step else None

    @property
    def tokens_per_second(self) -> float | None:
        """None before the first step."""
        return self._tokens_a_step / self._seconds_a_step if self._seconds_a_step else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step; None where there is none, and before the first."""
        if self.steps is None or self.newest is None or self._seconds_a_step is None:
            return None
        return max(0, self.steps - self.newest.step) * self._seconds_a_step
