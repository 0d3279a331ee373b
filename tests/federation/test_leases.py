"""Whose push is let through under a worker's id, decided on values."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedmoe.federation.leases import LEAST_SECONDS, MOST_SECONDS, Lease, lease_after_restart

PUSHES = st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 2000)), min_size=1, max_size=40)


@given(PUSHES)
def test_within_a_lease_only_its_holder_pushes_and_every_lease_ends_50(pushes: list[tuple[str, float]]) -> None:
    now = 0.0
    lease = Lease("a", "", now)
    for epoch, pause in pushes:
        now += pause
        before, excluded = lease, lease.excludes(epoch, "", now)
        assert excluded == (epoch != lease.epoch and lease.seen + lease.seconds - now > 0)  # rounded alike
        assert LEAST_SECONDS <= lease.seconds <= MOST_SECONDS
        if excluded:
            lease = lease.tried(now)
            assert (lease.epoch, lease.seen, lease.seconds) == (before.epoch, before.seen, before.seconds)
            assert lease.warning(now)
            assert lease.refusal("w1", epoch, now).code == ("lease_lost" if epoch in before.former else "lease_held")
        else:
            lease = lease.pushed(epoch, "", now)
            assert (lease.epoch, lease.seen) == (epoch, now)
            assert epoch not in lease.former


@given(PUSHES)
def test_one_epoch_alone_is_never_excluded_and_never_warned_of_50(pushes: list[tuple[str, float]]) -> None:
    now, lease = 0.0, Lease("a", "", 0.0)
    for _, pause in pushes:
        now += pause
        assert not lease.excludes("a", "", now)
        lease = lease.pushed("a", "", now)
        assert lease.warning(now) == ""


def test_two_that_alternate_more_slowly_than_a_lease_are_seen_as_well_50() -> None:
    lease = Lease("a", "", 0.0).pushed("b", "", 1000.0)
    assert lease.warning(1000.0) == ""
    lease = lease.pushed("a", "", 2000.0)
    assert "two places" in lease.warning(2000.0)
    assert lease.warning(2000.0 + 4000.0) == ""


def test_a_lease_lasts_a_few_intervals_of_its_holder_50() -> None:
    lease = Lease("a", "", 0.0).pushed("a", "", 100.0)
    assert not lease.pushed("a", "", 101.0).excludes("b", "", 101.0 + LEAST_SECONDS)
    assert lease.excludes("b", "", 100.0 + 249.0)
    assert not lease.excludes("b", "", 100.0 + 250.0)


def test_another_token_is_another_person_who_is_not_shut_out_50() -> None:
    lease = Lease("a", "mine", 0.0)
    assert lease.excludes("b", "mine", 1.0)
    assert not lease.excludes("b", "another", 1.0)
    after = lease.pushed("b", "another", 1.0)
    assert (after.epoch, after.token) == ("a", "mine")
    assert "two places" in after.warning(1.0)


def test_after_a_restart_whoever_pushed_last_has_a_whole_lease_and_former_ones_are_told_to_stop_50() -> None:
    lease = lease_after_restart("b", -1e9, ("a",), 5.0)
    assert lease.excludes("a", "", 5.0 + LEAST_SECONDS - 1)
    assert lease.refusal("w1", "a", 6.0).code == "lease_lost"
    assert lease.refusal("w1", "c", 6.0).code == "lease_held"
    assert not lease.excludes("c", "", 5.0 + LEAST_SECONDS)
