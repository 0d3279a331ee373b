"""How long a packed row may be: what was asked for, against the context of the base model."""

from __future__ import annotations

#: Tokens in a row if nobody says otherwise and the model can take so many; the same on every machine.
DEFAULT_MAX_LENGTH = 1024


class LengthError(ValueError):
    """A row that the base model, or the memory of this machine, cannot take."""


def resolve_max_length(wanted: int | None, context: int) -> int:
    """`wanted` tokens, by default `DEFAULT_MAX_LENGTH` or the model's `context` if that is shorter.

    Raises LengthError, with both values, for more than the context.
    """
    if wanted is None:
        return min(DEFAULT_MAX_LENGTH, context)
    if wanted > context:
        raise LengthError(
            f"--max-length {wanted} is more than the base model's context of {context} tokens; give {context} or less"
        )
    return wanted
