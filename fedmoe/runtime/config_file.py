"""`fedmoe.toml`: found, read and judged; the source of configuration between environment variables and defaults."""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin

from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, TomlConfigSettingsSource

from fedmoe.runtime.errors import ExpectedError

#: Names the file where no --config does.
VARIABLE = "FEDMOE_CONFIG"
DEFAULT_FILE = "fedmoe.toml"
_chosen: ContextVar[Path | None] = ContextVar("chosen_configuration_file", default=None)
_KINDS: Mapping[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    list: ((list,), "a list of strings"),
    str: ((str,), "a string"),
}

ConfigT = TypeVar("ConfigT", bound=BaseSettings)
Processes = Mapping[str, type[BaseSettings]]


class ConfigFileError(ExpectedError):
    """The configuration file cannot be used; the message names file, section and key."""


@contextmanager
def using_file(file: Path | None) -> Iterator[None]:
    """Configurations made inside read this file; None: the one of `FEDMOE_CONFIG`, else `fedmoe.toml`."""
    reset = _chosen.set(file)
    try:
        yield
    finally:
        _chosen.reset(reset)


def configuration_file() -> Path | None:
    """The file that is read, None if there is none; raises `ConfigFileError` for a named file that is missing."""
    named = _chosen.get() or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if named is None:
        return Path(DEFAULT_FILE) if Path(DEFAULT_FILE).is_file() else None
    if not named.is_file():
        origin = "--config" if _chosen.get() else VARIABLE
        raise ConfigFileError(f"{origin} {named}: no such file; give a file of TOML, or drop it")
    return named


class FileSource(TomlConfigSettingsSource):
    """One process's section of the file; the other sections are judged too, so that no mistake waits in one."""

    def __init__(self, kind: type[BaseSettings], processes: Processes) -> None:
        self.file = configuration_file()
        self.processes = processes
        name = next((name for name, process in processes.items() if process is kind), None)
        header = (name,) if self.file is not None and name is not None else ()
        super().__init__(kind, self.file, header)

    def _read_file(self, file_path: Any) -> dict[str, Any]:
        try:
            content = super()._read_file(file_path)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigFileError(f"{file_path}: not TOML: {error}") from error
        except OSError as error:
            raise ConfigFileError(f"{file_path}: cannot be read: {error.strerror}") from error
        check_content(file_path, content, self.processes)
        return {name: content.get(name, {}) for name in self.processes}


def check_content(file: Path, content: Mapping[str, object], processes: Processes) -> None:
    """Raises `ConfigFileError` for unknown sections and keys, values of a wrong type, and secrets others can read."""
    for section, values in content.items():
        kind = processes.get(section)
        if kind is None:
            what = f"the section [{section}]" if isinstance(values, dict) else f"the key {section} outside a section"
            raise ConfigFileError(f"{file}: {what} is not known; {_hint(section, processes)}")
        if not isinstance(values, dict):
            raise ConfigFileError(f"{file}: {section} is a section; write [{section}] on a line of its own")
        for key, value in values.items():
            _check_value(file, section, key, value, kind.model_fields)


def _check_value(file: Path, section: str, key: str, value: object, fields: Mapping[str, FieldInfo]) -> None:
    place = f"{file}: [{section}] {key}"
    if key not in fields:
        raise ConfigFileError(f"{place}: not known; {_hint(key, fields)}")
    accepted, words = _KINDS[toml_kind(fields[key])]
    # Every bool is an int to Python.
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
        raise ConfigFileError(f"{place}: expected {words}, got {_named_type(value)}")
    if is_secret(fields[key]) and os.name == "posix" and file.stat().st_mode & 0o077:
        raise ConfigFileError(
            f"{place}: a secret in a file that other users of this machine can read; run chmod 600 {file}, or give "
            "it in an environment variable"
        )


def _hint(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_").lower(), names, 1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"


def _named_type(value: object) -> str:
    """What a value is, never the value: it could be a secret."""
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list"}
    return words.get(type(value), "a table" if isinstance(value, dict) else "a date or time")


def _parts(field: FieldInfo) -> set[object]:
    parts = {field.annotation, *get_args(field.annotation)}
    return parts | {get_args(part)[0] for part in parts if get_origin(part) is Annotated}


def toml_kind(field: FieldInfo) -> type:
    """What a field's value is in TOML: bool, int, float, str, or list of str."""
    if get_origin(field.annotation) is tuple:
        return list
    parts = _parts(field)
    return next((kind for kind in (bool, int, float) if kind in parts), str)


def is_secret(field: FieldInfo) -> bool:
    """Whether a field's value is never shown."""
    return SecretStr in _parts(field)


def variables_of(kind: type[BaseSettings], name: str) -> list[str]:
    """The environment variables that set a field, the one that wins first."""
    field = kind.model_fields[name]
    if field.validation_alias is not None:
        choices = getattr(field.validation_alias, "choices", [field.validation_alias])
        return [str(choice) for choice in choices if str(choice).startswith("FEDMOE_")]
    own = f"{kind.model_config['env_prefix']}{name.upper()}"
    return [own, "FEDMOE_COORDINATOR_URL"] if name == "coordinator_url" else [own]


def made(kind: type[ConfigT], values: Mapping[str, object], processes: Processes) -> ConfigT:
    """A configuration of `values`, else environment, else file, else defaults.

    Raises `ConfigFileError` where a value of the file is refused, else pydantic's ValidationError.
    """
    try:
        return kind(**values)  # type: ignore[arg-type]
    except ValidationError as error:
        source = FileSource(kind, processes)
        section = kind_name(kind, processes)
        named = {str(key) for key in source.toml_data} - set(values)
        named = {key for key in named if not any(variable in os.environ for variable in variables_of(kind, key))}
        lines = [
            f"{source.file}: [{section}] {problem['loc'][0]}: {problem['msg'].removeprefix('Value error, ')}"
            for problem in error.errors()
            if problem["loc"] and problem["loc"][0] in named
        ]
        if lines:
            raise ConfigFileError("\n".join(lines)) from None
        raise


def kind_name(kind: type[BaseSettings], processes: Processes) -> str:
    """The section of a process."""
    return next(name for name, process in processes.items() if process is kind)
