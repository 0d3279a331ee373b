"""The audit of learned tokens: exactly the assistant's tokens and end marks, for templates of six model families."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from template_styles import STYLES, Style, tokenizer_of
from transformers import PreTrainedTokenizerFast

from fedmoe.datasets.formats.samples import Chat, Message
from fedmoe.datasets.tokens.chat_answers import TemplateRefusalError
from fedmoe.datasets.tokens.render import render
from fedmoe.datasets.tokens.tokenization import tokenize_samples
from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample

TOKENIZERS = {name: tokenizer_of(style) for name, style in STYLES.items()}
CALL = {"id": "c00000001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}}
CALL_TEXT = '<tool_call>weather{"city": "Bern"}</tool_call>'
WITH_TOOLS = [name for name, style in STYLES.items() if style.tools]


def learned(samples: tuple[TokenizedSample, ...], tokenizer: PreTrainedTokenizerFast) -> str:
    for sample in samples:
        assert ((sample.labels == sample.input_ids) | (sample.labels == MASKED)).all()
    return "".join(str(tokenizer.decode(s.labels[s.labels != MASKED].tolist())) for s in samples)


def chat(*contents: str) -> Chat:
    return Chat(1, tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(contents)))


def last(style: Style, answer: str) -> str:
    return style.before_last + answer + style.end_of_turn


def earlier(style: Style, name: str, answer: str) -> str:
    # Where earlier turns are rewritten each answer is a sample of its own, in which it is the last.
    return last(style, answer) if name == "thinking" else style.before_each + answer + style.end_of_turn


@pytest.mark.parametrize("name", STYLES)
def test_one_turn(name: str) -> None:
    style = STYLES[name]
    found = render(chat("Why?", "So."), TOKENIZERS[name])
    assert learned(found.samples, TOKENIZERS[name]) == last(style, "So.")


@pytest.mark.parametrize("name", STYLES)
def test_several_turns(name: str) -> None:
    style = STYLES[name]
    found = render(chat("Why?", "So.", "Sure?", "Yes."), TOKENIZERS[name])
    assert learned(found.samples, TOKENIZERS[name]) == earlier(style, name, "So.") + last(style, "Yes.")


@pytest.mark.parametrize("name", STYLES)
def test_a_turn_marked_as_context_is_not_learned(name: str) -> None:
    style = STYLES[name]
    turns = list(chat("Why?", "Bad.", "Sure?", "Good.").messages)
    turns[1] = Message("assistant", "Bad.", learned=False)
    found = render(Chat(1, tuple(turns)), TOKENIZERS[name])
    assert learned(found.samples, TOKENIZERS[name]) == last(style, "Good.")


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tool_turns(name: str) -> None:
    style = STYLES[name]
    turns = (
        Message("user", "Weather?"),
        Message("assistant", "", extras={"tool_calls": [CALL]}),
        Message("tool", "12", extras={"tool_call_id": "c00000001"}),
        Message("assistant", "12 degrees."),
    )
    found = render(Chat(1, turns), TOKENIZERS[name])
    call = last(style, CALL_TEXT) if name == "thinking" else style.before_each + CALL_TEXT + style.end_of_turn
    assert learned(found.samples, TOKENIZERS[name]) == call + last(style, "12 degrees.")


def test_tool_turns_that_the_template_cannot_render_are_refused() -> None:
    turns = (Message("user", "Weather?"), Message("assistant", "", extras={"tool_calls": [CALL]}))
    with pytest.raises(TemplateRefusalError, match="does not render tool_calls"):
        render(Chat(1, turns), TOKENIZERS["chatml"])


def test_a_strict_template_refuses_its_row_alone() -> None:
    twice = Chat(1, (Message("system", "S"), *chat("Why?", "So.").messages))
    found = tokenize_samples([chat("Why?", "So."), twice], TOKENIZERS["brackets"], 99)
    assert [number for number, _ in found.refused] == [1]
    assert "no role system" in found.refused[0][1]


@pytest.mark.parametrize(
    "answer",
    [
        Message("assistant", "So.", extras={"reasoning_content": "Let me think."}),
        Message("assistant", "<think>\nLet me think.\n</think>\n\nSo."),
        Message("assistant", "Let me think.\n</think>\n\nSo."),
    ],
    ids=["key", "content", "content without its beginning"],
)
def test_a_thought_that_the_template_opens_is_learned_with_its_end(answer: Message) -> None:
    found = render(Chat(1, (Message("user", "Why?"), answer)), TOKENIZERS["reasoning"])
    (sample,) = found.samples
    tokenizer = TOKENIZERS["reasoning"]
    assert learned(found.samples, tokenizer) == "Let me think.\n</think>\n\nSo.<|end|>"
    # The whole is what the model sees when it is asked, and then what it is to say.
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    assert str(tokenizer.decode(sample.input_ids.tolist())).startswith(asked)
    assert found.notes == ()


def test_an_answer_without_a_thought_is_learned_as_the_template_renders_it_and_that_is_said() -> None:
    found = render(chat("Why?", "So."), TOKENIZERS["reasoning"])
    assert learned(found.samples, TOKENIZERS["reasoning"]) == "So.<|end|>"
    assert found.notes == ("the chat template opens an answer with '<think>\\n', which answered turns do not have",)


def test_reasoning_that_the_template_keeps_is_learned() -> None:
    answer = Message("assistant", "So.", extras={"reasoning_content": "Let me think."})
    found = render(Chat(1, (Message("user", "Why?"), answer)), TOKENIZERS["thinking"])
    assert learned(found.samples, TOKENIZERS["thinking"]) == "<think>\nLet me think.\n</think>\n\nSo.<|im_end|>"
    assert found.notes == ()


def test_tools_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    found = render(Chat(1, chat("Weather?", "12").messages, (tool,)), TOKENIZERS["tools"])
    assert '"weather"' in TOKENIZERS["tools"].decode(found.samples[0].input_ids.tolist())
    assert found.notes == ()


letters = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=10)
said = letters.map(str.strip).filter(lambda text: text != "" and "</think>" not in text)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(STYLES)), st.lists(st.tuples(said, said), min_size=1, max_size=3))
def test_whatever_is_said_exactly_the_answers_are_learned(name: str, pairs: list[tuple[str, str]]) -> None:
    style, tokenizer = STYLES[name], TOKENIZERS[name]
    found = render(chat(*(text for pair in pairs for text in pair)), tokenizer)
    answers = [answer for _, answer in pairs]
    wanted = [*(earlier(style, name, answer) for answer in answers[:-1]), last(style, answers[-1])]
    assert learned(found.samples, tokenizer) == "".join(wanted)


@pytest.mark.parametrize("name", STYLES)
def test_every_answer_ends_with_its_end_mark_and_no_answer_is_endless(name: str) -> None:
    found = tokenize_samples([chat("Why?", "So.", "Sure?", "Yes.")], TOKENIZERS[name], 999)
    end = TOKENIZERS[name].convert_tokens_to_ids(STYLES[name].end_of_turn)
    for sample in found.samples:
        last_learned = sample.labels[np.flatnonzero(sample.labels != MASKED)[-1]]
        assert last_learned == end
    assert found.counts["endless"] == 0
