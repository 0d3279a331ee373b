"""FedMoE: LoRA experts trained where the data lives, without rounds, and one gateway made of all of them."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedmoe.runtime.errors import RefusedError as RefusedError
    from fedmoe.wire.answers import CoordinatorUnavailableError as CoordinatorUnavailableError
    from fedmoe.wire.python_client import AsyncClient as AsyncClient
    from fedmoe.wire.python_client import Client as Client
    from fedmoe.wire.transport import ConnectionSettingError as ConnectionSettingError

__version__ = "0.1.0"

#: Name -> the module that is loaded for it, once it is asked for.
_LAZY = {
    "AsyncClient": "fedmoe.wire.python_client",
    "Client": "fedmoe.wire.python_client",
    "ConnectionSettingError": "fedmoe.wire.transport",
    "CoordinatorUnavailableError": "fedmoe.wire.answers",
    "RefusedError": "fedmoe.runtime.errors",
}


if not TYPE_CHECKING:  # a type checker shall see the names above, and no others

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
