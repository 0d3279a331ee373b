"""Expert names: requests may use any name an expert ever had, storage uses its first, answers its newest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from fedmoe.coordinator import GatewayModel
from fedmoe.experts import ExpertModel, first_name
from fedmoe.server.access.security import Principal

Value = TypeVar("Value")


def resolve_expert(experts: Mapping[str, ExpertModel], principal: Principal, name: str) -> str:
    """The first name of the expert that is meant; refused unless the token may use it, by any of its names."""
    principal.named["expert"] = name
    first = first_name(experts, name)
    if not (first in experts and may_use(principal, experts[first])):
        principal.require_expert(name)
    return first


def may_use(principal: Principal, expert: ExpertModel) -> bool:
    """Whether the expert is within a token's scope, which may name it as it was called when the token was made."""
    return any(principal.may_use(name) for name in (expert.name, *expert.names))


def scope_by_first_names(principal: Principal, experts: Mapping[str, ExpertModel]) -> Principal:
    """The same with the scope of its token in first names."""
    if principal.experts is None:
        return principal
    return replace(principal, experts=tuple(one.name for one in experts.values() if may_use(principal, one)))


def by_title(values: Mapping[str, Value], experts: Mapping[str, ExpertModel]) -> dict[str, Value]:
    """By the names that experts go by, what is given by their first ones."""
    found = {experts[name].title if name in experts else name: value for name, value in values.items()}
    return dict(sorted(found.items()))


def gateway_by_title(gateway: GatewayModel, experts: Mapping[str, ExpertModel]) -> GatewayModel:
    """The gateway with the names that experts go by; the very same where nobody was renamed."""
    if not any(expert.names for expert in experts.values()):
        return gateway
    return replace(
        gateway,
        sources=MappingProxyType(by_title(gateway.sources, experts)),
        weights=MappingProxyType(by_title(gateway.weights, experts)),
        statistics=MappingProxyType(by_title(gateway.statistics, experts)),
        statistics_tokens=MappingProxyType(by_title(gateway.statistics_tokens, experts)),
        source_digests=MappingProxyType(by_title(gateway.source_digests, experts)),
        left_out=MappingProxyType(by_title(gateway.left_out, experts)),
    )
