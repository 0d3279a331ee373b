"""Answers as the OpenAI interface has them, each with the field `fedmoe`: which version made it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from fedmoe.gateway.serve.service import Chunk, Origin, Usage
from fedmoe.gateway.serve.text import PromptEncoder
from fedmoe.inference.backend import Step

Json = dict[str, object]
Kind = Literal["chat", "text"]
_OBJECTS = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("text", False): "text_completion",
    ("text", True): "text_completion",
}
_ID_PREFIX = {"chat": "chatcmpl-", "text": "cmpl-"}


@dataclass(frozen=True, slots=True)
class Form:
    """What all parts of one answer have in common; `number` makes its id, `created` is in seconds since 1970.

    `alternatives` as in `Sampling`.
    """

    kind: Kind
    number: str
    created: int
    origin: Origin
    prompter: PromptEncoder
    alternatives: int | None

    def whole(self, choices: Sequence[Chunk], usage: Usage) -> Json:
        """The answer in one piece."""
        bodies = [self._choice(index, piece, whole=True) for index, piece in enumerate(choices)]
        return {**self._head(False), "choices": bodies, "usage": usage.body(), "fedmoe": asdict(self.origin)}

    def opening(self, choices: int) -> list[Json]:
        """The first parts of a stream: who answers, before there is a word."""
        named = {"fedmoe": asdict(self.origin)}
        if self.kind == "text":
            return [{**self.part(0, Chunk("", (), None)), **named}]
        return [
            {**self._head(True), "choices": [self._delta(index, {"role": "assistant", "content": ""})], **named}
            for index in range(choices)
        ]

    def part(self, index: int, piece: Chunk) -> Json:
        """A later part of a stream."""
        return {**self._head(True), "choices": [self._choice(index, piece, whole=False)]}

    def closing(self, usage: Usage) -> Json:
        """The last part of a stream where the counts were asked for."""
        return {**self._head(True), "choices": [], "usage": usage.body(), "fedmoe": asdict(self.origin)}

    def _head(self, streamed: bool) -> Json:
        return {
            "id": _ID_PREFIX[self.kind] + self.number,
            "object": _OBJECTS[self.kind, streamed],
            "created": self.created,
            "model": self.origin.model,
            # With the same seed and fingerprint the same tokens are drawn.
            "system_fingerprint": f"fp_{self.origin.digest[:16]}",
        }

    def _choice(self, index: int, piece: Chunk, whole: bool) -> Json:
        if self.kind == "text":
            body: Json = {"index": index, "text": piece.text, "finish_reason": piece.finish}
            return {**body, "logprobs": self._text_likelihoods(piece.steps)}
        if not whole:
            return self._delta(index, {"content": piece.text} if piece.text else {}, piece)
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        ended: Json = {"index": index, "message": message, "finish_reason": piece.finish}
        return {**ended, "logprobs": self._chat_likelihoods(piece.steps)}

    def _delta(self, index: int, delta: Json, piece: Chunk | None = None) -> Json:
        finish = piece.finish if piece else None
        likelihoods = self._chat_likelihoods(piece.steps) if piece else None
        return {"index": index, "delta": delta, "finish_reason": finish, "logprobs": likelihoods}

    def _chat_likelihoods(self, steps: Sequence[Step]) -> Json | None:
        if self.alternatives is None:
            return None
        content = []
        for step in steps:
            assert step.token is not None
            assert step.likelihood is not None
            top = [self._token(token, logprob) for token, logprob in step.likelihood.top]
            content.append({**self._token(step.token, step.likelihood.chosen), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> Json:
        shown = self.prompter.shown(token)
        # The bytes of a part of a letter are not known to us.
        known = None if "\ufffd" in shown else list(shown.encode())
        return {"token": shown, "logprob": logprob, "bytes": known}

    def _text_likelihoods(self, steps: Sequence[Step]) -> Json | None:
        if self.alternatives is None:
            return None
        shown = self.prompter.shown
        given = [(step.token, step.likelihood) for step in steps if step.token is not None and step.likelihood]
        tops = [{shown(token): logprob for token, logprob in likelihood.top} for _, likelihood in given]
        return {
            "tokens": [shown(token) for token, _ in given],
            "token_logprobs": [likelihood.chosen for _, likelihood in given],
            "top_logprobs": tops,
            "text_offset": None,
        }


def model_card(name: str, created: int, version: int, digest: str, base: str) -> Json:
    """One entry of `/v1/models`."""
    facts = {"version": version, "digest": digest, "base": base}
    return {"id": name, "object": "model", "created": created, "owned_by": "fedmoe", "fedmoe": facts}
