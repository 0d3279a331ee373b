"""The players of a tournament: policies from the checkpoints of runs, and frozen adapters from a pool."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmoe.arena.config import ArenaConfig, TaskSection
from fedmoe.arena.run import checkpoint
from fedmoe.arena.run.checkpoint import MANIFEST, ArenaState
from fedmoe.inference.engine import AdapterKey
from fedmoe.lora.adapter import Adapter
from fedmoe.lora.formats import PEFT_CONFIG, PEFT_WEIGHTS, read_peft
from fedmoe.lora.safetensors_bytes import CodecError
from fedmoe.runtime.errors import ExpectedError


class EntrantError(ExpectedError, ValueError):
    """Players that cannot be read or cannot meet; says what is wrong, in which folder, and what to do."""


@dataclass(frozen=True)
class Entrant:
    """A frozen player under the name that the table shows; `base` is the model its adapter was made for, if it says."""

    key: AdapterKey
    shown: str
    adapter: Adapter
    base: str | None
    folder: Path


@dataclass(frozen=True)
class EntryList:
    """All players that have an adapter, and the configuration whose task they meet at."""

    config: ArenaConfig
    entrants: tuple[Entrant, ...]

    def check_base(self, names: Sequence[str]) -> None:
        """Refuse adapters that say they were made for a model with none of these names, with EntrantError."""
        for entrant in self.entrants:
            if entrant.base is not None and entrant.base not in names:
                raise EntrantError(f"{entrant.folder} is for the base model {entrant.base}, the runs have {names[0]}")


def read_field(runs: Sequence[Path], pools: Sequence[Path] = ()) -> EntryList:
    """The newest policies of runs (or of single checkpoints), and what pools hold; reads only.

    A pool is a run, a checkpoint, a PEFT folder, or a folder of PEFT folders. Raises EntrantError where there is
    nothing to read, and for runs of different base models or tasks, naming both values; CheckpointError for damage.
    """
    places = [path.resolve() for path in (*runs, *pools)]
    twice = [str(path) for path in (*runs, *pools) if places.count(path.resolve()) > 1]
    if twice or not runs:
        raise EntrantError(f"{twice[0]} is given twice" if twice else "at least one run is needed, got none")
    labels = _labels([*runs, *pools])
    states = {path: _state(path) for path in (*runs, *pools)}
    missing = [path for path in runs if states[path] is None]
    if missing:
        raise EntrantError(f"{missing[0]} holds no checkpoint of a run; adapters from elsewhere go to --pool")
    configs = {path: ArenaConfig.model_validate(state.config) for path, state in states.items() if state}
    _check_alike(configs)
    entrants = [
        entrant
        for path, state in states.items()
        for entrant in (_policies(path, labels[path], state) if state else _adapters(path, labels[path]))
    ]
    return EntryList(configs[runs[0]], tuple(entrants))


def _labels(paths: Sequence[Path]) -> Mapping[Path, str]:
    """What stands before a player's name: nothing for a single place, else the folder's name where it is unique."""
    if len(paths) == 1:
        return {paths[0]: ""}
    names = [path.resolve().name for path in paths]
    return {path: f"{name if names.count(name) == 1 else path}/" for path, name in zip(paths, names, strict=True)}


def _state(path: Path) -> ArenaState | None:
    """What a run's newest checkpoint holds, or a checkpoint given as such; None for folders that are neither."""
    if (path / MANIFEST).is_file():
        return checkpoint.load(path)
    newest = checkpoint.load_newest(path / "checkpoints")
    return newest.state if newest else None


def _check_alike(configs: Mapping[Path, ArenaConfig]) -> None:
    first, *others = configs
    for other in others:
        ours, yours = configs[first], configs[other]
        for what, mine, theirs in (
            ("base models", ours.base_model, yours.base_model),
            ("tasks", _task(ours.task), _task(yours.task)),
            ("chat templates", _template(ours), _template(yours)),
        ):
            if mine != theirs:
                raise EntrantError(f"players of different {what} cannot meet: {first} has {mine}, {other} has {theirs}")


def _template(config: ArenaConfig) -> str:
    own = config.chat_template or "the base model's own"
    return f"{own} with {config.chat_template_kwargs}"


def _task(task: TaskSection) -> str:
    options = ", ".join(f"{name} = {value}" for name, value in sorted(task.options.items()))
    return f"{task.name} ({options})" if options else task.name


def _policies(path: Path, label: str, state: ArenaState) -> Iterator[Entrant]:
    policies = state.state["policies"]
    assert isinstance(policies, Mapping)
    for name, state_of_policy in policies.items():
        version = int(state_of_policy["version"])
        adapter = state.adapters[f"{name}@{version}"]
        yield Entrant(AdapterKey(f"{label}{name}", version), f"{label}{name}@{version}", adapter, None, path)


def _adapters(path: Path, label: str) -> Iterator[Entrant]:
    single = (path / PEFT_CONFIG).is_file()
    folders = [path] if single else sorted(file.parent for file in path.glob(f"*/{PEFT_CONFIG}"))
    if not folders:
        raise EntrantError(f"{path} is no run, no PEFT folder ({PEFT_CONFIG}) and holds none; give another --pool")
    for folder in folders:
        name = label.rstrip("/") if single else f"{label}{folder.name}"
        try:
            config, weights = ((folder / file).read_bytes() for file in (PEFT_CONFIG, PEFT_WEIGHTS))
            adapter = read_peft({PEFT_CONFIG: config, PEFT_WEIGHTS: weights})
            base = json.loads(config).get("base_model_name_or_path")
        except (OSError, CodecError) as error:
            raise EntrantError(f"{folder} cannot be read as an adapter: {error}") from error
        yield Entrant(AdapterKey(name, 0), name, adapter, str(base) if base else None, folder)
