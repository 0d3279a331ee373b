"""Conformance suite for tasks: rules that every task must pass; plug-in authors can run it on their own."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from fedmoe.arena.tasks.task import Episode, Lineup, Outcome, PromptMessage, Task, TaskError, Team

_SEED = 11
_MOST_ROUNDS = 2000
_RUBBISH = ("", " \n\t", "<answer>", "[", "](", "{}%s\\x00", "\x00", "9" * 5000, "é∞😀", "[[[roll]", "1e999999999", "-")

Actor = Callable[[Episode, int], str]


@dataclass(frozen=True, slots=True)
class Transcript:
    """A whole episode: per round what each seat on turn saw and did, and the outcome."""

    rounds: tuple[Mapping[int, tuple[tuple[PromptMessage, ...], str]], ...]
    outcome: Outcome


def check_task(task: Task) -> None:
    """Check every law; raises TaskError that names the first one broken."""
    for law in LAWS.values():
        law(task)


def _demand(holds: bool, task: Task, promise: str) -> None:
    if not holds:
        raise TaskError(f"{task.name} breaks the contract of tasks: {promise}")


def lineups(task: Task) -> list[Lineup]:
    """The fewest seats each for itself, which every task seats, and all others of a few that this one does."""
    least, most = task.seats
    few = max(least, min(3, most))
    wished = [Lineup.alone(few), Lineup.together(few)]
    wished += [Lineup((Team((1, 0), strategy), *(Team((s,)) for s in range(2, few)))) for strategy in task.strategies]
    wished += [Lineup.together(few, strategy) for strategy in task.strategies]
    return [Lineup.alone(least), *(lineup for lineup in wished if _seated(task, lineup))]


def _seated(task: Task, lineup: Lineup) -> bool:
    try:
        task.start(_SEED, lineup)
    except TaskError:
        return False
    return True


def _steps(task: Task, seed: int, lineup: Lineup, act: Actor) -> Iterator[Transcript | None]:
    """Play, pausing with None after the start and each round; the last item is the transcript."""
    episode = task.start(seed, lineup)
    yield None
    rounds: list[Mapping[int, tuple[tuple[PromptMessage, ...], str]]] = []
    while seats := episode.to_act():
        _demand(len(rounds) < _MOST_ROUNDS, task, f"an episode ends within {_MOST_ROUNDS} rounds")
        turns = {seat: (episode.observe(seat), act(episode, seat)) for seat in seats}
        episode.act({seat: action for seat, (_, action) in turns.items()})
        rounds.append(turns)
        yield None
    yield Transcript(tuple(rounds), episode.outcome())


def play(task: Task, seed: int, lineup: Lineup, act: Actor) -> Transcript:
    """The whole episode with actions by `act`."""
    return next(step for step in _steps(task, seed, lineup, act) if step is not None)


def _random_actor(task: Task, seed: int) -> Actor:
    numbers = np.random.default_rng(seed)
    return lambda episode, seat: task.random_action(episode, seat, numbers)


def has_sound_properties(task: Task) -> None:
    """Name, seats, strategies and token limit make sense."""
    least, most = task.seats
    _demand(":" in task.name, task, "the name is <kind>:<which>")
    _demand(1 <= least <= most, task, f"the seats are a range from 1 on, got {task.seats}")
    _demand(len(set(task.strategies)) == len(task.strategies), task, "strategies have different names")
    _demand(task.max_action_tokens > 0, task, "an action has at least one token")


def refuses_wrong_lineups(task: Task) -> None:
    """Too few, too many seats and unknown strategies are a TaskError."""
    least, most = task.seats
    wrong = [Lineup.alone(most + 1), Lineup.together(least, "no-such-strategy")]
    wrong += [Lineup.alone(least - 1)] if least > 1 else []
    for lineup in wrong:
        _demand(not _seated(task, lineup), task, f"start refuses the line-up {lineup.teams}")


def repeats_by_seed(task: Task) -> None:
    """Equal seed, line-up and actions give equal observations and outcome, whatever the process's random states."""
    for lineup in lineups(task):
        first = play(task, _SEED, lineup, _random_actor(task, 1))
        random.random()  # noqa: S311 (moves the state that nothing here may depend on)
        np.random.random()
        again = play(task, _SEED, lineup, _random_actor(task, 1))
        _demand(first == again, task, "equal seeds and actions give equal episodes")


def leaves_randomness_alone(task: Task) -> None:
    """An episode neither seeds nor draws from the process-wide random states."""
    before = _process_randomness()
    play(task, _SEED, lineups(task)[0], _random_actor(task, 1))
    _demand(_process_randomness() == before, task, "the process-wide random states stay as they were")


