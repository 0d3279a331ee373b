"""State of modes between iterations: ratings, baselines, opponents, lineage, strategies and learning signals."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedmoe.arena.modes.advantages import MovingBaselines
from fedmoe.arena.modes.allocation import LearningSignal
from fedmoe.arena.modes.strategy import StrategyChooser
from fedmoe.arena.population.opponents import OpponentPool
from fedmoe.arena.population.pbt import PolicyLineage, SavedLineage
from fedmoe.arena.population.rating import Ratings


@dataclass
class ModeMemory:
    """Everything that modes remember from one iteration to the next, saved by `runtime.saved_state`."""

    ratings: Ratings = field(default_factory=Ratings)
    baselines: MovingBaselines = field(default_factory=MovingBaselines)
    opponents: OpponentPool = field(default_factory=OpponentPool)
    lineage: SavedLineage = field(default_factory=PolicyLineage)
    strategies: StrategyChooser = field(default_factory=StrategyChooser)
    signal: LearningSignal = field(default_factory=LearningSignal)
