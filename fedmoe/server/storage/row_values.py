"""Type checks of a journalled event's fields, by the annotations of its dataclass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from functools import cache
from typing import NoReturn


def parse_payload(payload: object) -> dict[str, object]:
    """The JSON object of a row; raises ValueError for anything else, and for numbers that are not finite."""
    if not isinstance(payload, str):
        raise ValueError(f"its payload is {type(payload).__name__}, not text")
    try:
        values = json.loads(payload, parse_constant=_not_a_number)
    except RecursionError:
        raise ValueError("its payload is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("its payload is no JSON object")
    return values


def check_values(kind: type, values: Mapping[str, object]) -> None:
    """Raise ValueError unless `values` are the fields of the dataclass `kind`, each of its type."""
    checks, needed = _checks(kind)
    if unknown := values.keys() - checks.keys():
        raise ValueError(f"it has fields that this version does not know: {sorted(unknown)[:5]}")
    if missing := needed - values.keys():
        raise ValueError(f"it lacks {sorted(missing)[:5]}")
    for name, value in values.items():
        if not checks[name](value):
            raise ValueError(f"its {name} is {repr(value)[:80]}")


@cache
def _checks(kind: type) -> tuple[dict[str, Callable[[object], bool]], frozenset[str]]:
    checks = {field.name: _FITS.get(str(field.type), lambda value: True) for field in fields(kind)}
    needed = frozenset(
        field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING
    )
    return checks, needed


def _not_a_number(constant: str) -> NoReturn:
    raise ValueError(f"its payload holds {constant}")


def _number(value: object) -> bool:
    if type(value) is int:
        return -(1 << 64) < value < 1 << 64
    return type(value) is float and math.isfinite(value)


_FITS: Mapping[str, Callable[[object], bool]] = {
    "str": lambda value: type(value) is str,
    "int": lambda value: type(value) is int and 0 <= value < 1 << 64,
    "float": _number,
    "tuple[str, ...]": lambda value: isinstance(value, list | tuple) and all(map(_FITS["str"], value)),
    "dict[str, int]": lambda value: isinstance(value, dict) and all(map(_FITS["int"], value.values())),
    "dict[str, float]": lambda value: isinstance(value, dict) and all(map(_number, value.values())),
}
