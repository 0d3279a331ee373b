"""Messages about the replicas of a federation: who owns what, and how large an upload may be."""

from __future__ import annotations

from fedmoe.wire.contract.messages import Message


class OwnerInfo(Message):
    """Who owns a duty: `term` rises with every change of owner, `seconds_left` are those of the lease."""

    duty: str
    replica: str
    url: str
    term: int
    seconds_left: float


class ReplicaListing(Message):
    """The owners of all duties; empty where one coordinator serves the federation alone."""

    owners: list[OwnerInfo]


class UploadLimit(Message):
    """How many bytes an upload may have that would be taken now; `token` is the hash of its sender's, empty for none.

    Replicas ask the owner for it before they receive a body.
    """

    bytes: int
    token: str
