"""A dataclass comes back from its saved state as it was, and nothing else does."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Annotated

import pytest
from pydantic import Field

from fedmoe.runtime.saved_state import SavedStateError, restored, saved_state


@dataclass(frozen=True, slots=True)
class Part:
    size: int = 0


@dataclass(slots=True)
class Whole:
    key: tuple[str, int]
    best: float = 0.0
    part: Part = field(default_factory=Part)
    rules: Annotated[Part, Field(exclude=True)] = field(default_factory=Part)
    seen: dict[str, tuple[float, float]] = field(default_factory=dict)


WHOLE = Whole(("a", 1), math.inf, Part(3), seen={"x": (1.0, 0.5)})
SAVED = {"key": ["a", 1], "best": math.inf, "part": {"size": 3}, "seen": {"x": [1.0, 0.5]}}


def test_it_is_json_in_the_order_of_the_fields_and_comes_back_equal() -> None:
    saved = saved_state(WHOLE)
    assert saved == SAVED
    assert list(saved) == list(SAVED)
    assert restored(Whole, json.loads(json.dumps(saved))) == WHOLE


@pytest.mark.parametrize(
    ("saved", "named"),
    [
        ({**SAVED, "more": 1}, "more"),
        ({name: value for name, value in SAVED.items() if name != "best"}, "best"),
        ({name: value for name, value in SAVED.items() if name != "key"}, "key"),
        ({**SAVED, "best": "1.5"}, "best"),
        ({**SAVED, "part": {"size": "many"}}, r"part\.size"),
        ({**SAVED, "part": {"size": 3, "more": 1}}, "part"),
        ({**SAVED, "rules": {"size": 0}}, "rules"),
    ],
)
def test_values_that_are_missing_unknown_or_of_another_type_are_refused(saved: dict[str, object], named: str) -> None:
    with pytest.raises(SavedStateError, match=f"saved state of Whole: .*{named}"):
        restored(Whole, saved)
