"""Policies of a run: live weights in the learner, published versions in the engine, and adaptive tuning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.arena.learning.adapt import AdaptiveLora, AdaptRules, TuningChange, TuningParameters, UpdateEffect, fitted
from fedmoe.arena.learning.learner import AdamState, PolicyLearner, PolicyUpdate
from fedmoe.arena.population.pbt import Birth, PolicyLineage, Replacement, perturb
from fedmoe.arena.rollout.episodes import Player
from fedmoe.inference.engine import AdapterKey, Engine
from fedmoe.lora.adapter import Adapter, FloatVector
from fedmoe.lora.resize import grow_flat
from fedmoe.runtime.saved_state import restored, saved_state

#: How strongly a copy of the best policy is changed, relative to the size of each factor.
PERTURBATION = 0.02


@dataclass
class _PolicyStatus:
    version: int
    updates: int
    tuning: AdaptiveLora


@dataclass(frozen=True)
class PolicyState:
    """What a checkpoint keeps of a policy besides its weights and moments; `admission` is only written."""

    version: int
    updates: int
    admission: dict[str, int]
    tuning: AdaptiveLora
    learning_rate: float
    steps: int


class Policies:
    """Keeps learner and engine in step: a version is published once, sampled from, and let go when nobody needs it."""

    def __init__(self, learner: PolicyLearner, engine: Engine, max_staleness: int, rules: AdaptRules | None) -> None:
        """`max_staleness`: versions by which weights that sampled may be behind; `rules` None does not adapt."""
        self.learner = learner
        self.engine = engine
        self._staleness = max_staleness
        self._rules = rules
        self._policies: dict[str, _PolicyStatus] = {}
        self._adapters: dict[AdapterKey, Adapter] = {}
        # Batches whose sampling has begun and that were not learned from yet: each will be so many versions late.
        self._in_flight = 0
        #: Called with every version that is published and the one before it where that has other weights.
        self.after_publish: Callable[[AdapterKey, AdapterKey | None], None] = lambda key, previous: None

    @property
    def names(self) -> tuple[str, ...]:
        """The policies, in the order they came."""
        return tuple(self._policies)

    def add(self, name: str, adapter: Adapter) -> None:
        """A new policy at version 0."""
        self.learner.add(name, adapter)
        knobs = TuningParameters(self.learner.learning_rate(name), adapter.alpha, adapter.rank)
        self._policies[name] = _PolicyStatus(0, 0, AdaptiveLora(knobs))
        self._publish(name)

    def key(self, name: str) -> AdapterKey:
        """The newest version of a policy."""
        return AdapterKey(name, self._policies[name].version)

    def version(self, name: str) -> int:
        """How many iterations the policy has learned from."""
        return self._policies[name].version

    def updates(self, name: str) -> int:
        """How often its weights have changed."""
        return self._policies[name].updates

    def players(self) -> tuple[Player, ...]:
        """Every policy at its newest version, to learn from what it plays."""
        return tuple(Player(name, self.key(name), learning=True) for name in self._policies)

    def adapter(self, name: str) -> Adapter:
        """The newest published weights."""
        return self._adapters[self.key(name)]

    def may_start(self) -> bool:
        """Whether another batch may be sampled with the present versions.

        AReaL's bound: what is sampled now is learned from after all batches in flight, so as many versions later.
        """
        return self._in_flight <= self._staleness

    def started(self) -> None:
        """A batch begins to be sampled, and will be learned from."""
        assert self.may_start(), f"{self._in_flight} batches are in flight already"
        self._in_flight += 1

    def learned(
        self, updates: Mapping[str, PolicyUpdate], rewards: Mapping[str, float], staleness: Mapping[str, int]
    ) -> dict[str, list[TuningChange]]:
        """A batch was learned from: every policy gets its next version; returns how the tuning changed.

        `staleness`: how many versions old the weights that sampled were.
        """
        changes: dict[str, list[TuningChange]] = {}
        for name, status in self._policies.items():
            if name in updates:
                status.updates += 1
                changes[name] = self._tuned(name, updates[name], rewards.get(name, 0.0), staleness[name])
            status.version += 1
            self._publish(name)
        self._in_flight -= 1
        return changes

    def _tuned(self, name: str, update: PolicyUpdate, reward: float, staleness: int) -> list[TuningChange]:
        if self._rules is None:
            return []
        status = self._policies[name]
        statistics = update.statistics
        # With one step from a batch its own KL is seen with the next batch only, sampled `staleness` updates ago. The
        # gap is the engine's error only where both had the same version.
        moved = update.moved / staleness if staleness else statistics.kl_k3
        effect = UpdateEffect(reward, moved, 0.0 if staleness else statistics.gap_mean)
        status.tuning, change = status.tuning.observe(effect, self._rules)
        if change is None:
            return []
        knobs = status.tuning.knobs
        if change.what == "learning_rate":
            self.learner.set_learning_rate(name, knobs.learning_rate)
        else:
            self._refit(name, knobs, status.version)
        return [change]

    def _refit(self, name: str, knobs: TuningParameters, seed: int) -> None:
        before, state = self.learner.adapter(name), self.learner.optimizer_state(name)
        after = fitted(before, knobs, seed)
        if after.layout != before.layout:
            first, second = (grow_flat(before.layout, after.layout, moment) for moment in (state.first, state.second))
            state = AdamState(first, second, state.steps)
        self.learner.replace(name, after, state)

    def replace(
        self, replacement: Replacement, lineage: PolicyLineage, iteration: int, rng: np.random.Generator
    ) -> None:
        """The worst becomes a changed copy of the best, at a new version; its optimizer begins anew."""
        parent = self.key(replacement.best)
        child = perturb(self.learner.adapter(replacement.best), PERTURBATION, rng)
        self.learner.replace(replacement.worst, child)
        status = self._policies[replacement.worst]
        status.version += 1
        status.updates += 1
        status.tuning = AdaptiveLora(TuningParameters(status.tuning.knobs.learning_rate, child.alpha, child.rank))
        lineage.add(Birth(self.key(replacement.worst), parent, iteration, replacement.reason, PERTURBATION))
        self._publish(replacement.worst)

    def adopt(self, name: str, adapter: Adapter) -> None:
        """Take over weights from elsewhere (a coordinator) as the policy's next version; the optimizer goes on."""
        self.learner.replace(name, adapter, self.learner.optimizer_state(name))
        self._policies[name].version += 1
        self._publish(name)

    def hold(self, key: AdapterKey, adapter: Adapter) -> None:
        """Make a frozen adapter from elsewhere available; like an old version, it goes when nobody needs it."""
        self.engine.load(key, adapter)
        self._adapters[key] = adapter

    def _publish(self, name: str) -> None:
        key, adapter = self.key(name), self.learner.adapter(name)
        self._adapters[key] = adapter
        self.engine.load(key, adapter)
        before = AdapterKey(name, key.version - 1)
        changed = before in self._adapters and not np.array_equal(self._adapters[before].flat, adapter.flat)
        self.after_publish(key, before if changed else None)

    def let_go(self, needed: Sequence[AdapterKey]) -> None:
        """Unload versions that neither are the newest nor in `needed`."""
        keep = {self.key(name) for name in self._policies} | set(needed)
        for key in [key for key in self._adapters if key not in keep]:
            self.engine.unload(key)
            del self._adapters[key]

    def adapters(self) -> dict[AdapterKey, Adapter]:
        """All versions that are still there."""
        return dict(self._adapters)

    def state(self) -> dict[str, object]:
        """Counters and tuning, as JSON; weights and moments are arrays of their own."""
        return {
            name: saved_state(
                PolicyState(
                    status.version,
                    status.updates,
                    self._admission(status.version),
                    status.tuning,
                    self.learner.learning_rate(name),
                    self.learner.optimizer_state(name).steps,
                )
            )
            for name, status in self._policies.items()
        }

    def _admission(self, version: int) -> dict[str, int]:
        """The batches of a policy as checkpoints count them: learned from so far, and in flight."""
        settings = {"max_concurrent": self._staleness + 1, "batch": 1, "max_staleness": self._staleness}
        return settings | {"enqueued": 0, "running": self._in_flight, "accepted": version, "rejected": 0}

    def moments(self) -> dict[str, FloatVector]:
        """The optimizer's moments by `NAME/first_moment` and `NAME/second_moment`, for a checkpoint."""
        states = {name: self.learner.optimizer_state(name) for name in self._policies}
        first = {f"{name}/first_moment": state.first for name, state in states.items()}
        return first | {f"{name}/second_moment": state.second for name, state in states.items()}

    def restore(
        self,
        saved: Mapping[str, Mapping[str, object]],
        adapters: Mapping[AdapterKey, Adapter],
        moments: Mapping[str, FloatVector],
    ) -> None:
        """Take over a checkpoint: policies that `add` made get their weights, moments and versions back."""
        for key in tuple(self._adapters):
            self.engine.unload(key)
            del self._adapters[key]
        for name, values in saved.items():
            state, status = restored(PolicyState, values), self._policies[name]
            status.version, status.updates, status.tuning = state.version, state.updates, state.tuning
            optimizer = AdamState(moments[f"{name}/first_moment"], moments[f"{name}/second_moment"], state.steps)
            self.learner.set_learning_rate(name, state.learning_rate)
            self.learner.replace(name, adapters[self.key(name)], optimizer)
        for key, adapter in adapters.items():
            self.hold(key, adapter)
