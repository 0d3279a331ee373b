"""From credits to examples: the steps that all modes share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def credit_seats(rule: CreditRule, played: Sequence[PlayedEpisode], individual: float = 0.0) -> list[SeatResult]:
    """What every learning seat earned; invalid actions and those without an end cost by their share.

    `individual`: the weight of a seat's own score in the rule. Where the task scores actions one by one, each action
    has its own score in that place: a right draft is right even where the final answer is not.
    """
    results = []
    for index, episode in enumerate(played):
        credits = rule(episode.outcome, episode.plan.lineup)
        for seat, (player, credit) in enumerate(zip(episode.plan.players, credits, strict=True)):
            if player.learning:
                reward, turns = _rewards(episode, seat, credit.reward, individual)
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
    """The advantages: within the group of one policy in one seat, or over a moving average in zero-sum games.

    In a game the same line-up still meets other luck and another opponent's play each time, and self-play moves the
    value of a seat slowly: the moving average per (task, role, policy) of SPIRAL. Everywhere else the group.
    """
    if planning.task.zero_sum:
        return _over_average(memory, planning, results)
    names = {key: number for number, key in enumerate(dict.fromkeys(_group(played, result) for result in results))}
    groups = [names[_group(played, result)] for result in results]
    advantages = group_advantages([result.credit.reward for result in results], groups)
    turns = _turn_advantages(results, groups)
    return [
        replace(result, advantage=float(value), turn_advantages=of_turns)
        for result, value, of_turns in zip(results, advantages, turns, strict=True)
    ]


def _turn_advantages(results: Sequence[SeatResult], groups: Sequence[int]) -> list[tuple[float, ...]]:
    """Each action compared with the same action of the group's other episodes."""
    flat = [(number, turn) for number, result in enumerate(results) for turn in range(len(result.turn_rewards))]
    names = {key: name for name, key in enumerate(dict.fromkeys((groups[number], turn) for number, turn in flat))}
    rewards = [results[number].turn_rewards[turn] for number, turn in flat]
    values = group_advantages(rewards, [names[(groups[number], turn)] for number, turn in flat])
    found: list[list[float]] = [[] for _ in results]
    for (number, _), value in zip(flat, values, strict=True):
        found[number].append(float(value))
    return [tuple(values) for values in found]


def _over_average(memory: ModeMemory, planning: PlanInputs, results: Sequence[SeatResult]) -> list[SeatResult]:
    found: dict[tuple[int, int], float] = {}
    for key in dict.fromkeys((result.seat, result.policy) for result in results):
        members = [result for result in results if (result.seat, result.policy) == key]
        name = BaselineKey(planning.task.name, f"seat {key[0]}", key[1])
        rewards = [result.credit.reward for result in members]
        for result, value in zip(members, memory.baselines.advantage(name, rewards), strict=True):
            found[(result.episode, result.seat)] = float(value)
    return [replace(result, advantage=found[(result.episode, result.seat)]) for result in results]


def _group(played: Sequence[PlayedEpisode], result: SeatResult) -> tuple[int, int, str]:
    return (played[result.episode].plan.group, result.seat, result.policy)


def make_examples(played: Sequence[PlayedEpisode], results: Sequence[SeatResult]) -> tuple[Example, ...]:
    """Every turn of every seat that has an advantage; those without would only cost time."""
    found = []
    for result in results:
        turns = [turn for turn in played[result.episode].turns if turn.seat == result.seat]
        advantages = result.turn_advantages or (result.advantage,) * len(turns)
        rewards = result.turn_rewards or (result.credit.reward,) * len(turns)
        for turn, advantage, reward in zip(turns, advantages, rewards, strict=True):
            if abs(advantage) >= _NOTHING:
                found.append(Example(result.policy, turn, advantage, reward))
    return tuple(found)


def update_ratings(memory: ModeMemory, played: Sequence[PlayedEpisode]) -> None:
    """Enter every episode with at least two teams into the ratings."""
    for episode in played:
        lineup = episode.plan.lineup
        names = [[episode.plan.players[seat].name for seat in team.seats] for team in lineup.teams]
        everybody = [name for team in names for name in team]
        if len(names) > 1 and len(set(everybody)) == len(everybody):
            for name in everybody:
                memory.ratings.ensure(name)
            memory.ratings.rate(names, episode.outcome.team_scores)


def mean_rewards_by_group(
    played: Sequence[PlayedEpisode], results: Sequence[SeatResult], key: Mapping[int, str]
) -> list[tuple[str, list[float]]]:
    """For every group: the key it was planned under, and the mean reward of each of its episodes."""
    by_group: dict[int, dict[int, list[float]]] = {}
    for result in results:
        by_group.setdefault(played[result.episode].plan.group, {}).setdefault(result.episode, []).append(
            result.credit.reward
        )
    return [
        (key[group], [sum(rewards) / len(rewards) for rewards in episodes.values()])
        for group, episodes in by_group.items()
    ]
