"""The episodes that an AReaL cluster plays, and the reward of a seat in them."""

from __future__ import annotations

from collections.abc import Callable

from fedmoe.areal.config import ArealError
from fedmoe.arena.tasks.task import HELD_OUT, Lineup, Outcome

#: Keys of a row of data.
SEED, SEATS = "seed", "seats"

#: What a seat earned, from the outcome of an episode and its line-up.
Reward = Callable[[Outcome, Lineup, int], float]


def seat_reward(outcome: Outcome, lineup: Lineup, seat: int) -> float:
    """What the seat achieved by itself, in [0, 1]: every seat for itself."""
    return outcome.seat_scores[seat]


def team_reward(outcome: Outcome, lineup: Lineup, seat: int) -> float:
    """What the seat's team achieved, in [0, 1]: shared by all of them."""
    return outcome.team_scores[lineup.team_of(seat)]


def lead_reward(outcome: Outcome, lineup: Lineup, seat: int) -> float:
    """How far the seat's team is ahead of the best other team, in [-1, 1]: zero-sum between two teams."""
    own = lineup.team_of(seat)
    others = [score for team, score in enumerate(outcome.team_scores) if team != own]
    if not others:
        raise ArealError("lead_reward compares teams; a line-up with one team has nothing to compare")
    return outcome.team_scores[own] - max(others)


def episode_rows(
    count: int, seats: int, first_seed: int = 0, against_opponents: bool = False
) -> list[dict[str, int | list[int]]]:
    """Rows for AReaL's data loader: `count` training seeds from `first_seed` on, the policy on all seats.

    `against_opponents`: on one seat instead, another one each time, so that no seat is learned better than others.
    """
    if count < 1 or seats < 1 or first_seed < 0 or first_seed + count > HELD_OUT:
        raise ArealError(
            f"seeds of training lie in [0, {HELD_OUT}) and count and seats are at least 1, got {count} seeds from "
            f"{first_seed} on for {seats} seats"
        )
    return [
        {SEED: seed, SEATS: [seed % seats] if against_opponents else list(range(seats))}
        for seed in range(first_seed, first_seed + count)
    ]
