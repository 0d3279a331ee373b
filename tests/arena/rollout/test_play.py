"""Episodes in lockstep (E19): who is asked when, what each draw depends on, and what is written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedmoe.arena.rollout.episodes import RANDOM, EpisodePlan, PlayedEpisode, Player
from fedmoe.arena.rollout.play import RolloutError, RolloutSettings, attempt, play
from fedmoe.arena.tasks.task import Episode, Lineup, Outcome, PromptMessage, TaskError, check_actions
from fedmoe.inference.engine import AdapterKey, EngineError, Sample, SampleRequest
from fedmoe.lora.adapter import Adapter


@dataclass
class CountingEpisode:
    """Seat s has 1 + (seed + s) % 3 turns; all seats that have turns left are to act at once."""

    seed: int
    lineup: Lineup
    said: dict[int, list[str]] = field(default_factory=dict)

    def to_act(self) -> tuple[int, ...]:
        return tuple(seat for seat in range(self.lineup.seats) if len(self.said.get(seat, [])) < self.turns(seat))

    def turns(self, seat: int) -> int:
        return 1 + (self.seed + seat) % 3

    def observe(self, seat: int) -> tuple[PromptMessage, ...]:
        return (PromptMessage("user", f"{self.seed} {seat} {self.said.get(seat, [])}"),)

    def act(self, actions: Mapping[int, str]) -> None:
        check_actions(self.to_act(), actions)
        for seat, text in actions.items():
            self.said.setdefault(seat, []).append(text)

    def outcome(self) -> Outcome:
        if self.to_act():
            raise TaskError("not over")
        scores = tuple(float(len(self.said[seat])) / 3 for seat in range(self.lineup.seats))
        return Outcome(scores, tuple(scores[team.seats[0]] for team in self.lineup.teams), (1.0,) * len(scores))


class CountingTask:
    """As long as its seed says."""

    name = "counting"
    seats = (1, 4)
    zero_sum = False
    strategies: tuple[str, ...] = ()
    max_action_tokens = 5

    def __init__(self) -> None:
        self.started: list[CountingEpisode] = []

    def start(self, seed: int, lineup: Lineup) -> Episode:
        self.started.append(CountingEpisode(seed, lineup))
        return self.started[-1]

    def random_action(self, episode: Episode, seat: int, rng: np.random.Generator) -> str:
        assert seat in episode.to_act()
        return f"random {rng.integers(1 << 30)}"


class EndlessTask(CountingTask):
    """Never over."""

    name = "endless"

    def start(self, seed: int, lineup: Lineup) -> Episode:
        episode = super().start(seed, lineup)
        episode.turns = lambda seat: 1 << 30  # type: ignore[attr-defined]
        return episode


class LetterCodec:
    """A token a character."""

    def prompt(self, messages: Sequence[PromptMessage]) -> tuple[int, ...]:
        return tuple(map(ord, messages[-1].text))

    def text(self, tokens: Sequence[int]) -> str:
        return "".join(map(chr, tokens))


class FakeEngine:
    """Answers with what the request's seed, adapter and prompt say, and remembers every batch."""

    def __init__(self) -> None:
        self.batches: list[list[SampleRequest]] = []

    def load(self, key: AdapterKey, adapter: Adapter) -> None:
        raise NotImplementedError

    def unload(self, key: AdapterKey) -> None:
        raise NotImplementedError

    def loaded(self) -> frozenset[AdapterKey]:
        return frozenset()

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        self.batches.append(list(requests))
        return [self._answer(one) for one in requests]

    def _answer(self, one: SampleRequest) -> Sample:
        rng = np.random.default_rng([one.seed, sum(one.prompt), len(str(one.adapter))])
        tokens = tuple(rng.integers(97, 123, 1 + one.seed % one.max_new_tokens).tolist())
        return Sample(tokens, -rng.random(len(tokens)).astype(np.float32), one.seed % 2 == 0)

    def score(self, key: AdapterKey | None, prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


ALICE = Player("alice", AdapterKey("alice", 3), learning=True)
BOB = Player("bob", AdapterKey("bob", 0))
BASE = Player("base", None)
CHANCE = Player(RANDOM, None)


def plan(seed: int, players: Sequence[Player] = (ALICE, BOB), group: int = 0, sample: int = 0) -> EpisodePlan:
    return EpisodePlan(seed, Lineup.alone(len(players)), tuple(players), group, sample)


def played(plans: Sequence[EpisodePlan], seed: int = 1, settings: RolloutSettings | None = None) -> list[PlayedEpisode]:
    return play(CountingTask(), plans, FakeEngine(), LetterCodec(), seed, settings or RolloutSettings())


def said(episode: PlayedEpisode) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    return [(turn.seat, turn.prompt, turn.tokens) for turn in episode.turns]


def test_every_wave_is_one_batch_of_all_seats_that_are_to_act() -> None:
    engine = FakeEngine()
    plans = [plan(0), plan(1), plan(2)]  # turns of the two seats: 1 2, 2 3, 3 1
    play(CountingTask(), plans, engine, LetterCodec(), 1)
    assert [len(batch) for batch in engine.batches] == [6, 4, 2]
    third = [(chr(one.prompt[0]), chr(one.prompt[2]), one.adapter) for one in engine.batches[2]]
    assert third == [("1", "1", BOB.key), ("2", "0", ALICE.key)]


def test_turns_are_written_down_as_they_were_taken() -> None:
    engine = FakeEngine()
    plans = [plan(2), plan(1, (BOB, BASE, ALICE))]
    episodes = play(CountingTask(), plans, engine, LetterCodec(), 1)
    assert [episode.plan for episode in episodes] == plans
    assert [turn.seat for turn in episodes[0].turns] == [0, 1, 0, 0]
    assert [turn.seat for turn in episodes[1].turns] == [0, 1, 2, 0, 1, 1]
    requests = [one for batch in engine.batches for one in batch]
    for episode in episodes:
        assert episode.outcome.completed
        for turn in episode.turns:
            assert turn.player is episode.plan.players[turn.seat]
            (request,) = [one for one in requests if one.prompt == turn.prompt]
            answer = engine._answer(request)
            assert (turn.tokens, turn.stopped) == (answer.tokens, answer.stopped)
            np.testing.assert_array_equal(turn.behaviour, answer.logprobs)
            assert turn.text == LetterCodec().text(turn.tokens)
            assert request.adapter == turn.player.key
            assert turn.version == (-1 if turn.player is BASE else turn.player.key.version if turn.player.key else None)


def test_the_task_hears_what_was_said() -> None:
    task = CountingTask()
    (episode,) = play(task, [plan(1)], FakeEngine(), LetterCodec(), 1)
    for seat, texts in task.started[0].said.items():
        assert [turn.text for turn in episode.turns if turn.seat == seat] == texts
    assert episode.outcome == task.started[0].outcome()


def test_requests_carry_the_settings() -> None:
    engine = FakeEngine()
    play(CountingTask(), [plan(0)], engine, LetterCodec(), 1, RolloutSettings(temperature=0.3))
    assert {(one.temperature, one.max_new_tokens) for batch in engine.batches for one in batch} == {(0.3, 5)}


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3), st.integers(0, 3)), unique=True, min_size=1, max_size=6)
)
def test_an_episode_does_not_depend_on_the_others(named: list[tuple[int, int, int]]) -> None:
    plans = [plan(seed, (ALICE, CHANCE, BOB), group, sample) for seed, group, sample in named]
    together = played(plans)
    for one, episode in zip(plans, together, strict=True):
        assert said(played([one])[0]) == said(episode)
    assert [said(one) for one in played(plans[::-1])[::-1]] == [said(one) for one in together]


