"""Limits on registration: the size of an expert, and how many experts a token, a worker and all may register."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedmoe.experts import ExpertModel, Registrant, check_base
from fedmoe.lora.manifest import Manifest
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.contract.messages import ManifestMessage

_RETIRE = "Retire experts that nobody trains ('fedmoe experts retire NAME', an administrator's)"


def checked_manifest(message: ManifestMessage, expected: Manifest | None) -> Manifest:
    """The manifest that a worker registers with, where it can be one and is of the `expected` one's base model."""
    if expected is not None:  # said first, since everything else depends on it
        check_base(expected.base, message.base_model())
    try:
        message.check()
    except ValueError as error:
        raise RefusedError(
            "expert_too_large", f"manifest: {error}.", "Lower --lora-r or adapt fewer --target-modules."
        ) from error
    try:
        return message.manifest()
    except ValueError as error:
        raise RefusedError("lora_mismatch", f"the manifest contradicts itself: {error}.") from error


@dataclass(frozen=True, slots=True)
class RegistrationLimits:
    """`parameters` an expert may have, and `experts` there may be that are not retired.

    Of those on which nothing has landed yet, one token and one worker may have so many; administrators any.
    """

    parameters: int = 1 << 28
    experts: int = 1024
    untrained_by_token: int = 64
    untrained_by_worker: int = 32

    def check(
        self, experts: Mapping[str, ExpertModel], name: str, manifest: Manifest, by: Registrant, admin: bool
    ) -> None:
        """Refuse an expert of this name that would be one too many, or too large; one that is there is neither."""
        if name in experts:
            return
        size = manifest.layout.size
        if size > self.parameters:
            raise RefusedError(
                "expert_too_large",
                f"{name} would have {size} parameters; at most {self.parameters} are taken here.",
                "Lower --lora-r or adapt fewer --target-modules, or start the coordinator with a larger "
                "--max-parameters.",
            )
        active = [expert for expert in experts.values() if not expert.retired]
        if len(active) >= self.experts:
            raise _too_many(
                f"there are {len(active)} experts; at most {self.experts} are kept here.",
                f"{_RETIRE}, or start the coordinator with a larger --max-experts.",
            )
        if admin:
            return
        waiting = [expert.registrant for expert in active if expert.untrained()]
        with_token = sum(other.token == by.token for other in waiting)
        if with_token >= self.untrained_by_token:
            raise _too_many(
                f"{with_token} experts were registered with this token and nothing has landed on them yet.",
                f"Train one of them first. {_RETIRE}.",
            )
        of_worker = sum(other == by for other in waiting)
        if of_worker >= self.untrained_by_worker:
            raise _too_many(
                f"worker {by.worker!r} registered {of_worker} experts on which nothing has landed yet.",
                f"Train one of them first. {_RETIRE}.",
            )


def _too_many(detail: str, fix: str) -> RefusedError:
    return RefusedError("too_many_experts", detail, fix)
