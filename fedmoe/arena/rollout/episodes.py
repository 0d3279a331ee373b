"""Episode data: players, plans, played turns with the log-probability of each sampled token, training examples."""

from __future__ import annotations

from dataclasses import dataclass

from fedmoe.arena.tasks.task import Lineup, Outcome
from fedmoe.inference.engine import AdapterKey
from fedmoe.lora.adapter import FloatArray

#: A seat filled by chance instead of by a model.
RANDOM = "random"
#: A seat filled by the task's player of known strength, for tasks that are `task.ScriptedTask`.
SCRIPTED = "scripted"


@dataclass(frozen=True, slots=True)
class Player:
    """Who fills a seat: a policy or a frozen adapter at a version, the base model alone (`key` None), or a rule.

    Only the turns of a `learning` player are trained on.
    """

    name: str
    key: AdapterKey | None
    learning: bool = False

    @property
    def by_rule(self) -> bool:
        """Whether no model is asked: chance, or the task's scripted player."""
        return self.key is None and self.name in (RANDOM, SCRIPTED)


@dataclass(frozen=True, slots=True)
class EpisodePlan:
    """One episode to play. Episodes of equal `group` share seed and line-up: they compare like with like."""

    seed: int
    lineup: Lineup
    players: tuple[Player, ...]
    group: int
    sample: int = 0


@dataclass(frozen=True, slots=True)
class PlayedTurn:
    """One action of one seat. `behaviour` are the log-probabilities under the weights that sampled it, float32 (T,).

    `saw`: the last message that the seat saw before it acted.
    """

    seat: int
    player: Player
    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    text: str
    behaviour: FloatArray
    stopped: bool
    saw: str = ""

    @property
    def version(self) -> int:
        """The version that made every token of this turn; -1 where no adapter did."""
        return self.player.key.version if self.player.key else -1


@dataclass(frozen=True, slots=True)
class PlayedEpisode:
    """An episode with its turns, in the order they were taken, and its outcome.

    `question`: equal for episodes about the same question, see `task.question_of`.
    """

    plan: EpisodePlan
    turns: tuple[PlayedTurn, ...]
    outcome: Outcome
    question: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """One turn to learn from: every token of it gets `advantage`."""

    policy: str
    turn: PlayedTurn
    advantage: float
    reward: float
