"""What is served, what is kept, and when it goes."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.gateway.serve.catalogue import Catalogue
from fedmoe.inference.backend import ServedModel

NAMES = ("gateway", "python", "sql")


def model(name: str, version: int) -> ServedModel:
    return ServedModel(name, version, f"{version:064x}")


def test_a_name_that_is_not_served_has_no_lease() -> None:
    with pytest.raises(KeyError), Catalogue().lease("python"):
        pass


def test_a_lease_keeps_its_version_and_new_requests_get_the_new_one() -> None:
    catalogue = Catalogue()
    catalogue.publish({"python": model("python", 1)}, 1.0)
    with catalogue.lease("python") as (held, _):
        catalogue.publish({"python": model("python", 2)}, 2.0)
        assert held == model("python", 1)
        assert catalogue.retired() == []
        with catalogue.lease("python") as (newer, _):
            assert newer == model("python", 2)
    assert catalogue.retired() == [held]
    assert catalogue.retired() == []


def test_changed_names_what_is_not_served_as_listed() -> None:
    catalogue = Catalogue()
    catalogue.publish({"python": model("python", 1), "sql": model("sql", 1)}, 1.0)
    listed = {"python": (1, f"{1:064x}"), "sql": (1, "0" * 64), "law": (3, "1" * 64)}
    assert catalogue.snapshot.changed(listed) == ["sql", "law"]


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), st.dictionaries(st.sampled_from(NAMES), st.integers(0, 5))),
        st.tuples(st.just("lease"), st.sampled_from(NAMES)),
        st.tuples(st.just("release"), st.integers(0, 20)),
        st.tuples(st.just("sweep"), st.none()),
    ),
    max_size=40,
)


@given(ACTIONS)
def test_whatever_happens_nothing_goes_that_is_used_and_everything_else_goes(actions: list[tuple[str, object]]) -> None:
    catalogue = Catalogue()
    loaded: set[ServedModel] = set()
    leases: list[tuple[ServedModel, ExitStack]] = []
    for action, argument in actions:
        current = catalogue.snapshot.models
        if action == "publish":
            assert isinstance(argument, dict)
            wanted = {name: model(name, version) for name, version in argument.items()}
            loaded |= set(wanted.values())
            catalogue.publish(wanted, 0.0)
        elif action == "lease" and argument in current:
            stack = ExitStack()
            held, _ = stack.enter_context(catalogue.lease(str(argument)))
            leases.append((held, stack))
        elif action == "release" and leases:
            assert isinstance(argument, int)
            leases.pop(argument % len(leases))[1].close()
        elif action == "sweep":
            loaded -= set(catalogue.retired())
            assert loaded == set(current.values()) | {held for held, _ in leases}
        assert set(catalogue.snapshot.models.values()) | {held for held, _ in leases} <= loaded
