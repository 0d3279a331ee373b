"""Names at the door: inside an expert goes by its first name, outside by its newest one, and by its former ones too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeVar

from fedmoe.coordinator import GatewayModel
from fedmoe.experts import ExpertModel, first_name
from fedmoe.server.access.security import Principal

Value = TypeVar("Value")


def addressed(experts: Mapping[str, ExpertModel], principal: Principal, name: str) -> str:
    """The first name of the expert that is meant; refused unless the token may use it, by any of its names."""
    principal.named["expert"] = name
    first = first_name(experts, name)
    if not (first in experts and may_use(principal, experts[first])):
        principal.require_expert(name)
    return first


def may_use(principal: Principal, expert: ExpertModel) -> bool:
    """Whether the expert is within a token's scope, which may name it as it was called when the token was made."""
    return any(principal.may_use(name) for name in (expert.name, *expert.names))


def by_first_names(principal: Principal, experts: Mapping[str, ExpertModel]) -> Principal:
    """The same with the scope of its token in first names."""
    if principal.experts is None:
        return principal
    return replace(principal, experts=tuple(one.name for one in experts.values() if may_use(principal, one)))


def titled(values: Mapping[str, Value], experts: Mapping[str, ExpertModel]) -> dict[str, Value]:
    """By the names that experts go by, what is given by their first ones."""
    found = {experts[name].title if name in experts else name: value for name, value in values.items()}
    return dict(sorted(found.items()))


def titled_gateway(gateway: GatewayModel, experts: Mapping[str, ExpertModel]) -> GatewayModel:
    """The gateway with the names that experts go by; the very same where nobody was renamed."""
    if not any(expert.names for expert in experts.values()):
        return gateway
    return replace(
        gateway,
        sources=MappingProxyType(titled(gateway.sources, experts)),
        weights=MappingProxyType(titled(gateway.weights, experts)),
        statistics=MappingProxyType(titled(gateway.statistics, experts)),
        statistics_tokens=MappingProxyType(titled(gateway.statistics_tokens, experts)),
        source_digests=MappingProxyType(titled(gateway.source_digests, experts)),
        left_out=MappingProxyType(titled(gateway.left_out, experts)),
    )
