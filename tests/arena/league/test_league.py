"""Arenas on several machines: policies are experts of one coordinator, and meet each other's as opponents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from league_sites import ALPHA, RANK, House, Site, running_house
from structlog.testing import capture_logs

from fedmoe.arena.config import PolicySection
from fedmoe.arena.league import league as federation
from fedmoe.arena.league.league import learning_rate_only
from fedmoe.arena.league.link import FederationError
from fedmoe.arena.learning.adapt import AdaptiveLora, AdaptRules, TuningParameters, UpdateEffect
from fedmoe.coordinator import seed_of
from fedmoe.inference.engine import AdapterKey, EngineError
from fedmoe.lora.adapter import Adapter, FloatVector, initial_adapter
from fedmoe.lora.manifest import BaseModel, Manifest
from fedmoe.models.base import load_base
from fedmoe.models.training_config import LoraConfig, TrainingConfig
from fedmoe.qwen_finetune import QwenLoRAExpert
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with running_house(tmp_path / "coordinator") as running:
        yield running


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.wire.delivery._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("fedmoe.wire.delivery._LONGEST_PAUSE", 0.05)


def foreign(site: Site) -> list[str]:
    return [one.label for one in site.trainer.memory.opponents.opponents if one.kind == "foreign"]


def loaded(site: Site) -> set[str]:
    return {str(key) for key in site.engine.loaded()}


def make_change(site: Site, name: str, seed: int) -> FloatVector:
    return np.random.default_rng(seed).normal(0, 0.01, site.local(name).size).astype(np.float32)


def test_a_policy_begins_with_the_a_that_the_coordinator_draws(house: House, tmp_path: Path) -> None:
    site = Site(house.url, tmp_path / "a").open()
    for name in site.names:
        layout = site.policies.adapter(name).layout
        np.testing.assert_array_equal(site.local(name), initial_adapter(layout, ALPHA, seed_of(name)).flat)
    site.close()


def test_an_ordinary_worker_may_train_the_same_expert(house: House, tmp_path: Path) -> None:
    expert = QwenLoRAExpert(load_base("tiny", "cpu", "fp32"), LoraConfig(RANK, ALPHA), TrainingConfig())
    with CoordinatorClient(house.url) as client:
        client.register("solver", "worker", expert.manifest)
    site = Site(house.url, tmp_path / "a").open()
    assert house.coordinator.service.coordinator.manifest == expert.manifest
    site.close()


def test_training_reaches_the_coordinator_update_by_update(house: House, tmp_path: Path) -> None:
    site = Site(house.url, tmp_path / "a").open()
    before = {name: [site.local(name)] for name in site.names}
    for _ in range(3):
        site.iterate()
        for name in site.names:
            before[name].append(site.local(name))
    for name in site.names:
        weights, updates = before[name], [update for update in house.updates() if update.expert == name]
        assert house.version(name) == len(updates) == 3
        for update, old, new in zip(updates, weights, weights[1:], strict=False):
            np.testing.assert_allclose(house.delta(update), new - old, atol=1e-7)
        np.testing.assert_allclose(house.weights(name), weights[-1], atol=1e-7)
        assert [update.info["steps"] for update in updates] == [1, 2, 3]
    site.close()


def test_two_sites_meet_each_others_experts(house: House, tmp_path: Path) -> None:
    one = Site(house.url, tmp_path / "a", worker="one").open()
    other = Site(house.url, tmp_path / "b", ("alpha", "beta"), worker="other").open()
    one.iterate()
    other.iterate()
    assert foreign(other) == ["critic@1", "solver@1"]
    one.iterate(6)
    assert foreign(one) == ["alpha@1", "beta@1"]
    np.testing.assert_array_equal(one.policies.adapters()[AdapterKey("alpha", 1)].flat, house.weights("alpha"))
    met = one.trainer.memory.opponents.results
    assert {"alpha@1", "beta@1"} & {name for known in met.values() for name in known}
    found = {(comparison.policy, comparison.opponent) for comparison in one.trainer.evaluate()}
    assert found == {(name, rival) for name in one.names for rival in ("base", "beta@1")}
    one.close()
    other.close()


def test_a_newer_version_takes_the_place_of_the_one_before(house: House, tmp_path: Path) -> None:
    one = Site(house.url, tmp_path / "a", worker="one").open()
    other = Site(house.url, tmp_path / "b", ("alpha", "beta"), worker="other").open()
    other.iterate()
    one.exchange()
    ratings = one.trainer.memory.ratings
    ratings.ensure("alpha@1")
    ratings.ensure("solver")
    ratings.rate([["alpha@1"], ["solver"]], [1.0, 0.0])
    strength = ratings["alpha@1"].mu
    other.iterate()
    one.exchange()
    assert foreign(one) == ["alpha@2", "beta@2"]
    assert loaded(one) == {"solver@0", "critic@0", "alpha@2", "beta@2"}
    assert ("alpha@1" in ratings, ratings["alpha@2"].mu) == (False, strength)
    one.close()
    other.close()


def test_other_weights_under_a_number_that_was_met_are_another_opponent(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that was restored gives numbers once more."""
    one = Site(house.url, tmp_path / "a", worker="one").open()
    other = Site(house.url, tmp_path / "b", ("alpha", "beta"), worker="other").open()
    other.iterate()
    one.exchange()
    client = one.league._client
    listing, pulled = client.list_experts(), client.pull_expert("alpha")
    assert pulled is not None
    changed = replace(pulled, weights=pulled.weights + np.float32(1), digest="9" * 64)
    experts = [e.model_copy(update={"digest": "9" * 64}) if e.name == "alpha" else e for e in listing.experts]
    with monkeypatch.context() as patch:
        patch.setattr(client, "list_experts", lambda: listing.model_copy(update={"experts": experts}))
        patch.setattr(client, "pull_expert", lambda *_, **__: changed)
        one.league.meet(one.trainer.memory)
    assert foreign(one) == ["beta@1", "alpha@2"]
    np.testing.assert_array_equal(one.policies.adapters()[AdapterKey("alpha", 2)].flat, changed.weights)
    one.close()
    other.close()


