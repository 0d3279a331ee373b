"""Arena sites in this process on the tiny model, a coordinator on a real socket, and a road that can break."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import numpy as np
from live import listening
from support import free_port

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.league.league import League, join_league, learning_rate_only
from fedmoe.arena.learning.adapt import AdaptRules
from fedmoe.arena.learning.config import LearningConfig
from fedmoe.arena.learning.learner import Learner
from fedmoe.arena.learning.policies import Policies
from fedmoe.arena.rollout.chat import ChatCodec
from fedmoe.arena.tasks.task import Lineup, Outcome, PromptMessage, TaskError
from fedmoe.arena.trainer import Trainer
from fedmoe.config import CoordinatorConfig
from fedmoe.distributed_coordinator import DistributedCoordinator
from fedmoe.federation.events import UpdateAccepted
from fedmoe.inference.engine import AdapterKey
from fedmoe.inference.transformers_engine import TransformersEngine
from fedmoe.lora.adapter import Adapter, FloatVector, Layout
from fedmoe.lora.codec import decode
from fedmoe.models.base import load_base
from fedmoe.models.multilora import MultiLora
from fedmoe.runtime.records import RecordValue
from fedmoe.wire.client import CoordinatorClient

PUSH = "/push_expert_update"
RANK, ALPHA = 2, 4.0


class LettersEpisode:
    """Every seat says one thing, all at once; the share of lower-case letters in it is its score."""

    def __init__(self, lineup: Lineup) -> None:
        self._lineup = lineup
        self._said: dict[int, str] = {}

    def to_act(self) -> tuple[int, ...]:
        return () if self._said else tuple(range(self._lineup.seats))

    def observe(self, seat: int) -> tuple[PromptMessage, ...]:
        return (PromptMessage("user", "Say letters."),)

    def act(self, actions: Mapping[int, str]) -> None:
        self._said = dict(actions)

    def outcome(self) -> Outcome:
        if not self._said:
            raise TaskError("nobody has spoken yet")
        scores = tuple(_share(self._said[seat]) for seat in range(self._lineup.seats))
        teams = tuple(max(scores[seat] for seat in team.seats) for team in self._lineup.teams)
        return Outcome(scores, teams, tuple(1.0 for _ in scores))


def _share(text: str) -> float:
    return sum(letter.isascii() and letter.islower() for letter in text) / max(1, len(text))


class Letters:
    """The smallest task with rivals."""

    name = "letters"
    seats = (1, 8)
    zero_sum = False
    strategies: tuple[str, ...] = ()
    max_action_tokens = 3

    def start(self, seed: int, lineup: Lineup) -> LettersEpisode:
        return LettersEpisode(lineup)

    def random_action(self, episode: object, seat: int, rng: np.random.Generator) -> str:
        return "abc"


class Forgetful:
    """Takes records and keeps none."""

    def write(self, kind: str, **values: RecordValue) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing to release."""


class Road(httpx2.BaseTransport):
    """The way to the coordinator: `closed`, nothing gets through; the answers to the next `lose` pushes are lost."""

    def __init__(self) -> None:
        self.closed = False
        self.lose = 0
        self.requests: list[str] = []
        self._inner = httpx2.HTTPTransport(verify=False)

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if self.closed:
            raise httpx2.ConnectError("closed by the test", request=request)
        self.requests.append(request.url.path)
        response = self._inner.handle_request(request)
        if request.url.path == PUSH and self.lose:
            self.lose -= 1
            response.read()
            response.close()
            raise httpx2.ReadError("answer lost by the test", request=request)
        return response

    def close(self) -> None:
        self._inner.close()


@dataclass
class House:
    """A coordinator with what a test looks at."""

    folder: Path
    coordinator: DistributedCoordinator
    url: str

    def version(self, expert: str) -> int:
        return self.coordinator.service.coordinator.expert(expert).version

    def weights(self, expert: str) -> FloatVector:
        return self.coordinator.service.coordinator.expert(expert).state.weights

    def layout(self, expert: str) -> Layout:
        return self.coordinator.service.coordinator.expert(expert).manifest.layout

    def updates(self) -> list[UpdateAccepted]:
        """Every accepted update, in the journal's order."""
        events = self.coordinator.service.journal.events()
        return [event for event in events if isinstance(event, UpdateAccepted)]

    def delta(self, update: UpdateAccepted) -> FloatVector:
        """What an update brought, as it travelled."""
        file = next((self.folder / "blobs").rglob(f"{update.digest}*"))
        return decode(file.read_bytes(), self.layout(update.expert)).flat


