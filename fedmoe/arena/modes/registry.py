"""The table of modes by name, those of installed packages included."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedmoe.arena.modes.competitive import CompetitiveMode
from fedmoe.arena.modes.cooperative import CooperativeMode
from fedmoe.arena.modes.independent import IndependentMode
from fedmoe.arena.modes.mixed import MixedMode
from fedmoe.arena.modes.protocol import Mode, ModeError
from fedmoe.arena.modes.team_battle import TeamBattleMode
from fedmoe.runtime.plugins import PluginGroup

#: Our own modes; installed packages add theirs in the entry-point group `fedmoe.modes`.
MODES: Mapping[str, Callable[[], Mode]] = {
    mode.name: mode for mode in (CooperativeMode, CompetitiveMode, TeamBattleMode, MixedMode, IndependentMode)
}
_PLUGINS = PluginGroup("fedmoe.modes", "mode", ModeError, MODES)


def make_mode(name: str) -> Mode:
    """A new mode of that name; raises ModeError when there is none, or more than one."""
    return _PLUGINS.get(name)()
