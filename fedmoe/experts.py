"""The expert model: weights, version and names; applies updates, refuses manifests that do not match."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np

from fedmoe.lora.adapter import Adapter, FloatVector, initial_adapter
from fedmoe.lora.codec import digest
from fedmoe.lora.manifest import BaseModel, Manifest, base_differences
from fedmoe.lora.update_rules import USUAL_WINDOW, RuleState, UpdateRule, first_not_finite
from fedmoe.runtime.errors import RefusedError

# Names that a refusal lists.
_MOST_LISTED = 20


@dataclass(frozen=True)
class InitialWeights:
    """First weights, a function of their seed: made whenever they are asked for and never kept."""

    seed: int
    rule: UpdateRule

    def state(self, manifest: Manifest) -> RuleState:
        """The first state: A drawn from the seed, B zero, so that an expert starts as the base model."""
        return self.rule.init(initial_adapter(manifest.layout, manifest.alpha, self.seed).flat)


@dataclass(frozen=True)
class Registrant:
    """Who registered an expert: the worker, and the hash of its token, empty where none was asked for."""

    worker: str
    token: str = ""


@dataclass(frozen=True)
class ExpertModel:
    """A named LoRA adapter with a version that rises by one per change; a value, replaced and never altered.

    `stored` is what memory holds of it: nothing but a seed until something lands. `norms` are the L2 norms of the last
    updates as they landed, the newest last: they say what is usual. `name` is the first one and stays; `names` are
    those that it was given later, the newest last. A `retired` expert takes no updates and is no part of the gateway.
    """

    name: str
    manifest: Manifest
    version: int
    stored: RuleState | InitialWeights
    norms: tuple[float, ...] = ()
    registrant: Registrant = Registrant("")
    names: tuple[str, ...] = ()
    retired: bool = False

    @classmethod
    def initial(cls, name: str, manifest: Manifest, seed: int, rule: UpdateRule) -> Self:
        """Version 0: A drawn from `seed`, B zero, so the expert starts as the base model."""
        return cls(name, manifest, 0, InitialWeights(seed, rule))

    @property
    def state(self) -> RuleState:
        """The weights with what the rule remembers; made anew at each call while nothing has landed."""
        return self.stored if isinstance(self.stored, RuleState) else self.stored.state(self.manifest)

    @property
    def title(self) -> str:
        """The name it goes by."""
        return self.names[-1] if self.names else self.name

    @property
    def updates(self) -> int:
        """Updates that its weights hold."""
        return self.stored.count if isinstance(self.stored, RuleState) else 0

    def untrained(self, buffer_size: int = 1) -> bool:
        """Whether its weights are still those it began with; of a buffer that is not full nothing has landed."""
        return self.updates < buffer_size

    @property
    def adapter(self) -> Adapter:
        """The weights as an adapter."""
        return Adapter(self.manifest.layout, self.manifest.alpha, self.state.weights)

    @cached_property
    def digest(self) -> str:
        """The content hash of the weights, made when first asked for."""
        return digest(self.adapter)

    def staleness(self, base_version: int) -> int:
        """Versions the expert moved on since `base_version` was downloaded."""
        if base_version > self.version:
            raise RefusedError(
                "unknown_version",
                f"the update is based on version {base_version} of {self.title}, which is at version {self.version}.",
                "Pull the expert again; if the coordinator's state was replaced, restart the worker with a new state.",
                newest_version=self.version,
            )
        return self.version - base_version

    def land(self, delta: FloatVector, coefficient: float, rule: UpdateRule) -> Self:
        """The next version: `weights + coefficient * delta` under the plain rule, whose coefficient is lr * s(tau).

        Raises `RefusedError` if a finite but huge delta would leave an infinity or a NaN behind.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            state = rule.update(self.state, delta, coefficient)
        for vector in (state.weights, *state.moments):
            bad = first_not_finite(self.manifest.layout, vector)
            if bad is not None:
                raise RefusedError(
                    "not_finite",
                    f"with this update {bad} of {self.title} would hold an infinity or a NaN.",
                    "Lower the learning rate and restart the worker from the expert's newest version.",
                )
        return replace(self, version=self.version + 1, stored=state)

    def with_norm(self, norm: float | None) -> Self:
        """The same version, with the norm of the update that made it among the usual ones."""
        return self if norm is None else replace(self, norms=(*self.norms, norm)[-USUAL_WINDOW:])

    def with_state(self, state: RuleState) -> Self:
        """The next version with a state rebuilt from the journal (rollback, retraction)."""
        return replace(self, version=self.version + 1, stored=state)

    def require_active(self) -> None:
        """Raise RefusedError if the expert is retired."""
        if self.retired:
            raise RefusedError(
                "retired",
                f"the expert {self.title} is retired and takes no updates.",
                f"Start the worker with another --specialty, or bring it back: 'fedmoe experts unretire {self.title}'.",
            )


def first_name(experts: Mapping[str, ExpertModel], name: str) -> str:
    """The first name of the expert that goes by `name`, or did; `name` itself where no expert does."""
    if name in experts:
        return name
    return next((first for first, expert in experts.items() if name in expert.names), name)


def expert_named(experts: Mapping[str, ExpertModel], name: str) -> ExpertModel:
    """The expert with this name, by which it goes or went, or a refusal that lists which there are."""
    expert = experts.get(first_name(experts, name))
    if expert is None:
        titles = sorted(expert.title for expert in experts.values() if not expert.retired)
        more = f" and {len(titles) - _MOST_LISTED} more" if len(titles) > _MOST_LISTED else ""
        listed = (", ".join(titles[:_MOST_LISTED]) or "none") + more
        raise RefusedError(
            "unknown_expert", f"there is no expert {name!r}; registered: {listed}.", "Register it first (workers do)."
        )
    return expert


def seed_of(name: str) -> int:
    """The seed of an expert's first A: shared by all workers of an expert, different between experts."""
    return int.from_bytes(hashlib.sha256(json.dumps(["fedmoe-initial-a", name]).encode()).digest()[:8], "little")


#: The seed of the first A of all experts that start from the gateway; no expert has this name.
GATEWAY_SEED = seed_of("@gateway")


def check_base(expected: BaseModel, got: BaseModel) -> None:
    """Refuse a worker on another base model than the federation's."""
    differences = base_differences(expected, got)
    if differences:
        raise RefusedError(
            "base_mismatch",
            f"all experts share one base model; {'; '.join(differences)}.",
            "Use the base model (and revision) the coordinator names.",
            expected=expected.weights_hash,
            got=got.weights_hash,
        )


def check_manifest(expected: Manifest, got: Manifest) -> None:
    """Refuse a worker whose base model or LoRA configuration is not the federation's."""
    check_base(expected.base, got.base)
    differences = expected.differences(got)
    if not differences:
        return
    more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
    raise RefusedError(
        "lora_mismatch",
        f"all experts share one LoRA configuration; {'; '.join(differences[:5])}{more}.",
        "Start the worker with the same --lora-r, --lora-alpha and --target-modules.",
    )
