"""The modes by name, those of installed packages included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from types import MappingProxyType

from fedmoe.arena.modes.competitive import Competitive
from fedmoe.arena.modes.cooperative import Cooperative
from fedmoe.arena.modes.independent import Independent
from fedmoe.arena.modes.mixed import Mixed
from fedmoe.arena.modes.protocol import Mode, ModeError
from fedmoe.arena.modes.team_battle import TeamBattle

#: Entry points of this group add modes: name -> a callable without arguments that makes a `Mode`.
ENTRY_POINTS = "fedmoe.modes"

MODES: Mapping[str, Callable[[], Mode]] = MappingProxyType(
    {
        "cooperative": Cooperative,
        "competitive": Competitive,
        "team_battle": TeamBattle,
        "mixed": Mixed,
        "independent": Independent,
    }
)


def make_mode(name: str) -> Mode:
    """A new mode of that name; raises ModeError when there is none, or more than one."""
    installed = tuple(entry_points(group=ENTRY_POINTS))
    plugins = [point for point in installed if point.name == name]
    if len(plugins) + (name in MODES) > 1:
        places = ", ".join(point.value for point in plugins)
        raise ModeError(f"mode {name!r} exists more than once (also in {places}); rename or uninstall one")
    if name in MODES:
        return MODES[name]()
    if not plugins:
        known = sorted({*MODES, *(point.name for point in installed)})
        raise ModeError(f"mode {name!r} is not known; there are: {', '.join(known)}")
    made: Mode = plugins[0].load()()
    return made
