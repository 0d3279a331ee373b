"""The modes by name, those of installed packages included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType

from fedmoe.arena.modes.competitive import Competitive
from fedmoe.arena.modes.cooperative import Cooperative
from fedmoe.arena.modes.mixed import Mixed
from fedmoe.arena.modes.protocol import Mode, ModeError
from fedmoe.arena.modes.team_battle import TeamBattle

#: Entry points of this group add modes: name -> a callable without arguments that makes a `Mode`.
ENTRY_POINTS = "fedmoe.modes"

MODES: Mapping[str, Callable[[], Mode]] = MappingProxyType(
    {"cooperative": Cooperative, "competitive": Competitive, "team_battle": TeamBattle, "mixed": Mixed}
)


def make_mode(name: str) -> Mode:
    """A new mode of that name; raises ModeError when there is none, or more than one."""
    plugins = {point.name: point for point in entry_points(group=ENTRY_POINTS)}
    if name in MODES and name in plugins:
        raise ModeError(f"mode {name!r} is also defined by {plugins[name].value}; rename or uninstall one")
    if name in MODES:
        return MODES[name]()
    if name not in plugins:
        raise ModeError(f"mode {name!r} is not known; there are: {', '.join(sorted({*MODES, *plugins}))}")
    made: Mode = plugins[name].load()()
    return made
