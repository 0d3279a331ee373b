"""Changes of an expert: how each kind of event makes the next expert from the one before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedmoe.experts import ExpertModel, Registrant
from fedmoe.federation.events import (
    EventInputs,
    ExpertRegistered,
    ExpertRenamed,
    ExpertRetired,
    ExpertUnretired,
    UpdateAccepted,
    VersionEvent,
)
from fedmoe.lora.manifest import Manifest

Experts = Mapping[str, ExpertModel]


def register(experts: Experts, event: ExpertRegistered, inputs: EventInputs) -> ExpertModel:
    """The new expert, at version 0."""
    expert = ExpertModel.initial(event.expert, event.manifest, event.seed, inputs.rule)
    return replace(expert, registrant=Registrant(event.worker, event.token))


def land(experts: Experts, event: UpdateAccepted, inputs: EventInputs) -> ExpertModel:
    """The next version, with the update's delta landed on it."""
    assert inputs.delta is not None, "an accepted update is applied with its delta"
    landed = experts[event.expert].land(inputs.delta, event.coefficient, inputs.rule)
    return landed.with_norm(event.landed_norm)


def rebuild(experts: Experts, event: VersionEvent, inputs: EventInputs) -> ExpertModel:
    """The next version, with a state that was rebuilt."""
    assert inputs.rebuilt is not None, "such a change is applied with the rebuilt state"
    return experts[event.expert].with_state(inputs.rebuilt)


def rename(experts: Experts, event: ExpertRenamed, inputs: EventInputs) -> ExpertModel:
    """The same version under another name."""
    expert = experts[event.expert]
    return replace(expert, names=(*expert.names, event.name))


def retire(experts: Experts, event: ExpertRetired, inputs: EventInputs) -> ExpertModel:
    """The same version, retired."""
    return replace(experts[event.expert], retired=True)


def unretire(experts: Experts, event: ExpertUnretired, inputs: EventInputs) -> ExpertModel:
    """The same version, active again."""
    return replace(experts[event.expert], retired=False)


def binding_manifest(experts: Experts) -> Manifest | None:
    """What all experts of the federation share; None while there are none but retired ones that never changed.

    So an administrator can take back a first registration that was a mistake, and the next one decides anew.
    """
    binding = (expert.manifest for expert in experts.values() if expert.version > 0 or not expert.retired)
    return next(binding, None)