def test_every_draw_has_a_seed_of_its_own() -> None:
    engine = FakeEngine()
    plans = [plan(seed, group=group, sample=sample) for seed in range(3) for group in range(2) for sample in range(4)]
    play(CountingTask(), plans, engine, LetterCodec(), 1)
    seeds = [one.seed for batch in engine.batches for one in batch]
    assert len(seeds) == len(set(seeds)) > len(plans) * 2
    other = FakeEngine()
    play(CountingTask(), plans, other, LetterCodec(), 2)
    assert not set(seeds) & {one.seed for batch in other.batches for one in batch}


def test_the_same_seed_gives_the_same_episodes() -> None:
    plans = [plan(seed, (ALICE, CHANCE)) for seed in range(5)]
    assert [said(one) for one in played(plans)] == [said(one) for one in played(plans)]
    assert [said(one) for one in played(plans, seed=2)] != [said(one) for one in played(plans)]


def test_seats_of_chance_act_without_the_engine_and_leave_no_turn() -> None:
    task, engine = CountingTask(), FakeEngine()
    plans = [plan(2, (CHANCE, ALICE)), plan(2, (CHANCE, ALICE), sample=1)]
    episodes = play(task, plans, engine, LetterCodec(), 1)
    assert [[turn.seat for turn in episode.turns] for episode in episodes] == [[1], [1]]
    assert sum(map(len, engine.batches)) == 2
    one, other = (episode.said[0] for episode in task.started)
    assert len(set(one)) == 3
    assert not set(one) & set(other)
    again = CountingTask()
    play(again, plans[:1], FakeEngine(), LetterCodec(), 1)
    assert again.started[0].said[0] == one


