"""Lineages: which updates each version of an expert is made of, and how each kind of event changes that."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedmoe.federation.events import ExpertRebased, UpdateAccepted, UpdateLost


@dataclass(frozen=True, slots=True, eq=False)
class Lineage:
    """The updates a version is made of, as a chain from the newest back; versions share what they have in common.

    `start` is where the expert was rebased onto the gateway, None where it began at version 0. The end of a chain that
    starts from the gateway is a node without an update.
    """

    update: UpdateAccepted | None
    before: Lineage | None
    length: int
    start: ExpertRebased | None

    @staticmethod
    def extend(before: Lineage | None, update: UpdateAccepted) -> Lineage:
        """One update more."""
        return Lineage(update, before, 1 + length(before), start(before))

    @staticmethod
    def updates(chain: Lineage | None) -> list[UpdateAccepted]:
        """The updates in order, from where the chain starts."""
        updates: list[UpdateAccepted] = []
        while chain is not None and chain.update is not None:
            updates.append(chain.update)
            chain = chain.before
        return updates[::-1]


#: Version -> the updates it is made of, of ONE expert; None is the chain of version 0.
Chains = Mapping[int, Lineage | None]


def length(chain: Lineage | None) -> int:
    """Updates in a chain; None is the chain of version 0."""
    return chain.length if chain is not None else 0


def start(chain: Lineage | None) -> ExpertRebased | None:
    """Where the expert was last rebased onto the gateway before the chain's updates; None if it began at version 0."""
    return chain.start if chain is not None else None


def after_loss(chains: Chains, newest: Lineage | None, event: UpdateLost) -> Lineage | None:
    """Those of the newest version but one."""
    return _without(newest, lambda update: update.identity == event.identity)


def after_rebase(chains: Chains, newest: Lineage | None, event: ExpertRebased) -> Lineage:
    """The last few of the newest version's updates once more, from the gateway on."""
    updates = Lineage.updates(newest)
    chain = Lineage(None, None, 0, event)
    for update in updates[len(updates) - event.again :]:
        chain = Lineage.extend(chain, update)
    return chain


def without_worker(chain: Lineage | None, worker: str) -> Lineage | None:
    """The chain without one worker's updates; the part before the first of them is shared, not copied."""
    return _without(chain, lambda update: update.worker == worker)


def _without(chain: Lineage | None, left_out: Callable[[UpdateAccepted], bool]) -> Lineage | None:
    shared, node = chain, chain
    passed: list[UpdateAccepted] = []
    copied = 0
    while node is not None and node.update is not None:
        if left_out(node.update):
            shared, copied = node.before, len(passed)
        else:
            passed.append(node.update)
        node = node.before
    for update in reversed(passed[:copied]):
        shared = Lineage.extend(shared, update)
    return shared
