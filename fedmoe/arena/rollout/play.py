"""Playing episodes: all of them in lockstep, one engine batch a wave, whatever policies are to act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from fedmoe.arena.rollout.chat import Codec
from fedmoe.arena.rollout.episodes import RANDOM, EpisodePlan, PlayedEpisode, PlayedTurn, Player
from fedmoe.arena.tasks.task import Episode, ScriptedTask, Task, check_outcome, question_of
from fedmoe.inference.engine import Engine, SampleRequest
from fedmoe.runtime.errors import ExpectedError


class RolloutError(ExpectedError, RuntimeError):
    """Episodes that cannot be played to their end."""


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How actions are sampled. `max_waves` breaks off an episode that never ends.

    `context`: the most tokens of prompt and answer together, where there is a limit. What a prompt leaves of it is the
    room for the answer; one that leaves none fails its episode.
    """

    temperature: float = 1.0
    max_waves: int = 400
    context: int | None = None


@dataclass(frozen=True, slots=True)
class FailedEpisode:
    """An episode that its task or a prompt without room broke off, and by what."""

    plan: EpisodePlan
    error: Exception


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """Which episodes came to their end, and which did not, each in the order of their plans."""

    played: list[PlayedEpisode]
    failed: list[FailedEpisode]

    @property
    def reason(self) -> str:
        """Why the first that failed did, in words; "" where none did."""
        error = self.failed[0].error if self.failed else None
        return f"{type(error).__name__}: {error}"[:300] if error else ""

    def check_some(self, task: str) -> None:
        """Refuse to go on where not a single episode came to its end, with RolloutError."""
        if self.failed and not self.played:
            raise RolloutError(f"all {len(self.failed)} episodes of {task} failed, the first by {self.reason}")


class _RunningEpisode:
    """One episode on its way."""

    def __init__(self, task: Task, plan: EpisodePlan) -> None:
        if len(plan.players) != plan.lineup.seats:
            raise RolloutError(f"{plan.lineup.seats} seats need as many players, got {len(plan.players)}")
        self.plan = plan
        self.error: Exception | None = None
        self.turns: list[PlayedTurn] = []
        with self.guarded():
            self.episode: Episode = task.start(plan.seed, plan.lineup)
            self.question = question_of(task, self.episode, plan.seed)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Whatever a task raises ends this episode and no other; but a machine without memory is no episode's fault."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # a plug-in's code: it may raise anything
            self.error = self.error or error

    def to_act(self) -> tuple[int, ...]:
        """Who is to act; nobody where it failed."""
        with self.guarded():
            return () if self.error else self.episode.to_act()
        return ()

    def played(self) -> PlayedEpisode | None:
        """What became of it, if it came to its end."""
        with self.guarded():
            if not self.error:
                outcome = check_outcome(self.episode.outcome(), self.plan.lineup)
                return PlayedEpisode(self.plan, tuple(self.turns), outcome, self.question)
        return None


@dataclass(frozen=True, slots=True)
class _Draws:
    """Names every draw by what it is for, so that no random state has to be kept or restored."""

    seed: int
    wave: int

    def key(self, one: _RunningEpisode, seat: int) -> list[int]:
        return [self.seed, one.plan.seed, one.plan.group, one.plan.sample, seat, self.wave]


def attempt(
    task: Task,
    plans: Sequence[EpisodePlan],
    engine: Engine,
    codec: Codec,
    seed: int,
    settings: RolloutSettings = RolloutSettings(),
) -> RolloutResult:
    """Play all planned episodes to their end; equal arguments and weights give equal episodes.

    In each wave every seat that is to act, in every episode, is one request of the same batch. An episode that fails
    ends alone. Raises what the engine raises, and RolloutError for a plan with other players than seats.
    """
    running = [_RunningEpisode(task, plan) for plan in plans]
    for wave in range(settings.max_waves + 1):
        due = [(one, seat) for one in running for seat in one.to_act()]
        if not due:
            break
        if wave == settings.max_waves:
            late = RolloutError(f"{task.name} did not end within {settings.max_waves} waves of actions")
            for one, _ in due:
                one.error = late
            break
        _wave(task, due, engine, codec, _Draws(seed, wave), settings)
    played = [found for one in running if (found := one.played())]
    return RolloutResult(played, [FailedEpisode(one.plan, one.error) for one in running if one.error])


def play(
    task: Task,
    plans: Sequence[EpisodePlan],
    engine: Engine,
    codec: Codec,
    seed: int,
    settings: RolloutSettings = RolloutSettings(),
) -> list[PlayedEpisode]:
    """As `attempt`, where every episode must come to its end: raises what the first that failed raised."""
    found = attempt(task, plans, engine, codec, seed, settings)
    if found.failed:
        raise found.failed[0].error
    return found.played


def _wave(
    task: Task,
    due: Sequence[tuple[_RunningEpisode, int]],
    engine: Engine,
    codec: Codec,
    draws: _Draws,
    settings: RolloutSettings,
) -> None:
    asked: list[tuple[_RunningEpisode, int, str, SampleRequest]] = []
    for one, seat in due:
        if not _player(one, seat).by_rule:
            with one.guarded():
                seen = one.episode.observe(seat)
                request = _request(one, seat, codec.prompt(seen), draws, task.max_action_tokens, settings)
                asked.append((one, seat, seen[-1].text, request))
    asked = [one for one in asked if not one[0].error]
    actions: dict[int, dict[int, str]] = {id(one): {} for one, _ in due}
    turns: list[tuple[_RunningEpisode, PlayedTurn]] = []
    samples = engine.sample([request for *_, request in asked])
    for (one, seat, saw, request), sample in zip(asked, samples, strict=True):
        text = codec.text(sample.tokens)
        player = _player(one, seat)
        turn = PlayedTurn(seat, player, request.prompt, sample.tokens, text, sample.logprobs, sample.stopped, saw)
        turns.append((one, turn))
        actions[id(one)][seat] = text
    for one, seat in due:
        if _player(one, seat).by_rule and not one.error:
            with one.guarded():
                rng = np.random.default_rng(draws.key(one, seat))
                actions[id(one)][seat] = _by_rule(task, one, seat, rng)
    _act(due, actions)
    for one, turn in turns:
        one.turns.append(turn)


def _by_rule(task: Task, one: _RunningEpisode, seat: int, rng: np.random.Generator) -> str:
    if _player(one, seat).name == RANDOM:
        return task.random_action(one.episode, seat, rng)
    if not isinstance(task, ScriptedTask):
        raise RolloutError(f"{task.name} has no scripted player")
    return task.scripted_action(one.episode, seat, rng)


def _act(due: Sequence[tuple[_RunningEpisode, int]], actions: Mapping[int, Mapping[int, str]]) -> None:
    for one in dict.fromkeys(one for one, _ in due):
        if not one.error:
            with one.guarded():
                one.episode.act(actions[id(one)])


def _request(
    one: _RunningEpisode, seat: int, prompt: tuple[int, ...], draws: _Draws, max_tokens: int, settings: RolloutSettings
) -> SampleRequest:
    drawn = int(np.random.SeedSequence(draws.key(one, seat)).generate_state(1, np.uint32)[0])
    room = max_tokens if settings.context is None else min(max_tokens, settings.context - len(prompt))
    if room < 1:
        raise RolloutError(
            f"a prompt has {len(prompt)} tokens, the model and its engine take {settings.context} with the answer; "
            "take a task with shorter observations"
        )
    return SampleRequest(_player(one, seat).key, prompt, room, settings.temperature, drawn)


def _player(one: _RunningEpisode, seat: int) -> Player:
    return one.plan.players[seat]
