"""Configurations in TOML files, checked by a pydantic model; every problem is named with its key."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TypeVar, get_args

from pydantic import BaseModel, ValidationError

from fedmoe.runtime.errors import ExpectedError

Model = TypeVar("Model", bound=BaseModel)


def read_toml(path: Path, model: type[Model], error: type[ExpectedError], example: str) -> Model:
    """The configuration in a TOML file; raises `error` naming the file, the key and what is allowed.

    `example` is the file to begin with, which an empty one is told of.
    """
    try:
        values = tomllib.loads(path.read_text("utf-8-sig"))  # editors of some systems begin a file with a mark
    except OSError as cause:
        raise error(f"{path} cannot be read: {cause.strerror}") from cause
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise error(f"{path} is not TOML: {cause}") from cause
    if not values:
        raise error(f"{path} sets nothing; begin with a copy of {example}")
    try:
        return model.model_validate(values)
    except ValidationError as cause:
        problems = [
            _problem(model, each["loc"], each["type"], each["msg"], each["input"])
            for each in cause.errors(include_url=False)
        ]
        raise error(f"{path}: " + "; ".join(problems)) from cause


def _problem(model: type[BaseModel], place: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    where = ".".join(map(str, place))
    if kind not in ("extra_forbidden", "unexpected_keyword_argument"):
        shown = repr(value)
        # A whole section is too long to be shown, and some messages have what was given already.
        is_shown = isinstance(value, str | int | float) and len(shown) <= 80 and str(value) not in message
        return f"{where}: {message}" + (f", got {shown}" if is_shown else "")
    close = difflib.get_close_matches(str(place[-1]), _section_keys(model, place[:-1]), 1)
    return f"{where}: there is no such key" + (f"; did you mean {close[0]}?" if close else "")


def _section_keys(model: type[BaseModel], section: tuple[int | str, ...]) -> list[str]:
    """The keys of a section of the file, by its place."""
    keys: dict[str, object] = _keys_of(model)
    for name in section:
        inner = {key: kind for part in _parts(keys.get(str(name))) for key, kind in _keys_of(part).items()}
        keys = inner or keys
    return list(keys)


def _parts(annotation: object) -> Iterator[object]:
    """A section's type and all it is made of: one of several models or none, a tuple of them."""
    yield annotation
    for inner in get_args(annotation):
        yield from _parts(inner)


def _keys_of(model: object) -> dict[str, object]:
    """The keys of a section with their types; none for anything else."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        return {name: field.annotation for name, field in model.model_fields.items()}
    return {each.name: each.type for each in fields(model)} if is_dataclass(model) else {}
