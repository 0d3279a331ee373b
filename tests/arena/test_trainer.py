"""The training loop on the tiny model (E1, E8, E19): versions, staleness, what is held, and the end of a phase."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from letters import LettersEpisode, LettersTask
from tiny_arena import NAMES, Arena, opened, tiny_config

from fedmoe.arena.config import EvaluationSection
from fedmoe.arena.learning.learner import Learner, PolicyUpdate
from fedmoe.arena.learning.policies import PERTURBATION
from fedmoe.arena.modes import competitive
from fedmoe.arena.modes.credit import Credit, weighted_rule
from fedmoe.arena.population.pbt import Replacement
from fedmoe.arena.population.rating import Rating
from fedmoe.arena.rollout.episodes import Example, PlayedTurn
from fedmoe.arena.rollout.play import RolloutError
from fedmoe.arena.tasks.task import Lineup, Outcome
from fedmoe.inference.engine import AdapterKey, EngineError, Sample, SampleRequest
from fedmoe.lora.adapter import Adapter

DUEL = LettersTask((2, 2), zero_sum=True, strategies=(), name="test:duel")


def staleness(arena: Arena) -> set[object]:
    return {record["staleness"] for record in arena.kept.of("policy")}


def replace_at(monkeypatch: pytest.MonkeyPatch, iterations: dict[int, tuple[str, str]]) -> None:
    """Competitive mode replaces the first by a copy of the second at these iterations, whatever the ratings."""

    class Wishes(competitive.CompetitiveMode):
        def judge(self, memory, planning, played):  # type: ignore[no-untyped-def]
            wanted = iterations.get(planning.iteration)
            chosen = Replacement(*wanted, "made by the test") if wanted else None
            monkeypatch.setattr(competitive, "choose_replacement", lambda *_, **__: chosen)
            return super().judge(memory, planning, played)

    monkeypatch.setattr("fedmoe.arena.trainer.make_mode", lambda name: Wishes())


@pytest.mark.parametrize("mode", ["cooperative", "competitive", "team_battle", "mixed"])
def test_every_mode_trains_all_policies_at_once_and_versions_rise_e1_e8(mode: str) -> None:
    with opened(tiny_config([(mode, 4)])) as arena:
        before = {name: arena.policies.adapter(name).flat for name in NAMES}
        for iteration in range(4):
            arena.trainer.iterate()
            assert [arena.policies.version(name) for name in NAMES] == [iteration + 1] * 4
        for name in NAMES:
            assert arena.policies.updates(name) == 4
            assert np.abs(arena.policies.adapter(name).flat - before[name]).max() > 1e-3
        found = arena.kept.of("policy")
        assert [(record["iteration"], record["policy"]) for record in found] == [
            (i, n) for i in range(4) for n in NAMES
        ]
        assert all(str(record["mode"]).startswith(mode) and record["grad_norm"] for record in found)


def test_a_game_for_two_trains_everybody_over_moving_baselines() -> None:
    with opened(tiny_config([("competitive", 4)], groups=8), DUEL) as arena:
        arena.iterate(3)
        assert arena.trainer.memory.baselines.baselines
        assert all(arena.policies.updates(name) >= 2 for name in NAMES)


def test_training_finds_what_is_rewarded() -> None:
    config = tiny_config([("competitive", 15)], groups=4, samples=6, learning_rate=0.05)
    config = config.model_copy(update={"evaluation": EvaluationSection(episodes=40)})
    with opened(config) as arena:
        arena.iterate(15)
        found = {one.policy: one for one in arena.trainer.evaluate() if one.opponent == "base"}
        gains = {name: one.gain for name, one in found.items()}
        assert sum(gain.low > 0 for gain in gains.values()) >= 3, gains


class _Broken(LettersEpisode):
    def outcome(self) -> Outcome:
        raise ZeroDivisionError("no score")


class SomeFail(LettersTask):
    """Every second seed breaks when it is scored; with `every` all do."""

    every = False

    def start(self, seed: int, lineup: Lineup) -> LettersEpisode:
        return (_Broken if seed % 2 or self.every else LettersEpisode)(self, seed, lineup)


@pytest.mark.parametrize("mode", ["cooperative", "team_battle", "mixed"])
def test_episodes_that_fail_are_left_out_counted_and_end_nothing(mode: str) -> None:
    with opened(tiny_config([(mode, 2)], groups=6), SomeFail()) as arena:
        arena.trainer.evaluate()
        arena.iterate(2)
        skipped = arena.kept.of("skipped")
        assert {record["where"] for record in skipped} == {"training", "evaluation"}
        assert all("no score" in str(record["reason"]) and record["episodes"] for record in skipped)
        assert [arena.policies.version(name) for name in NAMES] == [2] * 4


def test_an_iteration_of_which_every_episode_fails_ends_the_run_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SomeFail, "every", True)
    reason = "episodes of test:letters failed, the first by ZeroDivisionError"
    with opened(tiny_config([("competitive", 2)]), SomeFail()) as arena, pytest.raises(RolloutError, match=reason):
        arena.trainer.iterate()


@pytest.mark.parametrize("bound", [0, 1])
def test_the_engine_holds_only_what_is_needed(bound: int) -> None:
    with opened(tiny_config([("competitive", 20)], max_staleness=bound, groups=1, samples=2)) as arena:
        for iteration in range(19):
            arena.trainer.iterate()
            newest = {AdapterKey(name, iteration + 1) for name in NAMES}
            ahead = {AdapterKey(name, iteration) for name in NAMES} if bound else set()
            assert arena.engine.loaded() == newest | ahead
            assert set(arena.policies.adapters()) == newest | ahead
        arena.iterate()
        (champion,) = arena.trainer.memory.opponents.opponents[2:]
        assert arena.engine.loaded() == {AdapterKey(name, 20) for name in NAMES}
        assert champion.key in arena.engine.loaded()
        assert len(arena.engine.held) == 21 * len(NAMES), "every version was published once"


@pytest.mark.parametrize(
    ("bound", "versions"), [(0, [0, 1, 2, 3, 4, 5]), (1, [0, 0, 1, 2, 3, 4]), (4, [0, 0, 1, 2, 3, 4])]
)
def test_sampling_ahead_uses_the_version_from_before_the_update(bound: int, versions: list[int]) -> None:
    with opened(tiny_config([("competitive", 6)], max_staleness=bound)) as arena:
        arena.iterate(6)
        for name in NAMES:
            assert arena.engine.versions(name) == versions
        assert staleness(arena) == ({0, 1} if bound else {0})


@pytest.mark.parametrize("bound", [0, 1])
def test_what_was_sampled_has_the_probabilities_of_the_version_it_names(
    bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[PlayedTurn] = []
    update = Learner.update

    def watched(self: Learner, examples: list[Example], max_tokens: int) -> dict[str, PolicyUpdate]:
        turns.extend(one.turn for one in examples if one.policy == "ann")
        return update(self, examples, max_tokens)

    monkeypatch.setattr(Learner, "update", watched)
    with opened(tiny_config([("competitive", 4)], max_staleness=bound, learning_rate=0.1)) as arena:
        arena.iterate(4)
        held = {key: adapter for key, adapter in arena.engine.held.items() if key.name == "ann"}
        for key, adapter in held.items():
            if key not in arena.engine.loaded():
                del arena.engine.held[key]
                arena.engine.load(key, adapter)
        assert {turn.version for turn in turns} == ({0, 1, 2, 3} if bound == 0 else {0, 1, 2})
        for turn in turns:
            own = arena.engine.score(turn.player.key, turn.prompt, turn.tokens)
            np.testing.assert_allclose(own, turn.behaviour, atol=1e-4)
        other = [
            np.abs(arena.engine.score(AdapterKey("ann", t.version + 1), t.prompt, t.tokens) - t.behaviour).max()
            for t in turns
        ]
        assert float(np.mean(other)) > 0.05, "the next version is another one"


def test_learning_and_sampling_the_next_batch_go_on_at_the_same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    learning, sampled = threading.Event(), threading.Event()
    update = Learner.update

    with opened(tiny_config([("competitive", 3)])) as arena:
        sample = arena.engine.sample

        def waiting(requests: list[SampleRequest]) -> list[Sample]:
            if threading.current_thread().name.startswith("sampler") and len(arena.engine.asked):
                assert learning.wait(20), "sampling ahead began only after the update"
            found = sample(requests)
            sampled.set()
            return found

        def slow(self: Learner, examples: list[Example], max_tokens: int) -> dict[str, PolicyUpdate]:
            sampled.clear()
            learning.set()
            assert sampled.wait(20), "the update had to end before sampling went on"
            return update(self, examples, max_tokens)

        monkeypatch.setattr(arena.engine, "sample", waiting)
        monkeypatch.setattr(Learner, "update", slow)
        arena.trainer.iterate()


@pytest.mark.parametrize("bound", [0, 1])
def test_a_replaced_policy_learns_nothing_from_its_predecessor_and_plays_as_itself_at_once(
    bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_at(monkeypatch, {2: ("dee", "ann")})
    with opened(tiny_config([("competitive", 5)], max_staleness=bound)) as arena:
        arena.iterate(2)
        parent = arena.policies.adapter("ann")
        updates = arena.policies.updates("dee")
        arena.trainer.memory.opponents.record("dee", "base", 0.0)
        arena.trainer.iterate()
        child = arena.engine.held[AdapterKey("dee", 3)]
        assert _distance(child, parent) == pytest.approx(PERTURBATION, rel=0.1)
        assert np.array_equal(arena.policies.adapter("dee").flat, child.flat), "nothing was learned on top"
        assert arena.policies.version("dee") == 4
        assert arena.policies.updates("dee") == updates + 1
        assert arena.policies.learner.optimizer_state("dee").steps == 0
        (record,) = [one for one in arena.kept.of("policy") if (one["policy"], one["iteration"]) == ("dee", 2)]
        assert "loss" not in record
        arena.trainer.iterate()
        assert arena.engine.versions("dee")[3] == (3 if bound else 4), "the child's weights, not the predecessor's"
        assert arena.engine.versions("ann")[3] == (2 if bound else 3)
        assert arena.policies.learner.optimizer_state("dee").steps == 1
        assert staleness(arena) <= {0, bound}


def _distance(one: Adapter, other: Adapter) -> float:
    return float(np.linalg.norm(one.flat - other.flat) / np.linalg.norm(other.flat))


def test_a_replacement_is_in_lineage_ratings_and_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    replace_at(monkeypatch, {1: ("dee", "ann")})
    with opened(tiny_config([("competitive", 3)])) as arena:
        arena.trainer.iterate()
        arena.trainer.iterate()
        memory = arena.trainer.memory
        (birth,) = memory.lineage.births
        assert (birth.child, birth.parent, birth.iteration) == (AdapterKey("dee", 2), AdapterKey("ann", 1), 1)
        ann = memory.ratings["ann"]
        assert memory.ratings["dee"] == Rating(ann.mu, memory.ratings["dee"].sigma, 0)
        assert memory.ratings["dee"].sigma > ann.sigma
        assert "dee" not in memory.opponents.results
        decision = arena.kept.of("decision")[-1]
        assert (decision["what"], decision["policy"], decision["iteration"]) == ("replace", "dee", 1)


@pytest.mark.parametrize("bound", [0, 1])
def test_staleness_stays_within_its_bound_when_every_policy_was_replaced_once(
    bound: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = dict(enumerate([("ann", "bob"), ("bob", "cy"), ("cy", "dee"), ("dee", "ann"), ("ann", "cy")], start=1))
    replace_at(monkeypatch, order)
    with opened(tiny_config([("competitive", 10)], max_staleness=bound)) as arena:
        arena.iterate(10)
        assert staleness(arena) == ({0, 1} if bound else {0})
        last = arena.kept.of("policy")[-4:]
        assert {record["staleness"] for record in last} == {bound}, "sampling ahead goes on after replacements too"
        assert [arena.policies.version(name) for name in NAMES] == [12, 11, 11, 11]


def test_the_end_of_a_phase_makes_a_champion_and_baselines_begin_anew() -> None:
    config = tiny_config([("competitive", 2), ("competitive", 3)], groups=8)
    with opened(config, DUEL) as arena:
        arena.trainer.iterate()
        arena.trainer.iterate()
        assert arena.trainer.at_phase_end
        assert arena.trainer.memory.baselines.baselines
        arena.trainer.end_phase()
        assert arena.trainer.memory.baselines.baselines == {}
        memory = arena.trainer.memory
        (champion,) = memory.opponents.opponents[2:]
        leader, _ = memory.ratings.leader(NAMES)
        assert (champion.key, champion.kind) == (AdapterKey(leader, 2), "champion")
        arena.trainer.iterate()
        assert not arena.trainer.at_phase_end
        assert champion.key in arena.engine.loaded(), "a champion stays while its policy goes on"
        assert [arena.engine.versions(name)[-1] for name in NAMES] != [1] * 4


def test_nothing_is_sampled_ahead_into_the_next_phase() -> None:
    with opened(tiny_config([("competitive", 2), ("cooperative", 2)])) as arena:
        arena.iterate(4)
        for name in NAMES:
            assert arena.engine.versions(name) == [0, 0, 2, 2]
        assert [record["mode"] for record in arena.kept.of("team")] == ["competitive"] * 2 + ["cooperative"] * 2


def test_champions_of_the_past_are_evaluated_against() -> None:
    with opened(tiny_config([("competitive", 1), ("competitive", 1)])) as arena:
        arena.iterate(2)
        found = arena.trainer.evaluate()
        champions = [one.label for one in arena.trainer.memory.opponents.opponents[2:]]
        assert {one.opponent for one in found} <= {"base", *champions}
        assert any(one.opponent in champions for one in found)
        assert not any(one.opponent.startswith(f"{one.policy}@") for one in found), "nobody meets its own past self"
        written = arena.kept.of("evaluation")
        assert {record["iteration"] for record in written} == {2}
        assert len(written) == len(found)


def test_what_is_evaluated_first_is_the_base_model() -> None:
    with opened(tiny_config()) as arena:
        found = arena.trainer.evaluate()
        assert [(one.policy, one.opponent) for one in found] == [(name, "base") for name in NAMES]
        assert all(one.gain.mean == 0.0 for one in found)
        assert {record["iteration"] for record in arena.kept.of("evaluation")} == {0}


def test_a_single_policy_has_a_champion_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Solo(competitive.CompetitiveMode):
        def check(self, task: object, policies: int) -> None:
            """Anybody."""

    monkeypatch.setattr("fedmoe.arena.trainer.make_mode", lambda name: Solo())
    monkeypatch.setattr(competitive, "_RULE", weighted_rule(Credit(individual=1.0)))
    with opened(tiny_config([("competitive", 2)], names=("ann",))) as arena:
        arena.iterate(2)
        assert [one.label for one in arena.trainer.memory.opponents.opponents[2:]] == ["ann@2"]


def test_an_engine_that_fails_while_sampling_ahead_ends_the_next_iteration_with_its_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with opened(tiny_config()) as arena:
        sample = arena.engine.sample

        def broken(requests: list[SampleRequest]) -> list[Sample]:
            if arena.engine.asked:
                raise EngineError("made by the test")
            return sample(requests)

        monkeypatch.setattr(arena.engine, "sample", broken)
        arena.trainer.iterate()
        before = arena.policies.adapter("ann")
        with pytest.raises(EngineError, match="made by the test"):
            arena.trainer.iterate()
        assert arena.trainer.iteration == 1
        assert arena.policies.adapter("ann") is before
