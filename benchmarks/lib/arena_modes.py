"""One run of the benchmark of modes: training up to a number of sampled tokens, then what came of it, question by
question. Raw scores are kept, so that tables and intervals can be made anew without computing."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedmoe.arena.config import ArenaConfig, EvaluationSection, Phase
from fedmoe.arena.rollout.chat import ChatCodec
from fedmoe.arena.rollout.episodes import EpisodePlan, PlayedEpisode, Player
from fedmoe.arena.rollout.evaluate import CHANCE
from fedmoe.arena.rollout.play import RolloutSettings, play
from fedmoe.arena.run.batched_records import BatchedRecords
from fedmoe.arena.run.checkpoint import load_newest
from fedmoe.arena.run.options import RunOptions, Stop
from fedmoe.arena.run.run import run_arena
from fedmoe.arena.tasks.registry import make_task
from fedmoe.arena.tasks.task import HELD_OUT, Lineup, Task, question_of
from fedmoe.inference.engine import AdapterKey
from fedmoe.inference.transformers_engine import TransformersEngine
from fedmoe.models.base import ChatTemplate, load_base
from fedmoe.models.multilora import MultiLora
from fedmoe.models.sampling import SamplingLimits
from fedmoe.runtime.records import RecordValue

#: The untrained model, measured once a seed.
BASE = "base"
#: More than any budget of tokens lets happen.
_MANY_ITERATIONS = 100_000
#: How many seeds are looked through for one more question that was not seen.
_SEARCH = 100


@dataclass(frozen=True)
class Measures:
    """What is measured: `tokens` sampled a run; different `questions`, of which `validation` only choose the best
    policy and `drafted` others are also voted on after drafts; `game`, a TextArena id, with `deals` played in both
    seatings against the player that moves at random.

    Moves are sampled at `game_temperature`: at 1, as it was trained, the untrained model hardly makes a legal move, so
    there would be nothing that training could spoil.
    """

    tokens: int
    questions: int
    validation: int
    drafted: int
    game: str
    deals: int
    game_temperature: float = 0.1


class TokenBudget:
    """A writer of records that ends a run after the iteration in which the budget of sampled tokens is used up."""

    def __init__(self, tokens: int) -> None:
        self.stop = Stop()
        self.sampled = self.iterations = 0
        self._tokens = tokens

    @contextmanager
    def __call__(self, records: BatchedRecords, folder: Path, limit: object) -> Iterator[TokenBudget]:
        """Look on while a run goes."""
        self._records = records
        yield self

    def write(self, kind: str, **values: RecordValue) -> None:
        """Count, and keep the record."""
        self._records.write(kind, **values)
        if kind == "timing":
            self.iterations += 1
            self.sampled += int(str(values["tokens"]))
            if self.sampled >= self._tokens:
                self.stop.ask(f"{self.sampled} tokens were sampled")

    def close(self) -> None:
        """Nothing is held."""


def train(config: ArenaConfig, mode: str, seed: int, tokens: int, folder: Path) -> dict[str, object]:
    """Train from untrained adapters until `tokens` were sampled; returns the cost. The checkpoint is in `folder`."""
    budget = TokenBudget(tokens)
    chosen = config.model_copy(
        update={
            "seed": seed,
            "phases": (Phase(mode=mode, iterations=_MANY_ITERATIONS),),
            "evaluation": EvaluationSection(episodes=2),
            "checkpoint": config.checkpoint.model_copy(update={"every": _MANY_ITERATIONS}),
        }
    )
    began, processor = time.perf_counter(), time.process_time()
    run_arena(chosen, RunOptions(folder), budget.stop, budget)
    return {
        "tokens": budget.sampled,
        "iterations": budget.iterations,
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
    }


def different_questions(task: Task, wanted: int) -> list[int]:
    """Held-out seeds with `wanted` different questions, or as many as there are."""
    seeds: dict[str, int] = {}
    fruitless = 0
    for seed in range(HELD_OUT, HELD_OUT + wanted * _SEARCH):
        question = question_of(task, task.start(seed, Lineup.alone(1)), seed)
        fruitless = fruitless + 1 if question in seeds else 0
        seeds.setdefault(question, seed)
        if len(seeds) == wanted or fruitless == _SEARCH * 2:
            break
    return list(seeds.values())


@dataclass
class Examination:
    """Players before held-out questions and in a game; `seed` decides the draws of all of them alike."""

    config: ArenaConfig
    measures: Measures
    seed: int

    def of(self, checkpoint: Path | None) -> dict[str, object]:
        """The scores of the four policies of a run folder, or of four draws of the base model."""
        chat = ChatTemplate.from_options(self.config.chat_template, self.config.chat_template_kwargs)
        base = load_base(self.config.base_model, chat=chat)
        engine = TransformersEngine(base, MultiLora(base.model), SamplingLimits(rows=self.config.engine.rows))
        self._engine, self._codec = engine, ChatCodec(base.tokenizer, self.config.learning.max_prompt_tokens)
        count = self.config.policies.count
        players = [Player(BASE, None)] * count if checkpoint is None else _loaded(engine, checkpoint)
        task = make_task(self.config.task.name, self.config.task.options)
        seeds = different_questions(task, self.measures.questions)
        cut = len(seeds) * self.measures.validation // self.measures.questions
        began = time.process_time()
        try:
            alone = self._answers(task, seeds, players, "independent")
            found: dict[str, object] = {
                "names": [player.name for player in players],
                "validation": [[one.outcome.seat_scores[seat] for one in alone[:cut]] for seat in range(count)],
                "test": [[one.outcome.seat_scores[seat] for one in alone[cut:]] for seat in range(count)],
                "vote": [one.outcome.team_scores[0] for one in alone[cut:]],
                "tokens_an_answer": _tokens_an_answer(alone),
            }
            if "shared" in task.strategies:
                drafted = self._answers(task, seeds[cut:][: self.measures.drafted], players, "shared")
                found["drafted_vote"] = [one.outcome.team_scores[0] for one in drafted]
            found |= self._games(list(dict.fromkeys(players)))
        finally:
            engine.close()
        return found | {"evaluation_processor_seconds": round(time.process_time() - began, 1)}

    def _answers(self, task: Task, seeds: Sequence[int], team: Sequence[Player], strategy: str) -> list[PlayedEpisode]:
        """All players before every question, as one team: each seat has a score of its own, and their vote one."""
        lineup = Lineup.together(len(team), strategy if strategy in task.strategies else "")
        plans = [EpisodePlan(seed, lineup, tuple(team), index) for index, seed in enumerate(seeds)]
        return self._play(task, plans, self.config.learning.temperature)

    def _games(self, players: Sequence[Player]) -> dict[str, object]:
        """Per player and deal, the mean of both seatings: points against chance, and the share of legal moves."""
        task, deals = make_task(f"textarena:{self.measures.game}"), self.measures.deals
        plans = []
        for player in players:
            for game in range(2 * deals):
                seated = (player, CHANCE) if game % 2 == 0 else (CHANCE, player)
                plans.append(EpisodePlan(HELD_OUT + game // 2, Lineup.alone(2), seated, game))
        played = self._play(task, plans, self.measures.game_temperature)
        shape = (len(players), deals, 2)
        own = [one.plan.players.index(CHANCE) ^ 1 for one in played]
        points = np.reshape([one.outcome.seat_scores[seat] for one, seat in zip(played, own, strict=True)], shape)
        legal = np.reshape([one.outcome.valid[seat] for one, seat in zip(played, own, strict=True)], shape)
        return {"game": points.mean(axis=2).tolist(), "legal": legal.mean(axis=2).tolist()}

    def _play(self, task: Task, plans: Sequence[EpisodePlan], temperature: float) -> list[PlayedEpisode]:
        return play(task, plans, self._engine, self._codec, self.seed, RolloutSettings(temperature))


def _loaded(engine: TransformersEngine, folder: Path) -> list[Player]:
    """Every policy of a run at its newest version."""
    loaded = load_newest(folder / "checkpoints")
    if loaded is None:
        raise SystemExit(f"{folder} has no checkpoint; remove it and start again")
    policies = loaded.state.state["policies"]
    assert isinstance(policies, Mapping)
    keys = [AdapterKey(name, one["version"]) for name, one in policies.items()]
    for key in keys:
        engine.load(key, loaded.state.adapters[str(key)])
    return [Player(key.name, key) for key in keys]


def _tokens_an_answer(played: Sequence[PlayedEpisode]) -> float:
    return float(np.mean([len(turn.tokens) for one in played for turn in one.turns]))