@contextmanager
def running_house(folder: Path, **options: object) -> Iterator[House]:
    config = CoordinatorConfig(state_dir=str(folder), **({"min_sync_interval": 0.0} | options))  # type: ignore[arg-type]
    coordinator = DistributedCoordinator(config)
    coordinator.service.start()
    try:
        with listening(coordinator.app, free_port()) as server:
            yield House(folder, coordinator, server.url)
    finally:
        coordinator.close()


@dataclass(frozen=True)
class Saved:
    """A checkpoint in memory."""

    state: dict[str, object]
    league: Mapping[str, object]
    adapters: dict[AdapterKey, Adapter]
    moments: dict[str, FloatVector]


@dataclass
class Site:
    """One arena with its policies, to be opened, killed and opened again on the same state folder."""

    url: str
    folder: Path
    names: tuple[str, ...] = ("solver", "critic")
    every: int = 1
    iterations: int = 100
    rank: int = RANK
    worker: str = "site"
    patience: float = 5.0
    road: Road = field(default_factory=Road)

    def open(self, saved: Saved | None = None) -> Site:
        """Begin, or go on after `saved`, as a run does."""
        self.config = config = self._config()
        section = config.federation
        assert section is not None
        base = load_base("tiny", "cpu", "fp32")
        multi = MultiLora(base.model)
        self.engine = TransformersEngine(base, multi)
        learner = Learner(base, multi, LearningConfig(learning_rate=5e-3, warmup_steps=1))
        self.policies = Policies(learner, self.engine, 1, learning_rate_only(AdaptRules(), config.policies))
        self.trainer = Trainer(config, Letters(), self.policies, self.engine, ChatCodec(base.tokenizer), Forgetful())
        client = CoordinatorClient(self.url, transport=self.road, attempts=1)
        self.league: League = join_league(
            client, section, config.policies, self.iterations, base, self.policies, self.folder, self.patience
        )
        self.trainer.may_sample_ahead = lambda following: not self.league.due(following)
        try:
            self._populate(saved)
        except BaseException:
            self.close()
            raise
        return self

    def _populate(self, saved: Saved | None) -> None:
        empty = Adapter.zeros(self.policies.learner.layout(self.rank), ALPHA)
        for name in self.names:
            self.policies.add(name, empty if saved else self.league.start(name))
        if saved is not None:
            self._restore(saved)

    def _config(self) -> ArenaConfig:
        return ArenaConfig.model_validate(
            {
                "base_model": "tiny",
                "phases": [{"mode": "competitive", "iterations": self.iterations}],
                "policies": {"count": len(self.names), "names": self.names, "rank": self.rank, "alpha": ALPHA},
                "learning": {"groups": 4, "samples": 4},
                "evaluation": {"episodes": 4},
                "federation": {"url": self.url, "every": self.every, "worker_id": self.worker},
            }
        )

    def _restore(self, saved: Saved) -> None:
        policies = saved.state["policies"]
        assert isinstance(policies, Mapping)
        self.policies.restore(policies, saved.adapters, saved.moments)
        behind = self.league.rejoin(saved.league)
        self.trainer.resume({**saved.state, "sampling_with": None} if behind else saved.state)

    def saved(self) -> Saved:
        """A checkpoint."""
        return Saved(self.trainer.state(), self.league.state(), self.policies.adapters(), self.policies.moments())

    def exchange(self) -> None:
        self.league.exchange(self.trainer.memory, self.trainer.iteration)

    def iterate(self, count: int = 1) -> Site:
        """Train as a run does, exchange included."""
        for _ in range(count):
            self.trainer.iterate()
            if self.league.due(self.trainer.iteration):
                self.exchange()
        return self

    def local(self, name: str) -> FloatVector:
        return self.policies.adapter(name).flat

    def learn(self, name: str, change: FloatVector) -> None:
        """Stands for an iteration that changed a policy so."""
        before = self.policies.adapter(name)
        self.policies.adopt(name, Adapter(before.layout, before.alpha, before.flat + change))

    def learn_numbers(self, name: str, numbers: Sequence[int], value: float = 1.0) -> None:
        """Stands for an iteration that brings some numbers to `value`, wherever they were."""
        change = np.zeros_like(self.local(name))
        change[list(numbers)] = value - self.local(name)[list(numbers)]
        self.learn(name, change)

    def close(self) -> None:
        """End; as much of a killed process's end as this process needs: locks and threads."""
        self.league.close()
        self.trainer.close()
        self.engine.close()
