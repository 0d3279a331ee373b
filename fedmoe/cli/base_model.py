"""Base model loading for commands: the chat template is checked first, notes go to standard error."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedmoe.cli.output import importing

if TYPE_CHECKING:
    from fedmoe.models.base import ChatTemplate, LoadedBase


def given_template(file: str | None, kwargs: str | Mapping[str, object] | None) -> ChatTemplate:
    """What --chat-template and --chat-template-kwargs say; raises BaseModelError for what cannot be used."""
    with importing("worker"):
        from fedmoe.models.base import ChatTemplate
    return ChatTemplate.given(file, kwargs)


def loaded(base_model: str, device: str, chat: ChatTemplate, dtype: str = "auto") -> LoadedBase:
    """The base model; what users should know of it goes to standard error."""
    from fedmoe.models.base import load_base

    base = load_base(base_model, device, dtype, chat)
    for note in base.notes:
        print(f"note: {note}", file=sys.stderr)
    return base