def _process_randomness() -> tuple[object, ...]:
    name, key, *rest = cast(tuple[object, ...], np.random.get_state(legacy=True))
    return (random.getstate(), name, np.asarray(key).tobytes(), *rest)


def is_observed_without_effect(task: Task) -> None:
    """`observe` changes nothing, answers any seat, and ends with a message of the user."""
    for lineup in lineups(task):
        quiet = play(task, _SEED, lineup, _random_actor(task, 1))
        draw = _random_actor(task, 1)

        def nosy(episode: Episode, seat: int, draw: Actor = draw, lineup: Lineup = lineup) -> str:
            for other in range(lineup.seats):
                seen = episode.observe(other)
                _demand(seen == episode.observe(other), task, "asking again shows the same")
                _demand(bool(seen) and seen[-1].role == "user", task, "the last message is the user's")
            return draw(episode, seat)

        _demand(play(task, _SEED, lineup, nosy) == quiet, task, "observe changes nothing")


def takes_turns(task: Task) -> None:
    """`to_act` is ascending, other seats' actions are refused and change nothing, no outcome before the end."""
    for lineup in lineups(task):
        episode, draw = task.start(_SEED, lineup), _random_actor(task, 1)
        while seats := episode.to_act():
            _demand(list(seats) == sorted(set(seats)), task, "to_act is in ascending order")
            _demand(set(seats) <= set(range(lineup.seats)), task, "to_act names seats of the line-up")
            actions = {seat: draw(episode, seat) for seat in seats}
            _refused(task, partial(episode.act, {**actions, lineup.seats: "x"}), "act refuses a seat too many")
            _refused(task, partial(episode.act, {}), "act refuses missing seats")
            _refused(task, episode.outcome, "there is no outcome before the end")
            _demand(episode.to_act() == seats, task, "a refused action changes nothing")
            episode.act(actions)
        _refused(task, partial(episode.act, {0: "x"}), "act refuses every seat after the end")


def _refused(task: Task, attempt: Callable[[], object], promise: str) -> None:
    try:
        attempt()
    except TaskError:
        return
    _demand(False, task, promise)


def has_sound_outcomes(task: Task) -> None:
    """Scores in [0, 1] for every seat and team, whatever the text; `without` for seats of teams of two or more only."""
    for lineup in lineups(task):
        for actor in (_random_actor(task, 1), *(_same_text(text) for text in _RUBBISH)):
            outcome = play(task, _SEED, lineup, actor).outcome
            _demand(len(outcome.seat_scores) == len(outcome.valid) == lineup.seats, task, "one score a seat")
            _demand(len(outcome.team_scores) == len(lineup.teams), task, "one score a team")
            scores = (*outcome.seat_scores, *outcome.team_scores, *outcome.valid, *outcome.without.values())
            _demand(all(0.0 <= score <= 1.0 for score in scores), task, f"scores are in [0, 1], got {outcome}")
            single = [team.seats[0] for team in lineup.teams if len(team.seats) == 1]
            _demand(not set(single) & set(outcome.without), task, "`without` is for teams of two or more")
            same = all(outcome.team_scores[lineup.team_of(seat)] == outcome.seat_scores[seat] for seat in single)
            _demand(same, task, "a team of one scores as its seat")


def _same_text(text: str) -> Actor:
    return lambda episode, seat: text


def has_legal_random_actions(task: Task) -> None:
    """The random player never makes an illegal move, and its episodes end properly."""
    for lineup in lineups(task):
        for seed in range(5):
            outcome = play(task, seed, lineup, _random_actor(task, seed)).outcome
            _demand(set(outcome.valid) == {1.0}, task, f"random actions are legal, got {outcome} at seed {seed}")
            _demand(outcome.completed, task, f"episodes of random actions end properly, not at seed {seed}")


def plays_interleaved(task: Task) -> None:
    """Episodes played in turns with others are the same as played alone."""
    lineup, seeds = lineups(task)[0], range(4)
    alone = [play(task, seed, lineup, _random_actor(task, seed)) for seed in seeds]
    running = {seed: _steps(task, seed, lineup, _random_actor(task, seed)) for seed in seeds}
    ended: dict[int, Transcript] = {}
    while running:
        for seed in list(running):
            step = next(running[seed])
            if step is not None:
                ended[seed] = step
                del running[seed]
    _demand([ended[seed] for seed in seeds] == alone, task, "interleaved episodes equal those played alone")


#: The laws by name.
LAWS: Mapping[str, Callable[[Task], None]] = {
    law.__name__: law
    for law in (
        has_sound_properties,
        refuses_wrong_lineups,
        repeats_by_seed,
        leaves_randomness_alone,
        is_observed_without_effect,
        takes_turns,
        has_sound_outcomes,
        has_legal_random_actions,
        plays_interleaved,
    )
}
