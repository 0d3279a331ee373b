"""Expert names: requests may use any name an expert ever had, storage uses its first, answers its newest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

from fedmoe.coordinator import GatewayPlan
from fedmoe.experts import ExpertModel, first_name
from fedmoe.server.access.security import Principal

Value = TypeVar("Value")
_Plan = TypeVar("_Plan", bound=GatewayPlan)


def resolve_expert(experts: Mapping[str, ExpertModel], principal: Principal, name: str) -> str:
    """The first name of the expert `name` means; refused unless the token may use it, by any of its names."""
    principal.named["expert"] = name
    first = first_name(experts, name)
    if not (first in experts and may_use(principal, experts[first])):
        principal.require_expert(name)
    return first


def may_use(principal: Principal, expert: ExpertModel) -> bool:
    """Whether the expert is within a token's scope, which may name it as it was called when the token was made."""
    return any(principal.may_use(name) for name in (expert.name, *expert.names))


def scope_by_first_names(principal: Principal, experts: Mapping[str, ExpertModel]) -> Principal:
    """The principal with the scope of its token in first names."""
    if principal.experts is None:
        return principal
    return replace(principal, experts=tuple(expert.name for expert in experts.values() if may_use(principal, expert)))


def by_title(values: Mapping[str, Value], experts: Mapping[str, ExpertModel]) -> dict[str, Value]:
    """`values` by first name, keyed by the experts' newest names instead."""
    titles = {experts[name].title if name in experts else name: value for name, value in values.items()}
    return dict(sorted(titles.items()))


def gateway_by_title(gateway: _Plan, experts: Mapping[str, ExpertModel]) -> _Plan:
    """The gateway with its experts' newest names; the same object where none was renamed."""
    if not any(expert.names for expert in experts.values()):
        return gateway
    named = ("sources", "weights", "statistics", "statistics_tokens", "source_digests", "left_out")
    renamed: dict[str, Any] = {name: MappingProxyType(by_title(getattr(gateway, name), experts)) for name in named}
    return replace(gateway, **renamed)
