"""Playing episodes: all of them in lockstep, one engine batch a wave, whatever policies are to act."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.arena.chat import Codec
from fedmoe.arena.engines.protocol import Engine, SampleRequest
from fedmoe.arena.task import Episode, Task, question_of
from fedmoe.arena.trajectory import RANDOM, EpisodePlan, PlayedEpisode, Player, Turn


class RolloutError(RuntimeError):
    """Episodes that cannot be played to their end."""


@dataclass(frozen=True, slots=True)
class RolloutSettings:
    """How actions are sampled. `max_waves` breaks off a task that never ends, with an error."""

    temperature: float = 1.0
    max_waves: int = 400


class _Running:
    """One episode on its way."""

    def __init__(self, task: Task, plan: EpisodePlan) -> None:
        if len(plan.players) != plan.lineup.seats:
            raise RolloutError(f"{plan.lineup.seats} seats need as many players, got {len(plan.players)}")
        self.plan = plan
        self.episode: Episode = task.start(plan.seed, plan.lineup)
        self.question = question_of(task, self.episode, plan.seed)
        self.turns: list[Turn] = []

    def played(self) -> PlayedEpisode:
        """What became of it."""
        return PlayedEpisode(self.plan, tuple(self.turns), self.episode.outcome(), self.question)


@dataclass(frozen=True, slots=True)
class _Draws:
    """Names every draw by what it is for, so that no random state has to be kept or restored."""

    seed: int
    wave: int

    def key(self, one: _Running, seat: int) -> list[int]:
        return [self.seed, one.plan.seed, one.plan.group, one.plan.sample, seat, self.wave]


def play(
    task: Task,
    plans: Sequence[EpisodePlan],
    engine: Engine,
    codec: Codec,
    seed: int,
    settings: RolloutSettings = RolloutSettings(),
) -> list[PlayedEpisode]:
    """Play all planned episodes to their end; equal arguments and weights give equal episodes.

    In each wave every seat that is to act, in every episode, is one request of the same batch.
    """
    running = [_Running(task, plan) for plan in plans]
    for wave in range(settings.max_waves + 1):
        due = [(one, seat) for one in running for seat in one.episode.to_act()]
        if not due:
            return [one.played() for one in running]
        if wave == settings.max_waves:
            break
        _wave(task, due, engine, codec, _Draws(seed, wave), settings)
    raise RolloutError(f"{task.name} did not end within {settings.max_waves} waves of actions")


def _wave(
    task: Task,
    due: Sequence[tuple[_Running, int]],
    engine: Engine,
    codec: Codec,
    draws: _Draws,
    settings: RolloutSettings,
) -> None:
    asked = [(one, seat) for one, seat in due if _player(one, seat).name != RANDOM]
    requests = [_request(one, seat, codec, draws, task.max_action_tokens, settings) for one, seat in asked]
    actions: dict[int, dict[int, str]] = {id(one): {} for one, _ in due}
    turns: list[tuple[_Running, Turn]] = []
    for (one, seat), request, sample in zip(asked, requests, engine.sample(requests), strict=True):
        text = codec.text(sample.tokens)
        player = _player(one, seat)
        turn = Turn(seat, player, request.prompt, sample.tokens, text, sample.logprobs, sample.stopped)
        turns.append((one, turn))
        actions[id(one)][seat] = text
    for one, seat in due:
        if _player(one, seat).name == RANDOM:
            rng = np.random.default_rng(draws.key(one, seat))
            actions[id(one)][seat] = task.random_action(one.episode, seat, rng)
    _act(due, actions)
    for one, turn in turns:
        one.turns.append(turn)


def _act(due: Sequence[tuple[_Running, int]], actions: Mapping[int, Mapping[int, str]]) -> None:
    for one in dict.fromkeys(one for one, _ in due):
        one.episode.act(actions[id(one)])


def _request(
    one: _Running, seat: int, codec: Codec, draws: _Draws, max_tokens: int, settings: RolloutSettings
) -> SampleRequest:
    drawn = int(np.random.SeedSequence(draws.key(one, seat)).generate_state(1, np.uint32)[0])
    prompt = codec.prompt(one.episode.observe(seat))
    return SampleRequest(_player(one, seat).key, prompt, max_tokens, settings.temperature, drawn)


def _player(one: _Running, seat: int) -> Player:
    return one.plan.players[seat]
