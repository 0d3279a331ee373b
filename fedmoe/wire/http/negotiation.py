"""Content negotiation by `Accept` (RFC 9110, 12.5.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.contract.messages import SAFETENSORS
from fedmoe.wire.http.middleware import RefusalMiddleware

JSON = "application/json"
_MOST_RANGES = 256


def weight_form(accept: Sequence[str]) -> str | None:
    """JSON or safetensors, by all `Accept` headers of a request; None if it excludes what could be sent.

    Safetensors have to be named, or be the only form that is left; named with the same weight they come first.
    """
    ranges = _ranges(accept)
    as_json, as_tensors = _weight(ranges, JSON), _weight(ranges, SAFETENSORS)
    if as_tensors and (as_json == 0 or (SAFETENSORS in ranges and as_tensors >= (as_json or 0.0))):
        return SAFETENSORS
    return None if as_json == 0 else JSON


def excludes(accept: Sequence[str], form: str) -> bool:
    """Whether a request says that it never takes this media type: a weight of 0, by the nearest range that covers it.

    What is merely not named may be sent: most programs name nothing of use.
    """
    return bool(accept) and _weight(_ranges(accept), form) == 0


def _weight(ranges: dict[str, float], form: str) -> float | None:
    """The weight of a media type by the nearest range that covers it; None where none does."""
    return next((ranges[media] for media in (form, f"{form.partition('/')[0]}/*", "*/*") if media in ranges), None)


def _ranges(accept: Sequence[str]) -> dict[str, float]:
    """Media range -> weight; of one that is named twice the smaller, so that 0 stays never."""
    ranges: dict[str, float] = {}
    for entry in ",".join(accept).split(",")[:_MOST_RANGES]:
        name, *parameters = (part.strip().lower() for part in entry.split(";"))
        values = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in parameters)}
        weight = _number(values.pop("q", "1"))
        if weight or not values:  # with parameters of its own it is a variant that is excluded, which we do not send
            ranges[name] = min(weight, ranges.get(name, 1.0))
    return ranges


def _number(given: str) -> float:
    """A weight from 0 to 1; what is none counts as 1, as if it were not there."""
    try:
        return min(max(float(given), 0.0), 1.0) if given.isascii() and not given.strip("0123456789.") else 1.0
    except ValueError:
        return 1.0


class NegotiationMiddleware(RefusalMiddleware):
    """Refuses callers that never take JSON where there is nothing else; paths in `others` have another form."""

    def __init__(self, app: ASGIApp, others: frozenset[str], refuse: Callable[[RefusedError], Response]) -> None:
        super().__init__(app, refuse)
        self._others = others

    def refusal(self, scope: Scope) -> RefusedError | None:
        wrong = scope["path"] not in self._others and excludes(Headers(scope=scope).getlist("accept"), JSON)
        return not_acceptable(JSON) if wrong else None


def not_acceptable(form: str) -> RefusedError:
    """The refusal of a caller that excludes the only form there is."""
    return RefusedError(
        "not_acceptable",
        f"this is answered as {form}, which the request's Accept header excludes (q=0).",
        f"Send 'Accept: {form}', or none.",
    )