def test_chance_alone_needs_no_model() -> None:
    task = CountingTask()
    (episode,) = play(task, [plan(4, (CHANCE, CHANCE))], FakeEngine(), LetterCodec(), 1)
    assert episode.turns == ()
    assert episode.outcome == task.started[0].outcome()


def test_a_task_that_never_ends_is_broken_off_with_its_name() -> None:
    engine = FakeEngine()
    with pytest.raises(RolloutError, match="endless did not end within 7 waves"):
        play(EndlessTask(), [plan(0)], engine, LetterCodec(), 1, RolloutSettings(max_waves=7))
    assert len(engine.batches) == 7


def test_the_last_wave_allowed_may_be_the_last_needed() -> None:
    longest = [plan(2)]  # three waves
    assert played(longest, settings=RolloutSettings(max_waves=3))[0].outcome.completed
    with pytest.raises(RolloutError, match="within 2 waves"):
        played(longest, settings=RolloutSettings(max_waves=2))


@pytest.mark.parametrize("players", [(ALICE,), (ALICE, BOB, BASE)])
def test_another_number_of_players_than_seats_is_refused(players: tuple[Player, ...]) -> None:
    wrong = replace(plan(0), players=players)
    with pytest.raises(RolloutError, match=f"2 seats need as many players, got {len(players)}"):
        played([plan(1), wrong])


def test_no_plans_give_no_episodes() -> None:
    engine = FakeEngine()
    assert play(CountingTask(), [], engine, LetterCodec(), 1) == []
    assert engine.batches == []


def test_what_the_engine_refuses_is_not_hidden() -> None:
    class Refusing(FakeEngine):
        def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
            raise EngineError("alice@3 is not loaded")

    with pytest.raises(EngineError, match="alice@3"):
        play(CountingTask(), [plan(0)], Refusing(), LetterCodec(), 1)


class FragileTask(CountingTask):
    """Breaks in one place for odd seeds."""

    name = "fragile"

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place

    def start(self, seed: int, lineup: Lineup) -> Episode:
        if seed % 2 and self.place == "start":
            raise KeyError("no such level")
        episode = super().start(seed, lineup)
        if seed % 2 and self.place != "random_action":
            setattr(episode, self.place, self._broken)
        return episode

    def random_action(self, episode: Episode, seat: int, rng: np.random.Generator) -> str:
        if self.place == "random_action" and self.started[-1].seed % 2:
            raise KeyError("no such level")
        return super().random_action(episode, seat, rng)

    def _broken(self, *arguments: object) -> None:
        raise KeyError("no such level")


