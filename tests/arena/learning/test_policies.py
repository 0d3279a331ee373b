"""The bound on staleness: what is sampled is learned from after the batches in flight."""

from __future__ import annotations

import pytest
from tiny_arena import opened, tiny_config


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_no_more_batches_start_than_the_bound_on_staleness_allows(bound: int) -> None:
    with opened(tiny_config(max_staleness=bound)) as arena:
        for _ in range(bound + 1):
            assert arena.policies.may_start()
            arena.policies.started()
        assert not arena.policies.may_start()
        arena.policies.learned({}, {}, {})
        assert arena.policies.may_start()
        saved = arena.policies.state()["ann"]
        assert isinstance(saved, dict)
        assert (saved["admission"]["running"], saved["admission"]["accepted"]) == (bound, 1)
