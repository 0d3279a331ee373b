import pytest

from fedmoe.areal.config import ArealError
from fedmoe.areal.rewards import episode_rows, lead_reward, seat_reward, team_reward
from fedmoe.arena.tasks.task import HELD_OUT, Lineup, Outcome, Team

PAIRS = Lineup((Team((0, 2)), Team((1, 3))))
OUTCOME = Outcome((0.1, 0.2, 0.3, 0.4), (0.9, 0.25), (1.0,) * 4)


def test_rewards_are_of_the_seat_its_team_or_its_lead() -> None:
    assert [seat_reward(OUTCOME, PAIRS, seat) for seat in range(4)] == [0.1, 0.2, 0.3, 0.4]
    assert [team_reward(OUTCOME, PAIRS, seat) for seat in range(4)] == [0.9, 0.25, 0.9, 0.25]
    assert [lead_reward(OUTCOME, PAIRS, seat) for seat in range(4)] == [0.65, -0.65, 0.65, -0.65]


def test_a_lead_over_nobody_is_refused() -> None:
    with pytest.raises(ArealError, match="one team"):
        lead_reward(Outcome((0.5,), (0.5,), (1.0,)), Lineup.together(1), 0)


def test_rows_are_seeds_with_the_seats_of_the_policy() -> None:
    assert episode_rows(2, 3, first_seed=5) == [{"seed": 5, "seats": [0, 1, 2]}, {"seed": 6, "seats": [0, 1, 2]}]


def test_against_opponents_every_seat_has_its_turn() -> None:
    assert [row["seats"] for row in episode_rows(4, 2, against_opponents=True)] == [[0], [1], [0], [1]]


@pytest.mark.parametrize(("count", "seats", "first"), [(0, 1, 0), (1, 0, 0), (1, 1, -1), (2, 1, HELD_OUT - 1)])
def test_held_out_seeds_are_never_trained_on(count: int, seats: int, first: int) -> None:
    with pytest.raises(ArealError):
        episode_rows(count, seats, first)
