"""Response bodies of the OpenAI interface, each with the field `fedmoe`: which version made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from fedmoe.gateway.serve.service import Chunk, Origin, Usage
from fedmoe.gateway.serve.text import PromptEncoder
from fedmoe.inference.backend import DecodingStep

JsonObject = dict[str, object]
EndpointKind = Literal["chat", "text"]
_OBJECTS = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("text", False): "text_completion",
    ("text", True): "text_completion",
}
_ID_PREFIX = {"chat": "chatcmpl-", "text": "cmpl-"}


@dataclass(frozen=True, slots=True)
class ResponseBuilder:
    """What all parts of one answer have in common; `number` makes its id, `created` is in seconds since 1970.

    `alternatives` as in `Sampling`.
    """

    kind: EndpointKind
    number: str
    created: int
    origin: Origin
    prompter: PromptEncoder
    alternatives: int | None

    def whole(self, choices: Sequence[Chunk], usage: Usage) -> JsonObject:
        """The answer in one piece."""
        bodies = [self._choice(index, chunk, whole=True) for index, chunk in enumerate(choices)]
        return {**self._head(False), "choices": bodies, "usage": usage.body(), "fedmoe": asdict(self.origin)}

    def opening(self, choices: int) -> list[JsonObject]:
        """The first parts of a stream: who answers, before there is a word."""
        made_by = {"fedmoe": asdict(self.origin)}
        if self.kind == "text":
            return [{**self.part(0, Chunk("", (), None)), **made_by}]
        head, opened = self._head(True), {"role": "assistant", "content": ""}
        parts = [{"index": index, "delta": opened, "finish_reason": None, "logprobs": None} for index in range(choices)]
        return [{**head, "choices": [part], **made_by} for part in parts]

    def part(self, index: int, chunk: Chunk) -> JsonObject:
        """A later part of a stream."""
        return {**self._head(True), "choices": [self._choice(index, chunk, whole=False)]}

    def closing(self, usage: Usage) -> JsonObject:
        """The last part of a stream where the counts were asked for."""
        return {**self._head(True), "choices": [], "usage": usage.body(), "fedmoe": asdict(self.origin)}

    def _head(self, streamed: bool) -> JsonObject:
        return {
            "id": _ID_PREFIX[self.kind] + self.number,
            "object": _OBJECTS[self.kind, streamed],
            "created": self.created,
            "model": self.origin.model,
            # With the same seed and fingerprint the same tokens are drawn.
            "system_fingerprint": f"fp_{self.origin.digest[:16]}",
        }

    def _choice(self, index: int, chunk: Chunk, whole: bool) -> JsonObject:
        likelihoods = self._text_likelihoods if self.kind == "text" else self._chat_likelihoods
        ending: JsonObject = {"finish_reason": chunk.finish, "logprobs": likelihoods(chunk.steps)}
        if self.kind == "text":
            return {"index": index, "text": chunk.text, **ending}
        if whole:
            return {"index": index, "message": {"role": "assistant", "content": chunk.text, "refusal": None}, **ending}
        return {"index": index, "delta": {"content": chunk.text} if chunk.text else {}, **ending}

    def _chat_likelihoods(self, steps: Sequence[DecodingStep]) -> JsonObject | None:
        if self.alternatives is None:
            return None
        content = []
        for step in steps:
            assert step.token is not None
            assert step.likelihood is not None
            top = [self._token(token, logprob) for token, logprob in step.likelihood.top]
            content.append({**self._token(step.token, step.likelihood.chosen), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> JsonObject:
        shown = self.prompter.shown(token)
        # The bytes of a part of a letter are not known.
        return {"token": shown, "logprob": logprob, "bytes": None if "\ufffd" in shown else list(shown.encode())}

    def _text_likelihoods(self, steps: Sequence[DecodingStep]) -> JsonObject | None:
        if self.alternatives is None:
            return None
        shown = self.prompter.shown
        tokens = [(step.token, step.likelihood) for step in steps if step.token is not None and step.likelihood]
        return {
            "tokens": [shown(token) for token, _ in tokens],
            "token_logprobs": [likelihood.chosen for _, likelihood in tokens],
            "top_logprobs": [{shown(token): logprob for token, logprob in likelihood.top} for _, likelihood in tokens],
            "text_offset": None,
        }


def model_card(name: str, created: int, version: int, digest: str, base: str) -> JsonObject:
    """One entry of `/v1/models`."""
    facts = {"version": version, "digest": digest, "base": base}
    return {"id": name, "object": "model", "created": created, "owned_by": "fedmoe", "fedmoe": facts}
