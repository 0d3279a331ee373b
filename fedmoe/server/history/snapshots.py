"""Snapshots: an expert's state as bytes, and the best one to start a replay from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedmoe.federation.events import UpdateAccepted
from fedmoe.federation.lineage import Lineage
from fedmoe.lora.safetensors_bytes import encode_named, read_named
from fedmoe.lora.update_rules import RuleState


def snapshot_bytes(state: RuleState) -> bytes:
    """An expert's state as safetensors; `read_snapshot` gives it back bit for bit."""
    tensors = {"weights": state.weights} | {f"moment.{i}": moment for i, moment in enumerate(state.moments)}
    return encode_named(tensors, {"count": str(state.count)})


def read_snapshot(data: bytes, count: int) -> RuleState:
    """The state that `snapshot_bytes` wrote; `count` is how many updates it holds."""
    tensors = read_named(data)
    moments = tuple(tensors[f"moment.{i}"] for i in range(len(tensors) - 1))
    return RuleState(tensors["weights"], moments, count)


@dataclass(frozen=True, slots=True)
class ReplayStart:
    """A snapshot to fold from, and the updates that follow it."""

    version: int
    rest: list[UpdateAccepted]


def best_snapshot(
    snapshots: Mapping[int, str], chains: Mapping[int, Lineage | None], chain: Lineage | None
) -> ReplayStart | None:
    """The longest beginning of `chain` that a snapshot holds."""
    snapshot_of = {id(chains[version]): version for version in snapshots if version in chains}
    rest: list[UpdateAccepted] = []
    while chain is not None:
        if id(chain) in snapshot_of:
            return ReplayStart(snapshot_of[id(chain)], rest[::-1])
        if chain.update is None:
            return None
        rest.append(chain.update)
        chain = chain.before
    return None
