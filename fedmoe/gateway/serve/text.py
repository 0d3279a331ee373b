"""Encodes prompts to tokens, and decodes generated tokens to streamed text up to the first stop string."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedmoe.gateway.serve.problems import ApiError, too_long
from fedmoe.models.stop_tokens import strip_stop_tokens

#: No tokenizer makes fewer tokens of a text than one for so many characters, so longer ones are refused unread.
_MOST_CHARACTERS_A_TOKEN = 64


class PromptEncoder:
    """The tokenizer as the server uses it; a prompt above `most` tokens is refused, never cut.

    `stops` end answers and are no part of their text.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, vocabulary: int, most: int, stops: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer, self._vocabulary, self._most, self._stops = tokenizer, vocabulary, most, stops

    def of_chat(self, messages: Sequence[Mapping[str, str]]) -> tuple[int, ...]:
        """The prompt of a conversation by the base model's own chat template."""
        if not getattr(self._tokenizer, "chat_template", None):
            raise ApiError(
                "no_chat_template", "the base model has no chat template; use /v1/completions", param="messages"
            )
        self._check_characters(sum(len(message["content"]) for message in messages), "messages")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise ApiError(
                "invalid_messages", f"the base model's chat template refuses these messages: {error}", "messages"
            ) from error
        return self._checked(self._tokenizer(text, add_special_tokens=False)["input_ids"], "messages")

    def of_text(self, text: str) -> tuple[int, ...]:
        """The prompt that a text is, with the special tokens the tokenizer puts around it."""
        self._check_characters(len(text), "prompt")
        return self._checked(self._tokenizer(text)["input_ids"], "prompt")

    def of_tokens(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """A prompt that came as token ids."""
        wrong = next((token for token in tokens if not 0 <= token < self._vocabulary), None)
        if wrong is not None:
            raise ApiError("invalid_token", f"token ids are from 0 to {self._vocabulary - 1}, got {wrong}", "prompt")
        return self._checked(tokens, "prompt")

    def text(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special tokens and those that end an answer."""
        tokens = strip_stop_tokens(tokens, self._stops)
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def shown(self, token: int) -> str:
        """One token by itself, special or not."""
        return str(self._tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def _check_characters(self, count: int, param: str) -> None:
        if count > self._most * _MOST_CHARACTERS_A_TOKEN:
            raise too_long(f"{count} characters", self._most, param)

    def _checked(self, tokens: Sequence[int], param: str) -> tuple[int, ...]:
        if not tokens:
            raise ApiError("empty_prompt", "the prompt has no tokens; there is nothing to continue", param)
        if len(tokens) > self._most:
            raise too_long(f"{len(tokens)} tokens", self._most, param)
        return tuple(tokens)


@dataclass
class TextStream:
    """Decodes tokens as they come; the pieces joined are the text of all tokens.

    A token can end in the middle of a letter, and some tokenizers write a word after a word otherwise than alone. So a
    few tokens are decoded again with what follows, and nothing is given out before its last letter is whole.
    """

    prompter: PromptEncoder
    _tokens: list[int] = field(default_factory=list)
    _again: int = 0
    _delivered: int = 0

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self._tokens.append(token)
        piece = self.end()
        if not piece or piece.endswith("\ufffd"):
            return ""
        self._again, self._delivered = self._delivered, len(self._tokens)
        return piece

    def end(self) -> str:
        """What is left."""
        shown = self.prompter.text(self._tokens[self._again : self._delivered])
        return self.prompter.text(self._tokens[self._again :])[len(shown) :]


@dataclass
class StopStringFilter:
    """Finds the first stop string in streamed text; holds back what may be the beginning of one."""

    stops: tuple[str, ...]
    _held: str = ""

    def feed(self, piece: str) -> tuple[str, bool]:
        """What may be shown, and whether a stop string was found; after that nothing more is shown."""
        text = self._held + piece
        # The one that is complete first: which one that is does not depend on the pieces.
        matches = [(start + len(stop), start) for stop in self.stops if (start := text.find(stop)) >= 0]
        if matches:
            self._held = ""
            return text[: min(matches)[1]], True
        beginnings = (stop[:size] for stop in self.stops for size in range(1, min(len(stop), len(text) + 1)))
        held = max((len(beginning) for beginning in beginnings if text.endswith(beginning)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], False

    def end(self) -> str:
        """What was held back and begins no stop string after all."""
        held, self._held = self._held, ""
        return held
