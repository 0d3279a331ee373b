"""Who earned it: rules that turn the outcome of an episode into one reward a seat, with what the reward is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Literal

from fedmoe.arena.tasks.task import Lineup, Outcome
from fedmoe.runtime.errors import ExpectedError
from fedmoe.runtime.plugins import PluginGroup

Rivals = Literal["mean", "best"]


class CreditError(ExpectedError, ValueError):
    """A rule that is not known, or that the outcome has no numbers for."""


@dataclass(frozen=True, slots=True)
class Credit:
    """Four ways to look at one seat's outcome, or the weights of a reward made of them.

    `individual`: what the seat achieved by itself. `shared`: what its team achieved. `difference`: what the team
    achieved beyond what it would have without the seat, D_i = G(z) - G(z_-i) (Wolpert & Tumer 2002). `versus`: what
    the team achieved beyond its rivals. None where the task cannot score it again, or where there is no rival.
    """

    individual: float | None = 0.0
    shared: float | None = 0.0
    difference: float | None = 0.0
    versus: float | None = 0.0

    def parts(self) -> Mapping[str, float | None]:
        """Name -> number."""
        return {
            "individual": self.individual,
            "shared": self.shared,
            "difference": self.difference,
            "versus": self.versus,
        }


@dataclass(frozen=True, slots=True)
class SeatCredit:
    """The reward of one seat, and the parts it was (or could have been) made of, unweighted."""

    reward: float
    parts: Credit


#: From outcome and line-up to the credit of every seat.
CreditRule = Callable[[Outcome, Lineup], tuple[SeatCredit, ...]]


def weighted_rule(weights: Credit, rivals: Rivals = "mean") -> CreditRule:
    """The rule `sum of weight x part`; raises `CreditError` for weights that are not finite or all zero.

    The rule itself raises `CreditError` where a part with a weight has no number.
    """
    numbers = [weight for weight in weights.parts().values() if weight is not None]
    if len(numbers) < 4 or not all(map(math.isfinite, numbers)) or not any(numbers):
        raise CreditError(f"weights must be finite numbers, at least one of them not zero, got {weights}")
    return partial(_rewarded, weights, rivals)


def individual(outcome: Outcome, lineup: Lineup) -> tuple[SeatCredit, ...]:
    """Everybody gets what he achieved by himself."""
    return _rewarded(Credit(individual=1.0), "mean", outcome, lineup)


def shared(outcome: Outcome, lineup: Lineup) -> tuple[SeatCredit, ...]:
    """Everybody gets what his team achieved, whoever did the work."""
    return _rewarded(Credit(shared=1.0), "mean", outcome, lineup)


def difference(outcome: Outcome, lineup: Lineup) -> tuple[SeatCredit, ...]:
    """Everybody gets what his team would have missed without him; a free rider gets 0."""
    return _rewarded(Credit(difference=1.0), "mean", outcome, lineup)


def team_advantage(outcome: Outcome, lineup: Lineup) -> tuple[SeatCredit, ...]:
    """Everybody gets his team's score minus the mean of the rival teams': sums to 0 over the teams."""
    return _rewarded(Credit(versus=1.0), "mean", outcome, lineup)


def team_advantage_best(outcome: Outcome, lineup: Lineup) -> tuple[SeatCredit, ...]:
    """Everybody gets his team's score minus the best rival's: only the winner's is positive."""
    return _rewarded(Credit(versus=1.0), "best", outcome, lineup)


#: Our own rules; installed packages add theirs in the entry-point group `fedmoe.credit`.
RULES: Mapping[str, CreditRule] = MappingProxyType(
    {
        "individual": individual,
        "shared": shared,
        "difference": difference,
        "team_advantage": team_advantage,
        "team_advantage_best": team_advantage_best,
    }
)


_PLUGINS = PluginGroup("fedmoe.credit", "credit rule", CreditError, RULES)


def credit_rule(name: str) -> CreditRule:
    """A rule of `RULES` or of an installed package; raises `CreditError` when there is none, or more than one."""
    return _PLUGINS.get(name)


def decompose(outcome: Outcome, lineup: Lineup, rivals: Rivals = "mean") -> tuple[Credit, ...]:
    """All four parts of every seat, None where there is no number; raises `CreditError` if the two do not fit."""
    if len(outcome.seat_scores) != lineup.seats or len(outcome.team_scores) != len(lineup.teams):
        raise CreditError(
            f"the line-up has {lineup.seats} seats in {len(lineup.teams)} teams, the outcome scores "
            f"{len(outcome.seat_scores)} seats and {len(outcome.team_scores)} teams"
        )
    ahead = [_ahead(outcome.team_scores, team, rivals) for team in range(len(lineup.teams))]
    parts = []
    for seat, own in enumerate(outcome.seat_scores):
        team = lineup.team_of(seat)
        joint, without = outcome.team_scores[team], outcome.without.get(seat)
        parts.append(Credit(own, joint, None if without is None else joint - without, ahead[team]))
    return tuple(parts)


def _ahead(scores: tuple[float, ...], team: int, rivals: Rivals) -> float | None:
    others = scores[:team] + scores[team + 1 :]
    if not others:
        return None
    return scores[team] - (max(others) if rivals == "best" else sum(others) / len(others))


def _rewarded(weights: Credit, rivals: Rivals, outcome: Outcome, lineup: Lineup) -> tuple[SeatCredit, ...]:
    return tuple(
        SeatCredit(_reward(weights, parts, seat), parts)
        for seat, parts in enumerate(decompose(outcome, lineup, rivals))
    )


_MISSING = {
    "difference": "the task does not score its team again without it; reward `shared` or `individual` instead",
    "versus": "there is no rival team; reward `shared`, or play in two teams or more",
}


def _reward(weights: Credit, parts: Credit, seat: int) -> float:
    total = 0.0
    numbers = parts.parts()
    for name, weight in weights.parts().items():
        number = numbers[name]
        if not weight:
            continue
        if number is None:
            raise CreditError(f"seat {seat} has no {name}: {_MISSING[name]}")
        total += weight * number
    return total
