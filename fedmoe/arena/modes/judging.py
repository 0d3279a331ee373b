"""Steps that all modes share: credit per seat, choice of the advantage, training examples, rating updates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from fedmoe.arena.modes.advantages import BaselineKey, group_advantages
from fedmoe.arena.modes.credit import CreditRule
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.protocol import PlanInputs, SeatResult
from fedmoe.arena.rollout.episodes import Example, PlayedEpisode
from fedmoe.arena.tasks.task import HELD_OUT

# What an action that cannot be used costs, on top of what it loses by the rules: a forfeit that an opponent's forfeit
# made a win would otherwise teach nothing.
_INVALID_COST = 0.5
# What an action costs that did not end before the limit of tokens. A policy that is rarely right otherwise learns
# nothing but the luck of others, and drifts into texts without an end (measured: 13 tokens where 3 answer).
_UNENDED_COST = 0.5
_NOTHING = 1e-9


def task_seeds(planning: PlanInputs) -> list[int]:
    """One training seed a group, drawn from the planning's generator."""
    return [int(seed) for seed in planning.rng.integers(0, HELD_OUT, planning.groups)]


def credit_seats(rule: CreditRule, played: Sequence[PlayedEpisode], individual: float | None = 0.0) -> list[SeatResult]:
    """What every learning seat earned; invalid actions and those without an end cost by their share.

    `individual`: the weight of a seat's own score in the rule. Where the task scores actions one by one, each action
    has its own score in that place: a right draft is right even where the final answer is not.
    """
    results = []
    for index, episode in enumerate(played):
        credits = rule(episode.outcome, episode.plan.lineup)
        for seat, (player, credit) in enumerate(zip(episode.plan.players, credits, strict=True)):
            if player.learning:
                reward, turns = _rewards(episode, seat, credit.reward, individual or 0.0)
                results.append(SeatResult(player.name, index, seat, replace(credit, reward=reward), turn_rewards=turns))
    return results


def _rewards(episode: PlayedEpisode, seat: int, credited: float, individual: float) -> tuple[float, tuple[float, ...]]:
    """The seat's reward after what its actions cost, and that of each action where the task scores them."""
    outcome = episode.outcome
    earned = credited - _INVALID_COST * (1.0 - outcome.valid[seat])
    costs = [_UNENDED_COST * (not turn.stopped) for turn in episode.turns if turn.seat == seat]
    reward = earned - sum(costs) / max(len(costs), 1)
    if seat not in outcome.turn_scores:
        return reward, ()
    own, scored = outcome.seat_scores[seat], zip(outcome.turn_scores[seat], costs, strict=True)
    return reward, tuple(earned - cost + individual * (score - own) for score, cost in scored)


def add_advantages(
    memory: ModeMemory, planning: PlanInputs, played: Sequence[PlayedEpisode], results: Sequence[SeatResult]
) -> list[SeatResult]:
    """The results with advantages: within the group of one policy in one seat, or over a moving average.

    In a zero-sum game the same line-up still meets other luck and another opponent's play each time, and self-play
    moves the value of a seat slowly: the moving average per (task, role, policy) of SPIRAL. Everywhere else the group.
    """
    if planning.task.zero_sum:
        return _over_average(memory, planning, results)
    groups = _numbered([(played[r.episode].plan.group, r.seat, r.policy) for r in results])
    advantages = group_advantages([result.credit.reward for result in results], groups)
    # Each action is compared with the same action of the group's other episodes.
    turns = [(number, turn) for number, result in enumerate(results) for turn in range(len(result.turn_rewards))]
    turn_rewards = [results[number].turn_rewards[turn] for number, turn in turns]
    of_turns: list[list[float]] = [[] for _ in results]
    turn_values = group_advantages(turn_rewards, _numbered([(groups[number], turn) for number, turn in turns]))
    for (number, _), value in zip(turns, turn_values, strict=True):
        of_turns[number].append(float(value))
    return [
        replace(result, advantage=float(value), turn_advantages=tuple(by_turn))
        for result, value, by_turn in zip(results, advantages, of_turns, strict=True)
    ]


def _numbered(keys: Sequence[Hashable]) -> list[int]:
    """A number for each key, equal for equal ones."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]


def _over_average(memory: ModeMemory, planning: PlanInputs, results: Sequence[SeatResult]) -> list[SeatResult]:
    advantages: dict[tuple[int, int], float] = {}
    for seat, policy in dict.fromkeys((result.seat, result.policy) for result in results):
        members = [result for result in results if (result.seat, result.policy) == (seat, policy)]
        key = BaselineKey(planning.task.name, f"seat {seat}", policy)
        values = memory.baselines.advantage(key, [result.credit.reward for result in members])
        for result, value in zip(members, values, strict=True):
            advantages[(result.episode, result.seat)] = float(value)
    return [replace(result, advantage=advantages[(result.episode, result.seat)]) for result in results]


def make_examples(played: Sequence[PlayedEpisode], results: Sequence[SeatResult]) -> tuple[Example, ...]:
    """Every turn of every seat that has an advantage; those without would only cost time."""
    examples = []
    for result in results:
        turns = [turn for turn in played[result.episode].turns if turn.seat == result.seat]
        advantages = result.turn_advantages or (result.advantage,) * len(turns)
        rewards = result.turn_rewards or (result.credit.reward,) * len(turns)
        for turn, advantage, reward in zip(turns, advantages, rewards, strict=True):
            if abs(advantage) >= _NOTHING:
                examples.append(Example(result.policy, turn, advantage, reward))
    return tuple(examples)


def update_ratings(memory: ModeMemory, played: Sequence[PlayedEpisode]) -> None:
    """Enter every episode with at least two teams into the ratings."""
    for episode in played:
        teams = [[episode.plan.players[seat].name for seat in team.seats] for team in episode.plan.lineup.teams]
        names = [name for team in teams for name in team]
        if len(teams) > 1 and len(set(names)) == len(names):
            for name in names:
                memory.ratings.ensure(name)
            memory.ratings.rate(teams, episode.outcome.team_scores)


def mean_rewards_by_group(
    played: Sequence[PlayedEpisode], results: Sequence[SeatResult], key: Mapping[int, str]
) -> list[tuple[str, list[float]]]:
    """For every group: the key it was planned under, and the mean reward of each of its episodes."""
    by_group: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_group[played[result.episode].plan.group][result.episode].append(result.credit.reward)
    return [
        (key[group], [sum(rewards) / len(rewards) for rewards in episodes.values()])
        for group, episodes in by_group.items()
    ]
