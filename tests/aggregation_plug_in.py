"""A package from elsewhere, as its author would write it: a strategy, a staleness function and a server optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.merge import STRATEGIES
from fedmoe.lora.update_rules import RULES, STALENESS, RuleState, UpdateRule

#: What its entry_points.txt says.
ENTRY_POINTS = f"""\
[fedmoe.strategies]
by_norm = {__name__}:by_norm
broken = {__name__}:broken
partly = {__name__}:partly
[fedmoe.staleness]
halving = {__name__}:halving
growing = {__name__}:growing
tired = {__name__}:tired
[fedmoe.server_optimizers]
half_step = {__name__}:half_step
in_place = {__name__}:in_place
random_step = {__name__}:random_step
misnamed = {__name__}:half_step
"""


def by_norm(experts: Mapping[str, Adapter]) -> Mapping[str, float]:
    """Experts that learned more count less, so that none drowns the others."""
    norms = {name: max(1e-12, float(np.linalg.norm(expert.flat))) for name, expert in experts.items()}
    total = sum(1 / norm for norm in norms.values())
    return {name: 1 / norm / total for name, norm in norms.items()}


def broken(experts: Mapping[str, Adapter]) -> Mapping[str, float]:
    return {name: 1 / (len(experts) - 1) for name in experts}


def partly(experts: Mapping[str, Adapter]) -> Mapping[str, float]:
    return {"first": 1.0}


def halving(tau: int) -> float:
    return float(0.5 ** min(tau, 1000))


def growing(tau: int) -> float:
    return 1.0 + tau


def tired(tau: int) -> float:
    return 0.5


def _half(state: RuleState, delta: FloatVector, coefficient: float) -> RuleState:
    return replace(state, weights=state.weights + np.float32(0.5 * coefficient) * delta, count=state.count + 1)


def half_step() -> UpdateRule:
    return UpdateRule("half_step", 0, _half)


def in_place() -> UpdateRule:
    def update(state: RuleState, delta: FloatVector, coefficient: float) -> RuleState:
        np.add(state.weights, delta, out=state.weights)
        return replace(state, count=state.count + 1)

    return UpdateRule("in_place", 0, update)


def random_step() -> UpdateRule:
    rng = np.random.default_rng()

    def update(state: RuleState, delta: FloatVector, coefficient: float) -> RuleState:
        noise = rng.normal(0, 1, delta.shape).astype(np.float32)
        return replace(state, weights=state.weights + delta * noise, count=state.count + 1)

    return UpdateRule("random_step", 0, update)


@contextmanager
def installed(folder: Path) -> Iterator[None]:
    """The package as an installation would leave it, until the end; then the tables are as before."""
    information = folder / "aggregation_plug_in-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: aggregation-plug-in\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(ENTRY_POINTS)
    tables: list[dict[str, object]] = [STRATEGIES, STALENESS, RULES]  # type: ignore[list-item]
    before = [dict(table) for table in tables]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield
    for table, ours in zip(tables, before, strict=True):
        table.clear()
        table.update(ours)
