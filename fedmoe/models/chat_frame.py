"""The tokens that a chat template puts around every conversation, and prompts without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from fedmoe.models.prefix_tree import shared_length

# Two things to say that have nothing in common: what renders alike around both is the template's.
_CONTENTS = ("0", "Why")
# A text may begin with the template's first token by chance, or because the tokenizer puts it there.
_NO_CHANCE = 2


@dataclass(frozen=True)
class ChatFrame:
    """The tokens that a chat template puts before (with its own system prompt) and after what a user says."""

    before: tuple[int, ...]
    after: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> ChatFrame:
        """The frame of the tokenizer's template; empty where there is none."""
        if not getattr(tokenizer, "chat_template", None):
            return cls((), ())

        def render(content: str) -> tuple[int, ...]:
            turns = [{"role": "user", "content": content}]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

        first, second = map(render, _CONTENTS)
        start = shared_length(first, second)
        end = shared_length(first[start:][::-1], second[start:][::-1])
        return cls(first[:start], first[len(first) - end :])

    def removed(self, prompt: Sequence[int]) -> Sequence[int]:
        """A rendered conversation without the frame; any other prompt, and an empty conversation, as it is.

        Routers compare what users say with texts that workers have: a frame that every prompt shares would drown short
        prompts, and no running text has it. Of a conversation with a system prompt of its own that prompt stays.
        """
        start = shared_length(prompt, self.before)
        if start < _NO_CHANCE:
            return prompt
        ends = bool(self.after) and tuple(prompt[-len(self.after) :]) == self.after
        stop = len(prompt) - len(self.after) * ends
        return prompt[start:stop] if start < stop else prompt
