"""Settings that can be changed during a run: a small JSON file in its folder, read again when it changes."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import structlog

CONTROL = "control.json"
_MOST_BYTES = 1 << 16
_log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Control:
    """What is asked for; None leaves a value as it is. `memory_limit_gb` counts 2^30 bytes."""

    memory_limit_gb: float | None = None
    max_batch: int | None = None


class ControlError(ValueError):
    """A control file that cannot be followed; says which key and what would do."""


def parse_control(text: str) -> Control:
    """The content of a control file; raises ControlError and takes nothing of it unless all of it is right."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ControlError(f"not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ControlError(f"a JSON object is needed, got {type(values).__name__}")
    unknown = sorted(values.keys() - {"memory_limit_gb", "max_batch"})
    if unknown:
        raise ControlError(f"unknown keys {unknown}; known are memory_limit_gb and max_batch")
    limit, batch = values.get("memory_limit_gb"), values.get("max_batch")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < 1 << 20):
        raise ControlError(f"memory_limit_gb must be a positive number of GiB, got {limit!r}")
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or not 1 <= batch < 1 << 31):
        raise ControlError(f"max_batch must be a positive whole number, got {batch!r}")
    return Control(None if limit is None else float(limit), batch)


class ControlFile:
    """The control file of a run; one that is wrong is logged once and changes nothing, for a run must not die of it."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / CONTROL
        self._seen: tuple[int, int, int] | None = None

    def changed(self) -> Control | None:
        """What the file asks for, if it is new or was written since the last call; otherwise None."""
        try:
            status = self.path.stat()
            mark = (status.st_mtime_ns, status.st_size, status.st_ino)
            if mark == self._seen:
                return None
            self._seen = mark
            with self.path.open("rb") as file:
                control = parse_control(file.read(_MOST_BYTES).decode())
        except FileNotFoundError:
            self._seen = None
            return None
        except (OSError, ValueError) as error:
            _log.warning("control_file_ignored", file=os.fspath(self.path), reason=str(error))
            return None
        _log.info("control_file_read", memory_limit_gb=control.memory_limit_gb, max_batch=control.max_batch)
        return control
