"""What an update must be before it is judged: numbers that cannot break an expert, under a number of its own."""

from __future__ import annotations

import math

import numpy as np
import structlog

from fedmoe.coordinator import Submission
from fedmoe.errors import RefusedError
from fedmoe.events import HeldUpdateRejected, UpdateAccepted, UpdateHeld
from fedmoe.lora.adapter import FloatVector, Layout
from fedmoe.lora.robust import first_not_finite
from fedmoe.wire.messages import UpdateHeader, UpdateResult

_log = structlog.get_logger("fedmoe.coordinator")

#: The largest norm of an update. Far above any real one, and so small that no number of updates overflows an expert.
MAX_NORM = 1e9
_PIECE = 1 << 16


def refuse_other_bytes(earlier: UpdateAccepted | UpdateHeld | HeldUpdateRejected, submission: Submission) -> None:
    """The same update again is fine; another one under its number is not."""
    if (earlier.digest, earlier.expert) != (submission.digest, submission.expert):
        raise RefusedError(
            "sequence_reused",
            f"worker {submission.worker!r} already sent another update as number {submission.sequence}.",
            "Every update needs its own number; a restored worker state needs a new epoch.",
            accepted_digest=earlier.digest,
        )


def usable_norm(layout: Layout, flat: FloatVector) -> float:
    """The L2 norm; refuses numbers that would break an expert: not finite, or a sum that could overflow float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        squared = float(np.dot(flat, flat))
    if squared <= MAX_NORM**2:  # one pass decides the usual case; false for a NaN
        return math.sqrt(squared)
    bad = first_not_finite(layout, flat)
    if bad is not None:
        raise RefusedError(
            "not_finite", f"{bad} holds a NaN or an infinity.", "Lower the learning rate; never push such weights."
        )
    norm = math.sqrt(
        sum(float(np.square(flat[at : at + _PIECE], dtype=np.float64).sum()) for at in range(0, len(flat), _PIECE))
    )
    raise RefusedError(
        "norm_too_large",
        f"the update's norm is {norm:.3g}; at most {MAX_NORM:g} is taken, real ones are near 1.",
        "Lower the learning rate or clip the gradients; never push such weights.",
        norm=norm,
    )


def submission_of(header: UpdateHeader, digest: str, norm: float | None = None) -> Submission:
    info = {"loss": header.loss, "steps": header.steps, "tokens": header.tokens}
    return Submission(
        header.expert,
        header.worker,
        header.epoch,
        header.sequence,
        header.base_version,
        digest,
        {key: float(value) for key, value in info.items() if value is not None},
        norm,
    )


def log_update(header: UpdateHeader, result: UpdateResult) -> None:
    """Say what became of an update."""
    named = {"expert": result.expert, "worker": header.worker, "sequence": header.sequence}
    if result.status != "landed":
        _log.warning(result.status, **named, held=result.held, reason=result.note, duplicate=result.duplicate)
        return
    _log.info(
        "update",
        **named,
        version=result.version,
        staleness=result.staleness,
        coefficient=round(result.coefficient, 6),
        digest=result.digest[:12],
        duplicate=result.duplicate,
    )
