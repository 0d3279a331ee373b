"""Dataclasses as JSON values in a checkpoint and back, every field checked against its type."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from fedmoe.runtime.errors import ExpectedError

T = TypeVar("T")
# Making one takes milliseconds.
_adapter: Callable[[object], TypeAdapter[Any]] = cache(TypeAdapter)


class SavedStateError(ExpectedError, ValueError):
    """Saved values that are not those of the class they are read as."""


def saved_state(value: object) -> dict[str, object]:
    """The fields of a dataclass as JSON values, in their order; tuples become lists.

    A field annotated with `pydantic.Field(exclude=True)` is left out and needs a default.
    """
    return cast("dict[str, object]", _adapter(type(value)).dump_python(value, mode="json"))


def restored(kind: type[T], saved: Mapping[str, object]) -> T:
    """The value that `saved_state` wrote; raises SavedStateError naming each key that is missing, unknown or wrong."""
    try:
        value = _adapter(kind).validate_python(saved)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise SavedStateError(f"not the saved state of {kind.__name__}: {problems}") from error
    # Whatever was filled in by a default, ignored or converted would not be written back as it was read.
    if (again := saved_state(value)) != saved:
        differing = [key for key in {**again, **saved} if again.get(key) != saved.get(key) or key not in again]
        raise SavedStateError(f"not the saved state of {kind.__name__}: {', '.join(differing)} cannot be read back")
    return cast(T, value)
