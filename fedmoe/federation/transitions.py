"""State transitions, in one table: what each kind of event changes of an expert, the online gateway and a lineage."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fedmoe.experts import ExpertModel
from fedmoe.federation import expert_changes, lineage
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
from fedmoe.federation.lineage import Chains, Lineage
from fedmoe.federation.online_gateway import OnlineGateway

_Kind = TypeVar("_Kind")


@dataclass(frozen=True, slots=True)
class Transition(Generic[_Kind]):
    """What one kind of event changes; None is nothing.

    `expert` gives the expert after the event from all experts before it, `gateway` the next online gateway, `lineage`
    the updates of the version that the event makes from those of all earlier versions and of the newest one.
    """

    expert: Callable[[Mapping[str, ExpertModel], _Kind, EventInputs], ExpertModel] | None = None
    gateway: Callable[[OnlineGateway, _Kind, EventInputs], OnlineGateway] | None = None
    lineage: Callable[[Chains, Lineage | None, _Kind], Lineage | None] | None = None


TRANSITIONS: Mapping[type[Event], Transition[Any]] = {
    ExpertRegistered: Transition(expert_changes.register, OnlineGateway.after_registration),
    UpdateAccepted: Transition(expert_changes.land, OnlineGateway.after_update, lineage.after_update),
    ExpertRolledBack: Transition(expert_changes.rebuild, OnlineGateway.after_rebuild, lineage.after_rollback),
    WorkerRetracted: Transition(expert_changes.rebuild, OnlineGateway.after_rebuild, lineage.after_retraction),
    UpdateLost: Transition(expert_changes.rebuild, OnlineGateway.after_rebuild, lineage.after_loss),
    ExpertRebased: Transition(expert_changes.rebuild, OnlineGateway.after_rebase, lineage.after_rebase),
    GatewayMerged: Transition(None, OnlineGateway.after_merge),
    ExpertRenamed: Transition(expert_changes.rename),
    ExpertRetired: Transition(expert_changes.retire),
    ExpertUnretired: Transition(expert_changes.unretire, OnlineGateway.after_return),
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
