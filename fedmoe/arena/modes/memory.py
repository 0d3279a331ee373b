"""What the policies are to each other: ratings, baselines, opponents, lineage, team habits; shared by all modes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self, cast

from fedmoe.arena.modes.advantages import MovingBaselines
from fedmoe.arena.modes.allocation import LearningSignal
from fedmoe.arena.modes.strategy import StrategyChooser
from fedmoe.arena.population.opponents import OpponentPool
from fedmoe.arena.population.pbt import PolicyLineage
from fedmoe.arena.population.rating import Ratings


class ModeMemory:
    """Everything that modes remember from one iteration to the next, as JSON in a checkpoint."""

    def __init__(self) -> None:
        self.ratings = Ratings()
        self.baselines = MovingBaselines()
        self.opponents = OpponentPool()
        self.lineage = PolicyLineage()
        self.strategies = StrategyChooser()
        self.signal = LearningSignal()

    def state(self) -> dict[str, object]:
        """JSON types only; `from_state` gives an equal memory back."""
        return {
            "ratings": self.ratings.state(),
            "baselines": self.baselines.state(),
            "opponents": self.opponents.state(),
            "lineage": self.lineage.state(),
            "strategies": self.strategies.state(),
            "signal": self.signal.state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> Self:
        """The memory that `state` wrote."""
        parts = cast(Mapping[str, Mapping[str, object]], state)
        memory = cls()
        memory.ratings = Ratings.from_state(parts["ratings"])
        memory.baselines = MovingBaselines.from_state(parts["baselines"])
        memory.opponents = OpponentPool.from_state(parts["opponents"])
        memory.lineage = PolicyLineage.from_state(cast("list[Mapping[str, object]]", state["lineage"]))
        memory.strategies = StrategyChooser.from_state(parts["strategies"])
        memory.signal = LearningSignal.from_state(parts["signal"])
        return memory