@pytest.mark.parametrize("place", ["start", "to_act", "observe", "act", "outcome"])
def test_an_episode_that_fails_ends_alone_and_is_counted(place: str) -> None:
    """Fault 83."""
    plans = [plan(0), plan(1), plan(2), plan(3, sample=1)]
    found = attempt(FragileTask(place), plans, FakeEngine(), LetterCodec(), 1)
    assert [one.plan for one in found.failed] == [plans[1], plans[3]]
    assert found.reason == "KeyError: 'no such level'"
    whole = play(CountingTask(), [plans[0], plans[2]], FakeEngine(), LetterCodec(), 1)
    assert [said(one) for one in found.played] == [said(one) for one in whole]
    found.check_some("fragile")
    with pytest.raises(KeyError, match="no such level"):
        play(FragileTask(place), plans, FakeEngine(), LetterCodec(), 1)


@pytest.mark.parametrize(
    "wrong",
    [
        Outcome((1e30, 0.0), (0.0, 0.0), (1.0, 1.0)),
        Outcome((float("nan"), 0.0), (0.0, 0.0), (1.0, 1.0)),
        Outcome((0.0, 0.0), (-1.0, 0.0), (1.0, 1.0)),
        Outcome((0.0,), (0.0, 0.0), (1.0, 1.0)),
        Outcome((0.0, 0.0), (0.0, 0.0), (1.0, 1.0), without={0: float("inf")}),
        Outcome((0.0, 0.0), (0.0, 0.0), (1.0, 1.0), without={5: 0.5}),
        Outcome((0.0, 0.0), (0.0, 0.0), (1.0, 1.0), turn_scores={0: (0.5, 2.0)}),
    ],
)
def test_an_episode_with_a_score_that_is_none_fails_alone_and_is_never_a_zero_83(wrong: Outcome) -> None:
    class Lying(CountingTask):
        def start(self, seed: int, lineup: Lineup) -> Episode:
            episode = super().start(seed, lineup)
            if seed % 2:
                episode.outcome = lambda: wrong  # type: ignore[method-assign]
            return episode

    found = attempt(Lying(), [plan(0), plan(1)], FakeEngine(), LetterCodec(), 1)
    assert ([one.plan.seed for one in found.played], [one.plan.seed for one in found.failed]) == ([0], [1])
    assert "score" in found.reason


def test_chance_that_fails_ends_its_episode_only() -> None:
    found = attempt(FragileTask("random_action"), [plan(0), plan(1, (CHANCE, BOB))], FakeEngine(), LetterCodec(), 1)
    assert ([one.plan.seed for one in found.played], [one.plan.seed for one in found.failed]) == ([0], [1])


def test_where_every_episode_fails_the_reason_is_told() -> None:
    found = attempt(FragileTask("act"), [plan(1), plan(3)], FakeEngine(), LetterCodec(), 1)
    with pytest.raises(RolloutError, match="all 2 episodes of fragile failed, the first by KeyError: 'no such level'"):
        found.check_some("fragile")


def test_a_prompt_without_room_for_an_answer_fails_and_a_long_one_gets_what_is_left() -> None:
    engine, length = FakeEngine(), len("0 0 []")
    found = attempt(CountingTask(), [plan(0, (ALICE,))], engine, LetterCodec(), 1, RolloutSettings(context=length + 2))
    assert not found.failed
    assert [one.max_new_tokens for one in engine.batches[0]] == [2]
    full = RolloutSettings(context=length)
    found = attempt(CountingTask(), [plan(0, (ALICE,))], FakeEngine(), LetterCodec(), 1, full)
    assert "6 tokens, the model and its engine take 6" in found.reason


def test_a_machine_without_memory_is_no_episodes_fault() -> None:
    class Full(FragileTask):
        def _broken(self, *arguments: object) -> None:
            raise MemoryError

    with pytest.raises(MemoryError):
        attempt(Full("act"), [plan(0), plan(1)], FakeEngine(), LetterCodec(), 1)
