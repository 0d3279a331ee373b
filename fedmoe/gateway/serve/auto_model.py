"""The model `auto`: likely experts of a prompt, by workers' prompt statistics; `gateway.routers` chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import structlog

from fedmoe.gateway.routers import ExpertCandidates, SequenceRouter, candidates
from fedmoe.lora.prompt_statistics import PromptStatistics
from fedmoe.lora.safetensors_bytes import CodecError
from fedmoe.models.base import LoadedBase
from fedmoe.models.chat_frame import ChatFrame
from fedmoe.models.prompt_features import features_width, prompt_features
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorUnavailableError

_log = structlog.get_logger("fedmoe.serve")


class PromptRouter:
    """Routes by the base model's features of the prompt and the prompt statistics that a coordinator has.

    Any thread may ask while the model generates and while `follow` makes another router: a prompt is routed by one
    router from beginning to end.
    """

    def __init__(self, base: LoadedBase, router: SequenceRouter | None = None) -> None:
        self._base, self._width = base, features_width(base)
        self._frame = ChatFrame.of(base.tokenizer)
        self._router = router
        #: Expert -> tag of its statistics, and these.
        self._statistics: dict[str, tuple[str, PromptStatistics]] = {}

    @property
    def experts(self) -> tuple[str, ...]:
        """The experts it chooses between, none while fewer than two have statistics: there is no model `auto` then."""
        return self._router.names if self._router is not None else ()

    def candidates(self, prompts: Sequence[Sequence[int]]) -> list[ExpertCandidates] | None:
        """The likely experts of each prompt, looked at without the chat template's frame; None while there are not two.

        May take as long as a pass over the prompts, which are in one batch.
        """
        router = self._router
        if router is None:
            return None
        texts = [self._frame.removed(prompt) for prompt in prompts]
        probabilities = router.probabilities(prompt_features(self._base, texts))
        return [candidates(text, router.names, row) for text, row in zip(texts, probabilities, strict=True)]

    def follow(self, listed: Mapping[str, str], fetch: Callable[[str], bytes]) -> Mapping[str, str]:
        """Route from now on by the statistics named in `listed`, expert -> tag; returns who is left out, and why.

        `fetch` gets an expert's, and is called for new ones only. An expert whose new statistics cannot be had keeps
        its old ones.
        """
        statistics = {name: entry for name, entry in self._statistics.items() if name in listed}
        failed: dict[str, str] = {}
        for name, tag in listed.items():
            if name not in statistics or statistics[name][0] != tag:
                try:
                    statistics[name] = tag, self._read(fetch(name))
                except (CodecError, CoordinatorUnavailableError, RefusedError, ValueError) as error:
                    failed[name] = str(error)
                    _log.warning("prompt_statistics_not_taken", expert=name, reason=str(error))
        if statistics == self._statistics:
            return failed
        try:
            parts = {name: part for name, (_, part) in statistics.items()}
            self._router = SequenceRouter.fit(parts) if len(parts) > 1 else None
        except ValueError as error:
            return dict.fromkeys(statistics, str(error)) | failed
        self._statistics = statistics
        _log.info("routing", experts=list(self.experts))
        return failed

    def _read(self, body: bytes) -> PromptStatistics:
        statistics = PromptStatistics.from_bytes(body)
        if statistics.width != self._width:
            raise ValueError(
                f"the prompt statistics have {statistics.width} numbers, this base model's features {self._width}; "
                "make them with the federation's base model"
            )
        return statistics
