"""The rollout loop: plays all episodes in lockstep, with one engine batch per wave across all policies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """An episode that its task or a prompt without room broke off, and the error."""

    plan: EpisodePlan
    error: Exception


@dataclass(frozen=True, slots=True)
class RolloutResult:
    """The episodes that came to their end, and those that did not, each in the order of their plans."""

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
    """One episode under way, with its turns so far and the error that ended it."""

    def __init__(self, task: Task, plan: EpisodePlan) -> None:
        if len(plan.players) != plan.lineup.seats:
            raise RolloutError(f"{plan.lineup.seats} seats need as many players, got {len(plan.players)}")
        self.plan = plan
        self.error: Exception | None = None
        self.turns: list[PlayedTurn] = []
        self.actions: dict[int, str] = {}
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
        """The seats that are to act; none where the episode failed."""
        with self.guarded():
            return () if self.error else self.episode.to_act()
        return ()

    def played(self) -> PlayedEpisode | None:
        """The whole episode, if it came to its end."""
        with self.guarded():
            if not self.error:
                outcome = check_outcome(self.episode.outcome(), self.plan.lineup)
                return PlayedEpisode(self.plan, tuple(self.turns), outcome, self.question)
        return None


@dataclass(frozen=True, slots=True)
class _Wave:
    """One round of actions: a single engine batch for every seat that is to act, in every episode."""

    task: Task
    engine: Engine
    codec: Codec
    settings: RolloutSettings
    seed: int
    number: int

    def run(self, due: Sequence[tuple[_RunningEpisode, Player, int]]) -> None:
        """Sample the actions of models, draw those of rules, and act in every episode."""
        asked: list[tuple[_RunningEpisode, Player, int, str, SampleRequest]] = []
        for running, player, seat in due:
            running.actions = {}
            if not player.by_rule:
                with running.guarded():
                    seen = running.episode.observe(seat)
                    request = self._request(running, player, seat, self.codec.prompt(seen))
                    asked.append((running, player, seat, seen[-1].text, request))
        asked = [each for each in asked if not each[0].error]
        turns: list[tuple[_RunningEpisode, PlayedTurn]] = []
        samples = self.engine.sample([request for *_, request in asked])
        for (running, player, seat, saw, request), sample in zip(asked, samples, strict=True):
            text = running.actions[seat] = self.codec.text(sample.tokens)
            turn = PlayedTurn(seat, player, request.prompt, sample.tokens, text, sample.logprobs, sample.stopped, saw)
            turns.append((running, turn))
        for running, player, seat in due:
            if player.by_rule and not running.error:
                with running.guarded():
                    running.actions[seat] = self._by_rule(running, player, seat)
        for running in dict.fromkeys(running for running, *_ in due):
            if not running.error:
                with running.guarded():
                    running.episode.act(running.actions)
        for running, turn in turns:
            running.turns.append(turn)

    def _draw(self, running: _RunningEpisode, seat: int) -> list[int]:
        """Names a draw by what it is for, so that no random state has to be kept or restored."""
        return [self.seed, running.plan.seed, running.plan.group, running.plan.sample, seat, self.number]

    def _by_rule(self, running: _RunningEpisode, player: Player, seat: int) -> str:
        rng = np.random.default_rng(self._draw(running, seat))
        if player.name == RANDOM:
            return self.task.random_action(running.episode, seat, rng)
        if not isinstance(self.task, ScriptedTask):
            raise RolloutError(f"{self.task.name} has no scripted player")
        return self.task.scripted_action(running.episode, seat, rng)

    def _request(self, running: _RunningEpisode, player: Player, seat: int, prompt: tuple[int, ...]) -> SampleRequest:
        drawn = int(np.random.SeedSequence(self._draw(running, seat)).generate_state(1, np.uint32)[0])
        room, context = self.task.max_action_tokens, self.settings.context
        if context is not None and (room := min(room, context - len(prompt))) < 1:
            raise RolloutError(
                f"a prompt has {len(prompt)} tokens, the model and its engine take {context} with the answer; "
                "take a task with shorter observations"
            )
        return SampleRequest(player.key, prompt, room, self.settings.temperature, drawn)


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
    episodes = [_RunningEpisode(task, plan) for plan in plans]
    for wave in range(settings.max_waves + 1):
        due = [(running, running.plan.players[seat], seat) for running in episodes for seat in running.to_act()]
        if not due:
            break
        if wave == settings.max_waves:
            late = RolloutError(f"{task.name} did not end within {settings.max_waves} waves of actions")
            for running, *_ in due:
                running.error = late
            break
        _Wave(task, engine, codec, settings, seed, wave).run(due)
    played = [episode for running in episodes if (episode := running.played())]
    return RolloutResult(played, [FailedEpisode(each.plan, each.error) for each in episodes if each.error])


def play(
    task: Task,
    plans: Sequence[EpisodePlan],
    engine: Engine,
    codec: Codec,
    seed: int,
    settings: RolloutSettings = RolloutSettings(),
) -> list[PlayedEpisode]:
    """As `attempt`, where every episode must come to its end: raises what the first that failed raised."""
    result = attempt(task, plans, engine, codec, seed, settings)
    if result.failed:
        raise result.failed[0].error
    return result.played
