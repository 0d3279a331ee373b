"""Strategies, staleness functions and server optimizers of installed packages, found by their entry points."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from aggregation_plug_in import by_norm, installed
from live import open_house
from pydantic import ValidationError
from structlog.testing import capture_logs
from support import MANIFEST, make_adapter, make_body, make_flat, make_push

from fedmoe.config import CoordinatorConfig
from fedmoe.coordinator import Aggregation
from fedmoe.federation import plug_ins
from fedmoe.federation.plug_ins import PlugInError
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.merge import merge
from fedmoe.server.gate.candidates import offered


@pytest.fixture
def package(tmp_path: Path) -> Iterator[None]:
    with installed(tmp_path / "site"):
        yield


@pytest.mark.usefixtures("package")
def test_a_package_adds_all_three_and_a_federation_runs_on_them(tmp_path: Path) -> None:
    """A second start replays the journal to the same bits."""
    aggregation = Aggregation(strategy="by_norm", staleness="halving", server_optimizer="half_step")
    assert [aggregation.coefficient(tau) for tau in (0, 1, 3)] == [1.0, 0.5, 0.125]
    house_folder = tmp_path / "house"
    house_folder.mkdir()
    with capture_logs(), open_house(house_folder, aggregation) as house:
        house.register("python", "sql")
        start = house.service.coordinator.expert("python").adapter.flat
        for sequence in range(2):
            asyncio.run(house.service.intake.push(*make_push(make_body(sequence), 0, sequence)))
        asyncio.run(house.service.intake.push(*make_push(make_body(5), 0, 2, expert="sql")))
        experts = house.service.coordinator.experts
        landed = experts["python"].adapter.flat
        expected = start + np.float32(0.5) * make_flat(0) + np.float32(0.25) * make_flat(1)
        np.testing.assert_allclose(landed, expected, rtol=1e-6)
        gateway = house.service.coordinator.gateway()
        weights = by_norm({name: expert.adapter for name, expert in experts.items()})
        assert gateway.strategy == "by_norm"
        assert dict(gateway.weights) == pytest.approx(dict(weights))
        digests = {name: expert.digest for name, expert in experts.items()}
    with capture_logs(), open_house(house_folder, aggregation) as house:
        assert {name: e.digest for name, e in house.service.coordinator.experts.items()} == digests


@pytest.mark.usefixtures("package")
def test_the_coordinator_takes_their_names_and_lists_them() -> None:
    config = CoordinatorConfig(strategy="by_norm", staleness="halving", server_optimizer="half_step")
    assert config.strategy == "by_norm"
    with pytest.raises(ValidationError, match=r"unknown value 'by_nrom'; choose one of weighted_average, .*by_norm"):
        CoordinatorConfig(strategy="by_nrom")
    with pytest.raises(ValueError, match=r"unknown server_optimizer 'sdg'; known: adam, .*half_step"):
        Aggregation(server_optimizer="sdg")


def test_without_the_package_they_are_unknown() -> None:
    for option in ("strategy", "staleness", "fold_staleness", "server_optimizer"):
        assert not plug_ins.load(option, "by_norm")
    assert plug_ins.names("staleness") == ["constant", "polynomial", "hinge", "exponential"]
    assert "regmean" in plug_ins.names("strategy")


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("option", "name", "words"),
    [
        ("strategy", "broken", "strategy 'broken' cannot be used: ZeroDivisionError"),
        ("strategy", "partly", "a finite weight is needed for each of first, second; got"),
        ("staleness", "growing", r"staleness function 'growing' gives 2\.0 for 1; weights lie in \[0, 1\]"),
        ("fold_staleness", "tired", r"gives 0\.5 for 0; a fresh update weighs 1"),
        ("server_optimizer", "in_place", "changes what it is given"),
        ("server_optimizer", "random_step", "comes to other weights from the same updates"),
        ("server_optimizer", "misnamed", "UpdateRule of that name, got one named 'half_step'"),
    ],
)
def test_what_would_break_a_federation_is_refused_at_the_start(option: str, name: str, words: str) -> None:
    with pytest.raises(PlugInError, match=words):
        plug_ins.load(option, name)
    with pytest.raises(ValidationError, match=words):
        CoordinatorConfig.model_validate({option: name})


@pytest.mark.usefixtures("package")
def test_the_gate_offers_the_strategy_of_a_package_too() -> None:
    aggregation = Aggregation(strategy="by_norm", evaluation_gate=True)
    assert ("by_norm", (1.0,)) in offered(aggregation, 3, with_moments=False)
    experts = {name: make_adapter(seed) for seed, name in enumerate("abc")}
    merged = merge(experts, "by_norm", scale=1.0)
    assert math.isclose(sum(merged.weights.values()), 1.0)
    assert json.dumps(dict(merged.weights)) == json.dumps(
        dict(merge(dict(reversed(experts.items())), "by_norm").weights)
    )
    # An expert that learned nothing has no norm to divide by.
    merge({"a": experts["a"], "b": Adapter.zeros(MANIFEST.layout, 4.0)}, "by_norm")
