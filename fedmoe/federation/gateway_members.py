"""Members of the gateway: the experts it is made of, without those that learned nothing or are retired."""

from __future__ import annotations

from collections.abc import Mapping

from fedmoe.experts import ExpertModel
from fedmoe.federation.online_gateway import OnlineGateway

RETIRED = "it is retired"
UNTRAINED = "no update has landed on it yet"
MERGED = "it is retired; what was merged of it before stays in the gateway"
BUFFERED = "its first updates wait in the buffer"


def reason_to_leave_out(expert: ExpertModel, buffer_size: int) -> str | None:
    """Why an expert takes no part in a gateway, in words; None if it does."""
    if expert.retired:
        return RETIRED
    if not expert.untrained(buffer_size):
        return None
    return BUFFERED if expert.updates else UNTRAINED


def members(experts: Mapping[str, ExpertModel], buffer_size: int) -> dict[str, ExpertModel]:
    """The experts a gateway is made of, in name order; none while no expert has learned anything."""
    return {name: experts[name] for name in sorted(experts) if reason_to_leave_out(experts[name], buffer_size) is None}


def left_out(experts: Mapping[str, ExpertModel], buffer_size: int) -> dict[str, str]:
    """Expert -> why the gateway is made without it."""
    reasons = {name: reason_to_leave_out(experts[name], buffer_size) for name in sorted(experts)}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def left_out_of_online_gateway(experts: Mapping[str, ExpertModel], gateway: OnlineGateway) -> dict[str, str]:
    """Expert -> why nothing of it is in an online gateway; what was merged stays in it."""
    reasons = {name: MERGED for name in gateway.sources if experts[name].retired}
    for name in sorted(experts.keys() - gateway.sources.keys()):
        if experts[name].retired:
            reasons[name] = RETIRED
        elif name in gateway.branch_points and gateway.branch_points[name].steps == 0:
            reasons[name] = UNTRAINED
    return reasons
