"""The model `auto`: whose prompts the experts' workers said are like this one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedmoe.gateway.prompt_statistics import PromptStatistics
from fedmoe.gateway.route import SequenceRouter
from fedmoe.lora.adapter import ShapeError
from fedmoe.lora.codec import CodecError
from fedmoe.models.base import LoadedBase
from fedmoe.models.prompt_features import prompt_features

_SUFFIX = ".safetensors"


class RouterFilesError(ValueError):
    """Prompt statistics that cannot be read or do not fit; the message names the file and what to do."""


class PromptRouter:
    """A `Router` by the base model's features of the prompt; any thread may ask while the model generates."""

    def __init__(self, base: LoadedBase, router: SequenceRouter) -> None:
        width = int(base.model.config.get_text_config().hidden_size)
        if router.width != width:
            raise RouterFilesError(
                f"the prompt statistics have {router.width} numbers, this base model's features {width}; "
                "make them with the federation's base model"
            )
        self._base = base
        self._router = router

    def route(self, prompt: Sequence[int]) -> str | None:
        """The name of an expert, or None for the gateway where no expert is likely enough."""
        return self._router.route(prompt_features(self._base, [prompt])).names[0]


def read_router(base: LoadedBase, folder: Path) -> PromptRouter:
    """The router of the statistics in `folder`, one file `EXPERT.safetensors` each; raises RouterFilesError."""
    files = sorted(folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []
    if not files:
        raise RouterFilesError(f"{folder} has no file EXPERT{_SUFFIX}; put every expert's prompt statistics there")
    found: dict[str, PromptStatistics] = {}
    for file in files:
        try:
            found[file.name.removesuffix(_SUFFIX)] = PromptStatistics.from_bytes(file.read_bytes())
        except (CodecError, ValueError) as error:
            raise RouterFilesError(f"{file} holds no prompt statistics: {error}") from error
    try:
        return PromptRouter(base, SequenceRouter.fit(found))
    except (ShapeError, ValueError) as error:
        raise RouterFilesError(f"no router can be made of {folder}: {error}") from error
