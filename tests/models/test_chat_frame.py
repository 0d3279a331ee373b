"""The chat template's frame: off conversations, and off nothing else."""

from __future__ import annotations

import pytest

from fedmoe.models.base import LoadedBase, load_base
from fedmoe.models.chat_frame import ChatFrame


def tokens(base: LoadedBase, text: str) -> list[int]:
    return list(base.tokenizer(text, add_special_tokens=False)["input_ids"])


def chat(base: LoadedBase, *turns: tuple[str, str]) -> list[int]:
    messages = [{"role": role, "content": content} for role, content in turns]
    return tokens(base, base.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def test_what_a_user_says_is_left(base: LoadedBase) -> None:
    for said in ("SELECT 1", "Why not?", "0", "a"):
        assert ChatFrame.of(base.tokenizer).removed(chat(base, ("user", said))) == tokens(base, said)


def test_of_a_longer_conversation_the_middle_is_left(base: LoadedBase) -> None:
    turns = (("user", "One."), ("assistant", "Two."), ("user", "Three."))
    left = base.tokenizer.decode(ChatFrame.of(base.tokenizer).removed(chat(base, *turns)))
    assert left.startswith("One.")
    assert left.endswith("Three.")


@pytest.mark.parametrize("text", ["def add(a, b):", "", "<"])
def test_a_text_is_left_as_it_is(base: LoadedBase, text: str) -> None:
    assert ChatFrame.of(base.tokenizer).removed(tokens(base, text)) == tokens(base, text)


def test_a_conversation_without_words_is_left_as_it_is(base: LoadedBase) -> None:
    frame = ChatFrame.of(base.tokenizer)
    empty = (*frame.before, *frame.after)
    assert frame.removed(empty) == empty


def test_without_a_template_nothing_is_taken(base: LoadedBase) -> None:
    spoken = chat(base, ("user", "Hello"))
    bare = load_base("tiny", "cpu", "fp32").tokenizer
    bare.chat_template = None
    assert ChatFrame.of(bare).removed(spoken) == spoken
