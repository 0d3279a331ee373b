from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache folder of the test's own, so that hashes of passing folders do not pile up in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
