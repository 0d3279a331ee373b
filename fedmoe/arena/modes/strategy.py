"""EXP3.S bandit for teams: learns which strategy and first speaker pay off against opponents that also learn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedmoe.arena.tasks.task import Team


@dataclass(frozen=True, slots=True)
class StrategyDraw:
    """An option and the probability with which it was drawn; `learn` needs both, however much later."""

    option: str
    probability: float


def team_options(strategies: Sequence[str], members: Sequence[str], seats: Sequence[int]) -> dict[str, Team]:
    """What a team can do: every strategy with every member speaking first, the others following in their order.

    `seats[i]` is the seat of `members[i]`. Options are named by strategy and first speaker, so that what was learned
    holds wherever the team sits. No strategies means the plain one only. Raises ValueError for unequal lengths.
    """
    if len(members) != len(seats) or not members or len(set(members)) != len(members):
        raise ValueError(f"every seat needs one member of its own, got members {members} and seats {seats}")
    options: dict[str, Team] = {}
    for strategy in strategies or ("",):
        for first, member in enumerate(members):
            order = tuple(seats[first:]) + tuple(seats[:first])
            options[f"{strategy or 'plain'}, {member} first"] = Team(order, strategy)
    return options


@dataclass
class StrategyChooser:
    """One EXP3.S bandit per team: p_i = (1 - g) w_i / sum(w) + g / K, learned from the reward over p_i.

    Two teams that adapt to each other make rewards that follow no distribution: what pays today is answered tomorrow.
    UCB and Thompson sampling assume a fixed distribution (their discounted forms one that moves by itself, not in
    reply) and choose without a random draw that an opponent could not foresee. EXP3 is made for rewards set by an
    adversary and its average play approaches an equilibrium in two-team zero-sum games; its `.S` form also shares a
    little weight among all options, so that it competes with sequences that change their best option. Source: Auer,
    Cesa-Bianchi, Freund and Schapire 2002, The nonstochastic multiarmed bandit problem, section 8.

    `exploration` is g above, in (0, 1]; `sharing` is the paper's alpha, in [0, 1). Rewards lie in [0, 1]. A team is
    named by any key; for a key never seen all options are equally likely.
    """

    exploration: float = 0.2
    sharing: float = 0.005
    weights: dict[str, dict[str, float]] = field(default_factory=dict)

    def probabilities(self, team_key: str, options: Sequence[str]) -> dict[str, float]:
        """With which probability each option would be chosen now; for the records."""
        if not options or len(set(options)) != len(options):
            raise ValueError(f"options must be different and at least one, got {list(options)}")
        weights = self._offered(team_key, options)
        total, even = sum(weights.values()), self.exploration / len(options)
        return {option: (1 - self.exploration) * weight / total + even for option, weight in weights.items()}

    def choose(self, team_key: str, options: Sequence[str], rng: np.random.Generator) -> StrategyDraw:
        """Draw an option. Keep the choice for `learn`; a choice whose episode failed can simply be dropped."""
        probabilities = self.probabilities(team_key, options)
        self.weights.setdefault(team_key, {}).update(self._offered(team_key, options))
        option = list(options)[int(rng.choice(len(options), p=np.array(list(probabilities.values()))))]
        return StrategyDraw(option, probabilities[option])

    def learn(self, team_key: str, choice: StrategyDraw, reward: float) -> None:
        """Take the reward of one episode, in [0, 1], played with `choice`.

        The estimate reward / probability is unbiased for the reward of each option, drawn or not. Raises ValueError
        for a reward outside [0, 1] and for a choice that this team was never offered.
        """
        weights = self.weights.get(team_key, {})
        if choice.option not in weights:
            raise ValueError(f"team {team_key!r} was never offered {choice.option!r}; it has {sorted(weights)}")
        gain = self.exploration / len(weights) * importance_weighted(choice, reward)
        total = sum(weights.values())
        weights[choice.option] *= math.exp(gain)
        shared = math.e * self.sharing / len(weights) * total
        grown = {option: weight + shared for option, weight in weights.items()}
        # Only ratios count: keep the sum at the number of options, so that nothing can overflow.
        scale = len(grown) / sum(grown.values())
        self.weights[team_key] = {option: weight * scale for option, weight in grown.items()}

    def _offered(self, team_key: str, options: Sequence[str]) -> dict[str, float]:
        weights = self.weights.get(team_key, {})
        # The weights of a team always average 1: an option that is new to it is neither believed in nor ruled out.
        return {option: weights.get(option, 1.0) for option in options}


def importance_weighted(choice: StrategyDraw, reward: float) -> float:
    """reward / probability: over the draw, its mean is the option's mean reward (0 is taken when not drawn)."""
    if not 0 <= reward <= 1:
        raise ValueError(f"rewards lie in [0, 1], got {reward}")
    if not 0 < choice.probability <= 1:
        raise ValueError(f"a choice has a probability in (0, 1], got {choice.probability}")
    return reward / choice.probability
