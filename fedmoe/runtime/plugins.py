"""Plug-ins: objects that installed packages offer under FedMoE's entry-point groups, found by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from typing import Generic, TypeVar

Plugin = TypeVar("Plugin", bound=Callable[..., object])


@dataclass(frozen=True, slots=True)
class PluginGroup(Generic[Plugin]):
    """What one entry-point group offers, beside our own `built_in` objects of that sort.

    A name that nothing offers, or more than one, and an object that is not callable are raised as `error`, which calls
    the sort of object a `noun`.
    """

    group: str
    noun: str
    error: type[Exception]
    built_in: Mapping[str, Plugin]

    def names(self) -> list[str]:
        """The names of all built-in and installed objects."""
        return sorted({*self.built_in, *entry_points(group=self.group).names})

    def get(self, name: str) -> Plugin:
        """The object of that name."""
        points = [point for point in entry_points(group=self.group) if point.name == name]
        if len(points) + (name in self.built_in) > 1:
            places = ", ".join(point.value for point in points)
            raise self.error(f"{self.noun} {name!r} exists more than once (also in {places}); rename or uninstall one")
        if name in self.built_in:
            return self.built_in[name]
        if not points:
            raise self.error(f"{self.noun} {name!r} is not known; there are: {', '.join(self.names())}")
        loaded = points[0].load()
        if not callable(loaded):
            kind = type(loaded).__name__
            raise self.error(f"{self.noun} {name!r} ({points[0].value}) is a {kind}, not a callable")
        plugin: Plugin = loaded
        return plugin

    def installed(self) -> dict[str, Plugin]:
        """All objects of installed packages by name."""
        return {point.name: self.get(point.name) for point in entry_points(group=self.group)}


def entry_points(*, group: str) -> metadata.EntryPoints:
    """What the packages on the import path offer under a group; read once while that path is the same."""
    return _entry_points(group, tuple(sys.path))


# 10 ms, since each installed package has a file that is read.
@lru_cache(maxsize=32)
def _entry_points(group: str, _: tuple[str, ...]) -> metadata.EntryPoints:
    return metadata.entry_points(group=group)
