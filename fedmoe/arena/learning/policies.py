"""The policies of a run: live weights in the learner, versions in the engine, and how they are tuned."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedmoe.arena.learning.adapt import AdaptiveLora, AdaptRules, Change, Effect, Knobs, fitted
from fedmoe.arena.learning.admission import Admission
from fedmoe.arena.learning.learner import Learner, OptimizerState, PolicyUpdate
from fedmoe.arena.population.pbt import Birth, PolicyLineage, Replacement, perturb
from fedmoe.arena.rollout.episodes import Player
from fedmoe.inference.engine import AdapterKey, Engine
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.resize import grow_flat

#: How strongly a copy of the best policy is changed, relative to the size of each factor.
PERTURBATION = 0.02


@dataclass
class _Policy:
    version: int
    updates: int
    admission: Admission
    tuning: AdaptiveLora


class Policies:
    """Keeps learner and engine in step: a version is published once, sampled from, and let go when nobody needs it."""

    def __init__(self, learner: Learner, engine: Engine, max_staleness: int, rules: AdaptRules | None) -> None:
        self.learner = learner
        self.engine = engine
        self._staleness = max_staleness
        self._rules = rules or AdaptRules()
        self._adapts = rules is not None
        self._policies: dict[str, _Policy] = {}
        self._kept: dict[AdapterKey, Adapter] = {}
        #: Called with every version that is published and the one before it where that has other weights.
        self.after_publish: Callable[[AdapterKey, AdapterKey | None], None] = lambda key, previous: None

    @property
    def names(self) -> tuple[str, ...]:
        """The policies, in the order they came."""
        return tuple(self._policies)

    def add(self, name: str, adapter: Adapter) -> None:
        """A new policy at version 0."""
        self.learner.add(name, adapter)
        knobs = Knobs(self.learner.learning_rate(name), adapter.alpha, adapter.rank)
        admission = Admission(max_concurrent=self._staleness + 1, batch=1, max_staleness=self._staleness)
        self._policies[name] = _Policy(0, 0, admission, AdaptiveLora(self._rules, knobs))
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
        return self._kept[self.key(name)]

    def may_start(self) -> bool:
        """Whether another batch may be sampled with the present versions, for every policy."""
        return all(one.admission.capacity(one.version) >= 1 for one in self._policies.values())

    def started(self) -> None:
        """A batch begins to be sampled."""
        for one in self._policies.values():
            one.admission = one.admission.enqueue().submit(one.version)

    def accepted(self) -> None:
        """A batch was sampled and will be learned from."""
        for one in self._policies.values():
            one.admission = one.admission.accept()

    def learned(
        self, updates: Mapping[str, PolicyUpdate], rewards: Mapping[str, float], staleness: Mapping[str, int]
    ) -> dict[str, list[Change]]:
        """A batch was learned from: every policy gets its next version; returns how the tuning changed.

        `staleness`: how many versions old the weights that sampled were.
        """
        changes: dict[str, list[Change]] = {}
        for name, one in self._policies.items():
            if name in updates:
                one.updates += 1
                changes[name] = self._tuned(name, updates[name], rewards.get(name, 0.0), staleness[name])
            one.version += 1
            self._publish(name)
        return changes

    def _tuned(self, name: str, update: PolicyUpdate, reward: float, staleness: int) -> list[Change]:
        if not self._adapts:
            return []
        one = self._policies[name]
        statistics = update.statistics
        # With one step from a batch its own KL is seen with the next batch only, sampled `staleness` updates ago. The
        # gap is the engine's error only where both had the same version.
        moved = update.moved / staleness if staleness else statistics.kl_k3
        effect = Effect(reward, moved, 0.0 if staleness else statistics.gap_mean)
        one.tuning, change = one.tuning.observe(effect)
        if change is None:
            return []
        knobs = one.tuning.knobs
        if change.what == "learning_rate":
            self.learner.set_learning_rate(name, knobs.learning_rate)
        else:
            self._refit(name, knobs, one.version)
        return [change]

    def _refit(self, name: str, knobs: Knobs, seed: int) -> None:
        before, state = self.learner.adapter(name), self.learner.optimizer_state(name)
        after = fitted(before, knobs, seed)
        if after.layout != before.layout:
            first, second = (grow_flat(before.layout, after.layout, moment) for moment in (state.first, state.second))
            state = OptimizerState(first, second, state.steps)
        self.learner.replace(name, after, state)

    def replace(self, wanted: Replacement, lineage: PolicyLineage, iteration: int, rng: np.random.Generator) -> None:
        """The worst becomes a changed copy of the best, at a new version; its optimizer begins anew."""
        parent = self.key(wanted.best)
        child = perturb(self.learner.adapter(wanted.best), PERTURBATION, rng)
        self.learner.replace(wanted.worst, child)
        one = self._policies[wanted.worst]
        one.version += 1
        one.updates += 1
        # Of the new version nothing was sampled; the batch that is being judged still waits to be learned from.
        one.admission = one.admission.resumed(one.version, buffered=1)
        one.tuning = AdaptiveLora(self._rules, Knobs(one.tuning.knobs.learning_rate, child.alpha, child.rank))
        lineage.add(Birth(self.key(wanted.worst), parent, iteration, wanted.reason, PERTURBATION))
        self._publish(wanted.worst)

    def adopt(self, name: str, adapter: Adapter) -> None:
        """Take over weights from elsewhere (a coordinator) as the policy's next version; the optimizer goes on."""
        self.learner.replace(name, adapter, self.learner.optimizer_state(name))
        one = self._policies[name]
        one.version += 1
        one.admission = one.admission.resumed(one.version)
        self._publish(name)

    def hold(self, key: AdapterKey, adapter: Adapter) -> None:
        """Make a frozen adapter from elsewhere available; like an old version, it goes when nobody needs it."""
        self.engine.load(key, adapter)
        self._kept[key] = adapter

    def _publish(self, name: str) -> None:
        key = self.key(name)
        self._kept[key] = self.learner.adapter(name)
        self.engine.load(key, self._kept[key])
        before = AdapterKey(name, key.version - 1)
        changed = before in self._kept and not np.array_equal(self._kept[before].flat, self._kept[key].flat)
        self.after_publish(key, before if changed else None)

    def let_go(self, needed: Sequence[AdapterKey]) -> None:
        """Unload versions that neither are the newest nor in `needed`."""
        keep = {self.key(name) for name in self._policies} | set(needed)
        for key in [key for key in self._kept if key not in keep]:
            self.engine.unload(key)
            del self._kept[key]

    def kept(self) -> dict[AdapterKey, Adapter]:
        """All versions that are still there."""
        return dict(self._kept)

    def state(self) -> dict[str, object]:
        """Counters and tuning, as JSON; weights and moments are arrays of their own."""
        return {
            name: {
                "version": one.version,
                "updates": one.updates,
                "admission": one.admission.state(),
                "tuning": one.tuning.state(),
                "learning_rate": self.learner.learning_rate(name),
                "steps": self.learner.optimizer_state(name).steps,
            }
            for name, one in self._policies.items()
        }

    def restore(
        self,
        state: Mapping[str, Mapping[str, object]],
        adapters: Mapping[AdapterKey, Adapter],
        optimizers: Mapping[str, OptimizerState],
    ) -> None:
        """Take over a checkpoint: policies that `add` made get their weights, moments and versions back."""
        self.engine_forget()
        for name, saved in state.items():
            one = self._policies[name]
            one.version, one.updates = int(str(saved["version"])), int(str(saved["updates"]))
            admission, tuning = saved["admission"], saved["tuning"]
            assert isinstance(admission, Mapping)
            assert isinstance(tuning, Mapping)
            one.admission = Admission.from_state(admission).resumed(one.version)
            one.tuning = AdaptiveLora.from_state(self._rules, tuning)
            self.learner.set_learning_rate(name, float(str(saved["learning_rate"])))
            self.learner.replace(name, adapters[self.key(name)], optimizers[name])
        for key, adapter in adapters.items():
            self._kept[key] = adapter
            self.engine.load(key, adapter)

    def engine_forget(self) -> None:
        """Unload everything that was published."""
        for key in tuple(self._kept):
            self.engine.unload(key)
            del self._kept[key]
