"""Strategies, staleness functions and server optimizers of installed packages: found by name, tried, then used as ours.

A package offers them as entry points. Nothing of it is imported before its name is asked for; names of our own always
mean our own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fedmoe.lora.adapter import Adapter, FloatVector, Layout, ModuleShape
from fedmoe.lora.merge import STRATEGIES, STRATEGIES_WITH_MOMENTS, MergeStrategy
from fedmoe.lora.update_rules import RULES, STALENESS, RuleState, UpdateRule
from fedmoe.runtime.errors import ExpectedError
from fedmoe.runtime.plugins import PluginGroup

#: The experts, in name order -> what each one's product is multiplied with.
StrategyFunction = Callable[[Mapping[str, Adapter]], Mapping[str, float]]
#: Versions that the expert moved on -> a weight in [0, 1], 1 for 0.
StalenessFunction = Callable[[int], float]
#: Makes the server optimizer; its name is that of the entry point.
OptimizerMaker = Callable[[], UpdateRule]

_TRIED_STALENESS = (*range(100), 1_000, 1_000_000)
_TRIED_SIZE = 64


class PlugInError(ExpectedError, ValueError):
    """What a package offers cannot be used; the message says what it did."""


def load(option: str, name: str) -> bool:
    """Whether a name can be used for an option of `Aggregation`; what a package offers is then in our tables.

    Raises `PlugInError` for what was offered and does not do what it has to.
    """
    table, group = _TABLES[option], _GROUPS[option]
    if name in table or (option == "strategy" and name in STRATEGIES_WITH_MOMENTS):
        return True
    if name not in group.names():
        return False
    try:
        table[name] = _CHECKED[option](name, group.get(name))
    except PlugInError:
        raise
    except Exception as error:
        raise PlugInError(f"{group.noun} {name!r} cannot be used: {type(error).__name__}: {error}") from error
    return True


def names(option: str) -> list[str]:
    """What can be named for an option: ours, then those of installed packages."""
    with_moments = STRATEGIES_WITH_MOMENTS if option == "strategy" else {}
    ours = [*_TABLES[option], *with_moments]
    return ours + [name for name in _GROUPS[option].names() if name not in ours]


def _checked_strategy(name: str, function: StrategyFunction) -> MergeStrategy:
    """Tried on experts that learned something, on one alone, and on one that learned nothing."""
    layout = Layout((ModuleShape("a", 4, 3), ModuleShape("b", 3, 4)), 2)
    full = {key: Adapter(layout, 2.0, _vector(seed, layout.size)) for seed, key in enumerate(("first", "second"))}
    strategy = MergeStrategy(lambda count: 1.0, lambda count: 1.0, function)
    for experts in (full, {"first": full["first"]}, {**full, "third": Adapter.zeros(layout, 2.0)}):
        if strategy.weights(experts) != strategy.weights(experts):
            raise PlugInError(f"strategy {name!r} gives other weights for the same experts; it has to give the same")
    return strategy


def _checked_staleness(name: str, function: StalenessFunction) -> StalenessFunction:
    def weight(tau: int) -> float:
        value = float(function(tau))
        if not 0 <= value <= 1:
            raise PlugInError(f"staleness function {name!r} gives {value!r} for {tau}; weights lie in [0, 1]")
        return value

    for tau in _TRIED_STALENESS:
        weight(tau)
    if weight(0) != 1:
        raise PlugInError(f"staleness function {name!r} gives {weight(0)!r} for 0; a fresh update weighs 1")
    return weight


def _checked_optimizer(name: str, maker: OptimizerMaker) -> UpdateRule:
    """Tried on a few updates twice: a start replays the journal, and has to come to the same bits."""
    rule = maker()
    if not isinstance(rule, UpdateRule) or rule.name != name:
        got = f"one named {rule.name!r}" if isinstance(rule, UpdateRule) else type(rule).__name__
        raise PlugInError(f"server optimizer {name!r} has to be an UpdateRule of that name, got {got}")
    first, second = _replayed(name, rule), _replayed(name, rule)
    if any(a.tobytes() != b.tobytes() for a, b in zip(first, second, strict=True)):
        raise PlugInError(f"server optimizer {name!r} comes to other weights from the same updates")
    return rule


def _replayed(name: str, rule: UpdateRule) -> list[FloatVector]:
    """Weights and moments after a few updates."""
    state = rule.init(_vector(0, _TRIED_SIZE))
    for count in range(1, 4):
        delta = _vector(count, _TRIED_SIZE)
        before = [vector.copy() for vector in (state.weights, *state.moments, delta)]
        after = rule.update(state, delta, 0.5)
        if any(a.tobytes() != b.tobytes() for a, b in zip(before, (state.weights, *state.moments, delta), strict=True)):
            raise PlugInError(f"server optimizer {name!r} changes what it is given; it has to make new vectors")
        _check_state(name, rule, after, count)
        state = after
    return [state.weights, *state.moments]


def _check_state(name: str, rule: UpdateRule, state: RuleState, count: int) -> None:
    vectors = (state.weights, *state.moments)
    shaped = all(vector.shape == (_TRIED_SIZE,) and vector.dtype == np.float32 for vector in vectors)
    if not shaped or len(state.moments) != rule.moments or state.count != count:
        raise PlugInError(
            f"server optimizer {name!r} has to return float32 weights of the same shape, {rule.moments} moments like "
            f"them and a count of {count}; got {[(vector.shape, str(vector.dtype)) for vector in vectors]} and a count "
            f"of {state.count}"
        )
    if not all(np.isfinite(vector).all() for vector in vectors):
        raise PlugInError(f"server optimizer {name!r} makes numbers that are not finite")


def _vector(seed: int, size: int) -> FloatVector:
    return np.random.default_rng(seed).normal(0, 0.01, size).astype(np.float32)


_STALENESS: PluginGroup[StalenessFunction] = PluginGroup("fedmoe.staleness", "staleness function", PlugInError, {})
_GROUPS: Mapping[str, PluginGroup[Any]] = {
    "strategy": PluginGroup("fedmoe.strategies", "strategy", PlugInError, {}),
    "staleness": _STALENESS,
    "fold_staleness": _STALENESS,
    "server_optimizer": PluginGroup("fedmoe.server_optimizers", "server optimizer", PlugInError, {}),
}
_TABLES: Mapping[str, dict[str, Any]] = {
    "strategy": STRATEGIES,
    "staleness": STALENESS,
    "fold_staleness": STALENESS,
    "server_optimizer": RULES,
}
_CHECKED: Mapping[str, Callable[[str, Any], Any]] = {
    "strategy": _checked_strategy,
    "staleness": _checked_staleness,
    "fold_staleness": _checked_staleness,
    "server_optimizer": _checked_optimizer,
}
