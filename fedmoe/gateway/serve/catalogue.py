"""Versions of models that are served, and leases that keep an old one until its last request has ended.

A snapshot says what new requests get. An active request holds a lease on one version from beginning to end; a
version that is no longer current is unloaded after its last lease.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

from fedmoe.inference.backend import ServedModel

GATEWAY, AUTO, BASE = "gateway", "auto", "base"
#: Names with a meaning of their own; an expert with such a name cannot be asked for.
RESERVED = frozenset({GATEWAY, AUTO, BASE})


@dataclass(frozen=True)
class CatalogueSnapshot:
    """What is served at one moment: by name, and since when (seconds since 1970)."""

    models: Mapping[str, ServedModel]
    since: float

    @property
    def gateway_version(self) -> int | None:
        """The gateway's version, None where none is served."""
        return self.models[GATEWAY].version if GATEWAY in self.models else None

    def changed(self, listed: Mapping[str, tuple[int, str]]) -> list[str]:
        """The names in `listed` (version, digest) that are not served as they are there."""
        served = {name: (model.version, model.digest) for name, model in self.models.items()}
        return [name for name, newest in listed.items() if served.get(name) != newest]


class Catalogue:
    """The current snapshot and the leases; safe to use from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._retiring = threading.Event()
        self._leases: Counter[ServedModel] = Counter()
        self._old: set[ServedModel] = set()
        self.snapshot = CatalogueSnapshot(MappingProxyType({}), 0.0)

    def publish(self, models: Mapping[str, ServedModel], now: float) -> None:
        """New requests get these from now on; they must be loaded."""
        with self._lock:
            current = set(models.values())
            self._old |= set(self.snapshot.models.values()) - current
            self._old -= current
            self.snapshot = CatalogueSnapshot(MappingProxyType(dict(models)), now)
            self._retiring.set()

    @contextmanager
    def lease(self, name: str) -> Iterator[tuple[ServedModel, CatalogueSnapshot]]:
        """The version of `name` that is served now, kept until the block ends, and the snapshot it is of.

        Raises KeyError for a name that is not served.
        """
        with self._lock:
            snapshot = self.snapshot
            model = snapshot.models[name]
            self._leases[model] += 1
        try:
            yield model, snapshot
        finally:
            with self._lock:
                self._leases[model] -= 1
                if model in self._old and self._leases[model] == 0:
                    self._retiring.set()

    def retired(self) -> list[ServedModel]:
        """Old versions without a lease; each is given once, for unloading."""
        with self._lock:
            self._retiring.clear()
            unused = sorted(model for model in self._old if self._leases[model] == 0)
            self._old.difference_update(unused)
            for model in unused:
                del self._leases[model]
            return unused

    def await_retired(self, seconds: float) -> None:
        """Return when there may be something in `retired`, or after `seconds`."""
        self._retiring.wait(seconds)

    def wake(self) -> None:
        """End an `await_retired` at once."""
        self._retiring.set()
