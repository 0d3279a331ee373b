"""The roll of experts: who goes by which name, who is retired, and what that leaves of the federation's manifest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fedmoe.experts import ExpertModel, check_manifest, expert_named, first_name
from fedmoe.federation.events import ExpertRenamed, ExpertRetired, ExpertUnretired, RollEvent
from fedmoe.lora.manifest import Manifest
from fedmoe.runtime.errors import RefusedError


def rename(
    experts: Mapping[str, ExpertModel], name: str, to: str, number: int, at: float
) -> tuple[ExpertModel, ExpertRenamed | None]:
    """The expert and what gives it the name `to`, None if it goes by that already; a name of another one is refused."""
    expert = expert_named(experts, name)
    holder = experts.get(first_name(experts, to))
    if holder is not None and holder.name != expert.name:
        now = "" if holder.title == to else f" (now {holder.title})"
        raise RefusedError(
            "name_taken",
            f"{to!r} is or was the name of another expert{now}; names are never given to a second one.",
            "Choose another name.",
        )
    return expert, None if expert.title == to else ExpertRenamed(expert.name, to, number, at)


def retire(
    experts: Mapping[str, ExpertModel], name: str, reason: str, number: int, at: float
) -> tuple[ExpertModel, ExpertRetired | None]:
    """The expert and what retires it, None if it is retired already."""
    expert = expert_named(experts, name)
    return expert, None if expert.retired else ExpertRetired(expert.name, number, reason, at)


def unretire(
    experts: Mapping[str, ExpertModel], manifest: Manifest | None, name: str, number: int, at: float
) -> tuple[ExpertModel, ExpertUnretired | None]:
    """The expert and what brings it back, None if it is there; refused if the federation has another manifest now."""
    expert = expert_named(experts, name)
    if manifest is not None:
        check_manifest(manifest, expert.manifest)
    return expert, ExpertUnretired(expert.name, number, at) if expert.retired else None


def changed(expert: ExpertModel, event: RollEvent) -> ExpertModel:
    """The same version of the expert after an event."""
    match event:
        case ExpertRenamed():
            return replace(expert, names=(*expert.names, event.name))
        case ExpertRetired():
            return replace(expert, retired=True)
        case ExpertUnretired():
            return replace(expert, retired=False)


def binding_manifest(experts: Mapping[str, ExpertModel]) -> Manifest | None:
    """What all experts of the federation share; None while nobody is there but retired ones that never changed.

    So an administrator can take back a first registration that was a mistake, and the next one decides anew.
    """
    binding = (expert for expert in experts.values() if expert.version > 0 or not expert.retired)
    found = next(binding, None)
    return found.manifest if found is not None else None
