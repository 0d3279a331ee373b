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
    checks = {field.name: _FITS.get(str(field.type), _anything) for field in fields(kind)}
    needed = frozenset(
        field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING
    )
    return checks, needed


def _not_a_number(constant: str) -> NoReturn:
    raise ValueError(f"its payload holds {constant}")


def _text(value: object) -> bool:
    return type(value) is str


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


def _number(value: object) -> bool:
    if type(value) is int:
        return -(1 << 64) < value < 1 << 64
    return type(value) is float and math.isfinite(value)


def _anything(value: object) -> bool:
    return True


def _texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(map(_text, value))


def _counts(value: object) -> bool:
    return isinstance(value, dict) and all(map(_count, value.values()))


def _numbers(value: object) -> bool:
    return isinstance(value, dict) and all(map(_number, value.values()))


_FITS: Mapping[str, Callable[[object], bool]] = {
    "str": _text,
    "int": _count,
    "float": _number,
    "tuple[str, ...]": _texts,
    "dict[str, int]": _counts,
    "dict[str, float]": _numbers,
}
