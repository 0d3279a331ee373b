"""Messages to prompt tokens, and answer tokens to text, by the base model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from fedmoe.arena.tasks.task import PromptMessage, TaskError
from fedmoe.models.stopping import end_marks, strip_stop_tokens


class Codec(Protocol):
    """Text for the task, tokens for the engine."""

    def prompt(self, messages: Sequence[PromptMessage]) -> tuple[int, ...]:
        """The token ids after which an answer is sampled."""
        ...

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special tokens."""
        ...


class ChatCodec:
    """The tokenizer's chat template; a prompt above `max_prompt_tokens` is an error, never cut in silence."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int = 1024) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise TaskError("the base model's tokenizer has no chat template; the arena needs an instruction model")
        self._tokenizer = tokenizer
        self._max = max_prompt_tokens
        self._stops = frozenset(end_marks(tokenizer))
        self._known: dict[tuple[PromptMessage, ...], tuple[int, ...]] = {}

    def prompt(self, messages: Sequence[PromptMessage]) -> tuple[int, ...]:
        """The token ids after which an answer is sampled."""
        key = tuple(messages)
        found = self._known.get(key)
        if found is None:
            found = self._encoded(key)
            if len(self._known) > 4096:
                self.forget()
            self._known[key] = found
        return found

    def text(self, tokens: Sequence[int]) -> str:
        """The text of an answer, without special tokens and the mark that ends it."""
        return str(self._tokenizer.decode(strip_stop_tokens(tokens, self._stops), skip_special_tokens=True))

    def forget(self) -> None:
        """Drop the cache of encoded prompts."""
        self._known.clear()

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
