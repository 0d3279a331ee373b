"""The chat codec: messages to prompt tokens, and answer tokens to text, by the base model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from fedmoe.arena.tasks.task import PromptMessage, TaskError
from fedmoe.models.stop_tokens import end_marks, strip_stop_tokens


class Codec(Protocol):
    """Translates between the texts of a task and the tokens of an engine."""

    def prompt(self, messages: Sequence[PromptMessage]) -> tuple[int, ...]:
        """The token ids after which an answer is sampled."""

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""


class ChatCodec(Codec):
    """The tokenizer's chat template; a prompt above `max_prompt_tokens` is an error, never cut in silence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int = 1024) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise TaskError("the base model's tokenizer has no chat template; the arena needs an instruction model")
        self._tokenizer = tokenizer
        self._max = max_prompt_tokens
        self._stops = frozenset(end_marks(tokenizer))
        self._cached = lru_cache(maxsize=4096)(self._encoded)

    def prompt(self, messages: Sequence[PromptMessage]) -> tuple[int, ...]:
        return self._cached(tuple(messages))

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special tokens and the mark that ends it."""
        return str(self._tokenizer.decode(strip_stop_tokens(tokens, self._stops), skip_special_tokens=True))

    def forget(self) -> None:
        """Drop the cache of encoded prompts."""
        self._cached.cache_clear()

    def _encoded(self, messages: tuple[PromptMessage, ...]) -> tuple[int, ...]:
        chat = [{"role": message.role, "content": message.text} for message in messages]
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        tokens = tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(tokens) > self._max:
            raise TaskError(
                f"a prompt has {len(tokens)} tokens, the limit is {self._max}; raise max_prompt_tokens or take a task "
                f"with shorter observations. It begins: {messages[-1].text[:80]!r}"
            )
        return tokens
