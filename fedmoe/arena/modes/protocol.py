"""The protocol of training modes: they assign policies to seats and teams, and turn outcomes into advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    """The policies, the task and the numbers of groups and samples of one iteration.

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
    """A decision for the records, with the numbers in its reason: `what` is strategy, replace, mode, budget, ..."""

    what: str
    policy: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True, slots=True)
class SeatResult:
    """The credit and advantage of one seat of one episode.

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
    """The judgement of a batch of episodes: examples to learn from, rewards of seats, and what changes."""

    examples: tuple[Example, ...]
    results: tuple[SeatResult, ...]
    decisions: tuple[ArenaDecision, ...] = ()
    replacements: tuple[Replacement, ...] = ()


class Mode(Protocol):
    """A training mode: assigns policies to seats and teams, and turns outcomes into rewards and advantages.

    Call `plan`, then `judge`, once per iteration. `name` stands in configurations and records. A subclass is always the
    mode being played and remembers nothing by itself, unless it says otherwise.
    """

    name: str

    @property
    def playing(self) -> str:
        """The mode being played: its own name, or that of the part a mixed mode is in."""
        return self.name

    def check(self, task: Task, policies: int) -> None:
        """Refuse a task or a number of policies that the mode cannot be played with, with ModeError."""

    def plan(self, memory: ModeMemory, planning: PlanInputs) -> list[EpisodePlan]:
        """The episodes of an iteration."""

    def judge(self, memory: ModeMemory, planning: PlanInputs, played: Sequence[PlayedEpisode]) -> Judgement:
        """Rewards, advantages and decisions for the episodes of the last plan; updates the memory."""

    def state(self) -> dict[str, object]:
        """What the mode itself remembers, besides the memory, as JSON."""
        return {}

    def restore(self, state: Mapping[str, object]) -> None:
        """Take over what `state` wrote."""
        return