def test_an_expert_that_has_not_learned_is_no_opponent(house: House, tmp_path: Path) -> None:
    other = Site(house.url, tmp_path / "b", ("alpha", "beta")).open()
    site = Site(house.url, tmp_path / "a").open()
    site.exchange()
    assert foreign(site) == []
    other.learn("beta", make_change(other, "beta", 1))
    other.exchange()
    site.league.meet(site.trainer.memory)
    assert foreign(site) == ["beta@1"]
    site.close()
    other.close()


def test_those_who_do_not_fit_are_named(house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(federation, "MOST_OPPONENTS", 2)
    other = Site(house.url, tmp_path / "b", ("x", "y", "z")).open()
    for name in ("z", "y"):
        other.learn(name, make_change(other, name, 1))
    other.exchange()
    site = Site(house.url, tmp_path / "a").open()
    site.exchange()
    other.learn("x", make_change(other, "x", 1))
    other.learn("y", make_change(other, "y", 2))
    other.exchange()
    with capture_logs() as lines:
        site.exchange()
        site.exchange()
    assert foreign(site) == ["z@1", "y@2"]
    assert [line["names"] for line in lines if line["event"] == "opponents_left_out"] == ["x"]
    site.close()
    other.close()


def test_an_opponent_for_whom_the_engine_has_no_room_is_left_out_with_a_warning(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Site(house.url, tmp_path / "b", ("alpha", "beta")).open().iterate().close()
    site = Site(house.url, tmp_path / "a").open()

    def load(key: AdapterKey, adapter: Adapter) -> None:
        raise EngineError("full")

    with monkeypatch.context() as patch, capture_logs() as lines:
        patch.setattr(site.engine, "load", load)
        site.exchange()
    assert [line["expert"] for line in lines if line["event"] == "federation_refused"] == ["alpha", "beta"]
    assert foreign(site) == []
    site.exchange()
    assert foreign(site) == ["alpha@1", "beta@1"]
    site.close()


def test_two_sites_that_train_one_expert_go_on_from_the_sum(house: House, tmp_path: Path) -> None:
    one = Site(house.url, tmp_path / "a", worker="one").open()
    other = Site(house.url, tmp_path / "b", worker="other").open()
    start = one.local("solver")
    changes = [make_change(one, "solver", seed) for seed in (1, 2)]
    one.learn("solver", changes[0])
    other.learn("solver", changes[1])
    one.exchange()
    other.exchange()
    one.exchange()
    stale = np.float32(2**-0.5)  # the second update was made from a version that is one behind
    for weights in (house.weights("solver"), one.local("solver"), other.local("solver")):
        np.testing.assert_allclose(weights, start + changes[0] + stale * changes[1], atol=1e-6)
    one.close()
    other.close()


def test_training_and_taking_over_alternate_without_anything_sampled_in_between(house: House, tmp_path: Path) -> None:
    one = Site(house.url, tmp_path / "a", worker="one", every=2, iterations=6).open()
    other = Site(house.url, tmp_path / "b", worker="other", every=2, iterations=6).open()
    for _ in range(3):
        one.iterate(2)
        other.iterate(2)
    one.exchange()
    for name in one.names:
        assert house.version(name) == 6
        np.testing.assert_allclose(one.local(name), other.local(name), atol=1e-6)
        np.testing.assert_allclose(one.local(name), house.weights(name), atol=1e-6)
        assert one.policies.version(name) > one.policies.updates(name) == 6
    one.close()
    other.close()


def test_a_coordinator_that_is_away_is_told_once_and_gets_everything_later(house: House, tmp_path: Path) -> None:
    site = Site(house.url, tmp_path / "a").open()
    start = site.local("solver")
    site.iterate()
    site.road.closed = True
    with capture_logs() as lines:
        site.iterate(3)
    assert [line["event"] for line in lines if line["log_level"] != "info"] == ["coordinator_away"]
    assert (house.version("solver"), site.trainer.iteration) == (1, 4)
    site.road.closed = False
    with capture_logs() as lines:
        site.iterate()
    assert "coordinator_back" in [line["event"] for line in lines]
    np.testing.assert_allclose(house.weights("solver"), site.local("solver"), atol=1e-6)
    assert not np.array_equal(start, site.local("solver"))
    site.close()


def test_answers_that_are_lost_neither_stop_the_training_nor_count_twice(house: House, tmp_path: Path) -> None:
    site = Site(house.url, tmp_path / "a", patience=0.2).open()
    site.road.lose = 1000
    site.iterate(2)
    assert house.version("solver") == 1
    site.road.lose = 0
    site.iterate(2)
    site.exchange()
    np.testing.assert_allclose(house.weights("solver"), site.local("solver"), atol=1e-6)
    site.close()


def test_a_refused_expert_does_not_hold_up_the_others(house: House, tmp_path: Path) -> None:
    site = Site(house.url, tmp_path / "a").open()
    site.learn_numbers("solver", range(10), 1e12)
    site.learn("critic", make_change(site, "critic", 1))
    with capture_logs() as lines:
        site.exchange()
    refused = [(line["expert"], line["code"]) for line in lines if line["event"] == "federation_refused"]
    assert refused == [("solver", "norm_too_large")]
    assert (house.version("solver"), house.version("critic")) == (0, 1)
    site.close()


def test_the_least_interval_of_the_coordinator_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By the league itself; that the coordinator insists on it is another matter.
    monkeypatch.setattr("fedmoe.server.access.uploads.seconds_early", lambda *_: 0.0)
    with running_house(tmp_path / "coordinator", min_sync_interval=3600.0) as house:
        site = Site(house.url, tmp_path / "a", iterations=3).open()
        site.iterate(2)
        assert house.version("solver") == 1
        site.iterate()  # the end, where nothing may be left behind
        assert house.version("solver") == 2
        site.close()


@pytest.mark.parametrize("rank", [1, 3])
def test_policies_of_another_kind_are_refused_before_anything_starts(house: House, tmp_path: Path, rank: int) -> None:
    Site(house.url, tmp_path / "a").open().close()
    with pytest.raises(FederationError, match=rf"rank: expected 2, got {rank}.*policies\.rank \(2\)"):
        Site(house.url, tmp_path / "b", rank=rank).open()
    assert not (tmp_path / "b").exists()


def test_another_base_model_is_refused(house: House, tmp_path: Path) -> None:
    tiny = load_base("tiny", "cpu", "fp32").identity
    layout = QwenLoRAExpert(load_base("tiny", "cpu", "fp32"), LoraConfig(RANK, ALPHA), TrainingConfig()).manifest.layout
    other = Manifest(BaseModel("other", "1", "a" * 64, tiny.tokenizer_hash), layout, ALPHA)
    with CoordinatorClient(house.url) as client:
        client.register("python", "worker", other)
    with pytest.raises(FederationError, match=r"base weights_hash.*Set base_model \(other\)"):
        Site(house.url, tmp_path / "a").open()


def test_a_wrong_token_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with (
        running_house(tmp_path / "c", token="join-token-of-32-characters-00000") as house,
        pytest.raises(RefusedError, match="token"),
    ):
        Site(house.url, tmp_path / "a").open()


def test_a_new_run_needs_the_coordinator(tmp_path: Path) -> None:
    with pytest.raises(CoordinatorUnavailableError):
        Site("http://127.0.0.1:9", tmp_path / "a").open()


def test_a_run_killed_before_its_first_checkpoint_begins_with_what_it_had(house: House, tmp_path: Path) -> None:
    site = Site(house.url, tmp_path / "a").open()
    site.learn_numbers("solver", range(5))
    site.exchange()
    expected = site.local("solver")
    site.close()
    site.road.closed = True
    site.open()
    np.testing.assert_array_equal(site.local("solver"), expected)
    site.road.closed = False
    site.exchange()
    assert house.version("solver") == 1
    site.close()


def test_a_checkpoint_that_is_up_to_date_goes_on_bit_for_bit(house: House, tmp_path: Path) -> None:
    """Opponents come back with it, even while the coordinator is away."""
    other = Site(house.url, tmp_path / "b", ("alpha", "beta"), every=2).open()
    other.iterate(2)
    site = Site(house.url, tmp_path / "a", every=3).open()
    site.iterate(4)
    saved = site.saved()
    site.iterate()
    expected = {name: site.local(name) for name in site.names}
    site.close()
    site.road.closed = True
    site.open(saved)
    assert foreign(site) == ["alpha@1", "beta@1"]
    assert {"alpha@1", "beta@1"} < loaded(site)
    site.iterate()
    for name in site.names:
        np.testing.assert_array_equal(site.local(name), expected[name])
    site.close()
    other.close()


def test_a_checkpoint_that_is_behind_goes_on_from_what_was_handed_over_and_taken_in(
    house: House, tmp_path: Path
) -> None:
    site = Site(house.url, tmp_path / "a", worker="one").open()
    site.iterate()
    saved = site.saved()
    other = Site(house.url, tmp_path / "b", worker="other").open()
    other.learn_numbers("solver", range(5))
    other.exchange()
    other.close()
    site.exchange()  # takes the five over
    site.learn_numbers("solver", range(5, 9))
    site.exchange()
    site.close()
    site.road.closed = True
    site.open(saved)
    np.testing.assert_array_equal(site.local("critic"), saved.adapters[AdapterKey("critic", 1)].flat)
    np.testing.assert_allclose(site.local("solver")[:9], 1, atol=1e-6)
    site.learn_numbers("solver", range(5, 9))  # what the checkpoint did not know is learned again
    site.road.closed = False
    site.exchange()
    np.testing.assert_allclose(house.weights("solver")[:9], 1, atol=1e-6)
    assert house.version("solver") == 3
    site.close()


def test_a_state_folder_that_is_not_the_checkpoints_is_refused(house: House, tmp_path: Path) -> None:
    site = Site(house.url, tmp_path / "a").open()
    older = site.saved()
    site.iterate()
    saved = site.saved()
    site.close()
    newer = dict(saved.league) | {"solver": [site.league.state()["solver"][0], 9, 9]}  # type: ignore[index]
    with pytest.raises(FederationError, match="state folder of solver"):
        site.open(replace(saved, league=newer))
    with pytest.raises(FederationError, match="state folder of solver"):
        replace(site, folder=tmp_path / "lost").open(older)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1)), max_size=60), st.sampled_from([1, 3, 16]))
def test_in_a_federation_only_the_learning_rate_adapts(effects: list[tuple[float, float, float]], rank: int) -> None:
    shape = PolicySection(rank=rank, alpha=5.0)
    rules = learning_rate_only(AdaptRules(patience=2, cooldown=0), shape)
    state = AdaptiveLora(TuningParameters(1e-4, 5.0, rank))
    for effect in effects:
        state, change = state.observe(UpdateEffect(*effect), rules)
        assert change is None or change.what == "learning_rate"
    assert (state.knobs.alpha, state.knobs.rank) == (5.0, rank)
