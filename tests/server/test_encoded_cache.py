from __future__ import annotations

from dataclasses import replace

from support import MANIFEST

from fedmoe.experts import ExpertModel
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.update_rules import RULES
from fedmoe.server.routes.weight_responses import EncodedCache, Weights, expert_weights


def counted(name: str, made: list[str]) -> Weights:
    """An expert's weights that say when they are encoded; a body of theirs has some hundred bytes."""
    weights = expert_weights(ExpertModel.initial(name, MANIFEST, 1, RULES["sgd"]))

    def adapter() -> Adapter:
        made.append(name)
        return weights.content()  # type: ignore[operator]

    return replace(weights, content=adapter)


def test_what_was_asked_for_last_is_kept_up_to_the_limit() -> None:
    made: list[str] = []
    a, b, c = (counted(name, made) for name in "abc")
    size = EncodedCache().get(a, "fp32").size
    made.clear()
    cache = EncodedCache(most_bytes=2 * size + size // 2)
    for one in (a, b, a, c, a, c):
        cache.get(one, "fp32")
    assert made == ["a", "b", "c"]
    cache.get(b, "fp32")  # had to go for c
    assert made == ["a", "b", "c", "b"]


def test_a_body_larger_than_the_limit_is_kept_alone() -> None:
    made: list[str] = []
    cache = EncodedCache(most_bytes=1)
    first = counted("a", made)
    assert cache.get(first, "fp32") is cache.get(first, "fp32")
    cache.get(counted("b", made), "fp32")
    cache.get(first, "fp32")
    assert made == ["a", "b", "a"]
