"""State transitions, in one table: what each kind of event changes of an expert, the online gateway and a lineage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from fedmoe.experts import ExpertModel, Registrant
from fedmoe.federation.events import (
    Event,
    EventInputs,
    ExpertRebased,
    ExpertRegistered,
    ExpertRenamed,
    ExpertRetired,
    ExpertRolledBack,
    ExpertUnretired,
    GatewayMerged,
    HeldUpdateRejected,
    UpdateAccepted,
    UpdateHeld,
    UpdateLost,
    VersionEvent,
    WorkerRetracted,
)
from fedmoe.federation.lineage import Chains, Lineage, after_loss, after_rebase, without_worker
from fedmoe.federation.online_gateway import OnlineGateway
from fedmoe.lora.manifest import Manifest

Experts = Mapping[str, ExpertModel]
_Kind = TypeVar("_Kind")


@dataclass(frozen=True, slots=True)
class Transition(Generic[_Kind]):
    """What one kind of event changes; None is nothing.

    `expert` gives the expert after the event from all experts before it, `gateway` the next online gateway, `lineage`
    the updates of the version that the event makes from those of all earlier versions and of the newest one.
    """

    expert: Callable[[Experts, _Kind, EventInputs], ExpertModel] | None = None
    gateway: Callable[[OnlineGateway, _Kind, EventInputs], OnlineGateway] | None = None
    lineage: Callable[[Chains, Lineage | None, _Kind], Lineage | None] | None = None


def _register(experts: Experts, event: ExpertRegistered, inputs: EventInputs) -> ExpertModel:
    """The new expert, at version 0."""
    expert = ExpertModel.initial(event.expert, event.manifest, event.seed, inputs.rule)
    return replace(expert, registrant=Registrant(event.worker, event.token))


def _land(experts: Experts, event: UpdateAccepted, inputs: EventInputs) -> ExpertModel:
    """The next version, with the update's delta landed on it."""
    assert inputs.delta is not None, "an accepted update is applied with its delta"
    landed = experts[event.expert].land(inputs.delta, event.coefficient, inputs.rule)
    return landed.with_norm(event.landed_norm)


def _rebuild(experts: Experts, event: VersionEvent, inputs: EventInputs) -> ExpertModel:
    """The next version, with a state that was rebuilt."""
    assert inputs.rebuilt is not None, "such a change is applied with the rebuilt state"
    return experts[event.expert].with_state(inputs.rebuilt)


TRANSITIONS: Mapping[type[Event], Transition[Any]] = {
    ExpertRegistered: Transition(_register, OnlineGateway.after_registration),
    UpdateAccepted: Transition(
        _land, OnlineGateway.after_update, lambda _, newest, event: Lineage.extend(newest, event)
    ),
    ExpertRolledBack: Transition(
        _rebuild, OnlineGateway.after_rebuild, lambda chains, _, event: chains[event.to_version]
    ),
    WorkerRetracted: Transition(
        _rebuild, OnlineGateway.after_rebuild, lambda _, newest, event: without_worker(newest, event.worker)
    ),
    UpdateLost: Transition(_rebuild, OnlineGateway.after_rebuild, after_loss),
    ExpertRebased: Transition(_rebuild, OnlineGateway.after_rebase, after_rebase),
    GatewayMerged: Transition(None, OnlineGateway.after_merge),
    ExpertRenamed: Transition(
        lambda experts, event, _: replace(experts[event.expert], names=(*experts[event.expert].names, event.name))
    ),
    ExpertRetired: Transition(lambda experts, event, _: replace(experts[event.expert], retired=True)),
    ExpertUnretired: Transition(
        lambda experts, event, _: replace(experts[event.expert], retired=False), OnlineGateway.after_return
    ),
    UpdateHeld: Transition(),
    HeldUpdateRejected: Transition(),
}


def lineages(events: Iterable[Event]) -> dict[int, Lineage | None]:
    """Version -> the updates that version is made of, for the events of ONE expert in order.

    All transitions keep the updates' order, so landing a lineage's updates on its start rebuilds the weights bit for
    bit.
    """
    chains: dict[int, Lineage | None] = {0: None}
    newest = 0
    for event in events:
        change = TRANSITIONS[type(event)].lineage
        if change is not None:
            assert isinstance(event, VersionEvent)
            chains[event.version] = change(chains, chains[newest], event)
            newest = event.version
    return chains


def binding_manifest(experts: Experts) -> Manifest | None:
    """What all experts of the federation share; None while there are none but retired ones that never changed.

    So an administrator can take back a first registration that was a mistake, and the next one decides anew.
    """
    binding = (expert.manifest for expert in experts.values() if expert.version > 0 or not expert.retired)
    return next(binding, None)
