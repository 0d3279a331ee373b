"""Credit rules: turn the outcome of an episode into one reward per seat, with the components of that reward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

from fedmoe.arena.tasks.task import Lineup, Outcome
from fedmoe.runtime.errors import ExpectedError
from fedmoe.runtime.plugins import PluginGroup


class CreditError(ExpectedError, ValueError):
    """A rule that is not known, or that the outcome has no numbers for."""


@dataclass(frozen=True, slots=True)
class Credit:
    """Four ways to look at one seat's outcome, or the weights of a reward made of them.

    `individual`: what the seat achieved by itself. `shared`: what its team achieved. `difference`: what the team
    achieved beyond what it would have without the seat, D_i = G(z) - G(z_-i) (Wolpert & Tumer 2002). `versus`: what
    the team achieved beyond the mean of its rivals. None where the task cannot score it again, or without rivals.
    """

    individual: float | None = 0.0
    shared: float | None = 0.0
    difference: float | None = 0.0
    versus: float | None = 0.0

    def parts(self) -> dict[str, float | None]:
        """Name -> number."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class SeatCredit:
    """The reward of one seat, and the parts it was (or could have been) made of, unweighted."""

    reward: float
    parts: Credit


#: From outcome and line-up to the credit of every seat.
CreditRule = Callable[[Outcome, Lineup], tuple[SeatCredit, ...]]

_PLUGINS: PluginGroup[CreditRule] = PluginGroup("fedmoe.credit", "credit rule", CreditError, {})


def credit_rule(name: str) -> CreditRule:
    """The rule of that name in an installed package; raises `CreditError` when there is none, or more than one."""
    return _PLUGINS.get(name)


def weighted_rule(weights: Credit) -> CreditRule:
    """The rule `sum of weight x part`; raises `CreditError` for weights that are not finite or all zero.

    The rule itself raises `CreditError` where a part with a weight has no number.
    """
    numbers = [weight for weight in weights.parts().values() if weight is not None]
    if len(numbers) < 4 or not all(map(math.isfinite, numbers)) or not any(numbers):
        raise CreditError(f"weights must be finite numbers, at least one of them not zero, got {weights}")

    def rule(outcome: Outcome, lineup: Lineup) -> tuple[SeatCredit, ...]:
        decomposed = decompose(outcome, lineup)
        return tuple(SeatCredit(_reward(weights, parts, seat), parts) for seat, parts in enumerate(decomposed))

    return rule


def decompose(outcome: Outcome, lineup: Lineup) -> tuple[Credit, ...]:
    """All four parts of every seat, None where there is no number; raises `CreditError` if the two do not fit."""
    if len(outcome.seat_scores) != lineup.seats or len(outcome.team_scores) != len(lineup.teams):
        raise CreditError(
            f"the line-up has {lineup.seats} seats in {len(lineup.teams)} teams, the outcome scores "
            f"{len(outcome.seat_scores)} seats and {len(outcome.team_scores)} teams"
        )
    ahead = [_ahead(outcome.team_scores, team) for team in range(len(lineup.teams))]
    parts = []
    for seat, own in enumerate(outcome.seat_scores):
        team = lineup.team_of(seat)
        joint, without = outcome.team_scores[team], outcome.without.get(seat)
        parts.append(Credit(own, joint, None if without is None else joint - without, ahead[team]))
    return tuple(parts)


def _ahead(scores: tuple[float, ...], team: int) -> float | None:
    others = scores[:team] + scores[team + 1 :]
    return scores[team] - sum(others) / len(others) if others else None


_MISSING = {
    "difference": "the task does not score its team again without it; reward `shared` or `individual` instead",
    "versus": "there is no rival team; reward `shared`, or play in two teams or more",
}


def _reward(weights: Credit, parts: Credit, seat: int) -> float:
    total, numbers = 0.0, parts.parts()
    for name, weight in weights.parts().items():
        if weight:
            number = numbers[name]
            if number is None:
                raise CreditError(f"seat {seat} has no {name}: {_MISSING[name]}")
            total += weight * number
    return total
