"""What a mode is: it forms seats, and turns outcomes into rewards and advantages. The trainer knows nothing of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fedmoe.arena.modes.credit import SeatCredit
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.population.pbt import Replacement
from fedmoe.arena.rollout.episodes import EpisodePlan, Example, PlayedEpisode, Player
from fedmoe.arena.tasks.task import Task
from fedmoe.runtime.errors import ExpectedError


class ModeError(ExpectedError, ValueError):
    """A mode that cannot be played on this task or with these policies."""


@dataclass(frozen=True)
class PlanInputs:
    """What one iteration has to play with.

    `groups` groups of `samples` episodes each; episodes of a group share seed and line-up. Seeds of tasks are drawn
    from `rng`, which is made anew from the run's seed and the iteration, so planning again gives the same plan.
    """

    iteration: int
    task: Task
    policies: tuple[Player, ...]
    groups: int
    samples: int
    rng: np.random.Generator

    @property
    def names(self) -> tuple[str, ...]:
        """The learning policies."""
        return tuple(player.name for player in self.policies)

    def player(self, name: str) -> Player:
        """The policy of that name at its present version."""
        return next(player for player in self.policies if player.name == name)


@dataclass(frozen=True, slots=True)
class ArenaDecision:
    """Something a mode decided, with the numbers in its reason: `what` is strategy, replace, mode or budget."""

    what: str
    policy: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True)
class SeatResult:
    """What one seat of one episode earned.

    `turn_rewards`: of each of its actions, where the task scores them one by one; else empty, and every action gets
    `advantage`. `turn_advantages` goes with it.
    """

    policy: str
    episode: int
    seat: int
    credit: SeatCredit
    advantage: float = 0.0
    turn_rewards: tuple[float, ...] = ()
    turn_advantages: tuple[float, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """What a batch of episodes means: what to learn from, who earned what, and what changes."""

    examples: tuple[Example, ...]
    results: tuple[SeatResult, ...]
    decisions: tuple[ArenaDecision, ...] = ()
    replacements: tuple[Replacement, ...] = ()
    team_keys: Mapping[int, tuple[str, ...]] = field(default_factory=dict)


class Mode(Protocol):
    """A way of living together. `plan` and `judge` alternate; the plan judged is always the last one made."""

    @property
    def name(self) -> str:
        """The name in configurations and records."""
        ...

    @property
    def playing(self) -> str:
        """The mode being played: its own name, or that of the part a mixed mode is in."""
        ...

    def check(self, task: Task, policies: int) -> None:
        """Refuse a task or a number of policies that the mode cannot be played with, with ModeError."""
        ...

    def plan(self, memory: ModeMemory, planning: PlanInputs) -> list[EpisodePlan]:
        """The episodes of an iteration."""
        ...

    def judge(self, memory: ModeMemory, planning: PlanInputs, played: Sequence[PlayedEpisode]) -> Judgement:
        """Rewards, advantages and decisions; updates the memory."""
        ...

    def state(self) -> dict[str, object]:
        """What the mode remembers besides the memory, as JSON."""
        ...

    def restore(self, state: Mapping[str, object]) -> None:
        """Take over what `state` wrote."""
        ...
