"""State of modes between iterations: ratings, baselines, opponents, lineage, strategies and learning signals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from fedmoe.arena.modes.advantages import MovingBaselines
from fedmoe.arena.modes.allocation import LearningSignal
from fedmoe.arena.modes.strategy import StrategyChooser
from fedmoe.arena.population.opponents import OpponentPool
from fedmoe.arena.population.pbt import PolicyLineage, SavedLineage
from fedmoe.arena.population.rating import Ratings
from fedmoe.runtime.saved_state import restored, saved_state


@dataclass
class ModeMemory:
    """Everything that modes remember from one iteration to the next, as JSON in a checkpoint."""

    ratings: Ratings = field(default_factory=Ratings)
    baselines: MovingBaselines = field(default_factory=MovingBaselines)
    opponents: OpponentPool = field(default_factory=OpponentPool)
    lineage: SavedLineage = field(default_factory=PolicyLineage)
    strategies: StrategyChooser = field(default_factory=StrategyChooser)
    signal: LearningSignal = field(default_factory=LearningSignal)

    def state(self) -> dict[str, object]:
        """JSON types only; `from_state` gives an equal memory back."""
        return saved_state(self)

    @classmethod
    def from_state(cls, state: Mapping[str, object]) -> Self:
        """The memory that `state` wrote; raises SavedStateError for anything else."""
        return restored(cls, state)
