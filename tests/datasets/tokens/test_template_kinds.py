"""Kinds of chat templates: how each wants thoughts and calls, and what becomes of a row that it would change."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from template_styles import Style, tokenizer_of
from transformers import PreTrainedTokenizerFast

from fedmoe.datasets.formats.samples import Chat, Message
from fedmoe.datasets.tokens.chat_answers import TemplateRefusalError
from fedmoe.datasets.tokens.render import render
from fedmoe.datasets.tokens.tokenized_sample import MASKED, RenderResult

_LAST_USER = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
_ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Renders thoughts of its own, from a key of their own; a thought in the content would come after an empty one.
OWN_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
    "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Its prompt closes the thought.
CLOSED = OWN_THOUGHTS.replace("assistant\n<think>\n{%", "assistant\n<think>\n\n</think>\n\n{%")
# Answered turns begin with a closed thought, the prompt with an open one.
HALF_OPEN = OWN_THOUGHTS.replace(
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n",
    "{{ '<think>\n' + m.reasoning_content + '</think>' if m.reasoning_content else '<think></think>' }}",
)
# Drops the thoughts of calls as soon as an answer without calls has followed.
FORGETTING = (
    _LAST_USER + "{% for m in messages %}<|im_start|>{{ m.role }}"
    "{% if m.reasoning_content and (messages[-1].role != 'assistant' or messages[-1].tool_calls or loop.last) %}"
    "<|thought|>{{ m.reasoning_content }}{% endif %}"
    "{% for c in m.tool_calls or [] %}<|call|>{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}"
    "<|say|>{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
# No generation prompt; the system prompt stands in the last turn, if it is the user's.
SYSTEM_LAST = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}<s>"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system }}\n\n{% endif %}"
    "{{ m.content }}[/INST]{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def calling(arguments: str, calls: str = "m.tool_calls or []") -> str:
    return (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in " + calls + " %}"
        "<|call|>{{ c.function.name }} " + arguments + "{% endfor %}<|im_end|>\n{% endfor %}" + _ASK
    )


AS_JSON = calling("{{ c.function.arguments | tojson }}")
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|call|>", "<|thought|>", "<|say|>", "<s>", "</s>")


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    return tokenizer_of(Style(template, SPECIAL, "<|im_end|>", "<|im_end|>"))


def call(name: str = "weather", **arguments: object) -> Mapping[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def thinks(thought: str, said: str, *calls: Mapping[str, object]) -> Message:
    extras: dict[str, object] = {"tool_calls": list(calls)} if calls else {}
    return Message("assistant", said, extras={**extras, "reasoning_content": thought} if thought else extras)


def rendered(template: str, *turns: Message, tools: tuple[Mapping[str, object], ...] = ()) -> tuple[str, RenderResult]:
    """The learned text, the pieces of each sample after a stroke, and the rendering."""
    known = tokenizer(template)
    found = render(Chat(1, turns, tools), known)
    return "|".join(str(known.decode(s.labels[s.labels != MASKED].tolist())) for s in found.samples), found


def asked(template: str, *turns: Message) -> str:
    dicts = [{"role": turn.role, "content": turn.content, **turn.extras} for turn in turns]
    return str(tokenizer(template).apply_chat_template(dicts, tokenize=False, add_generation_prompt=True))


WHY = Message("user", "Why?")


@pytest.mark.parametrize("said", [thinks("R", "So."), Message("assistant", "<think>\nR\n</think>\n\nSo.")])
def test_a_thought_is_learned_once_wherever_it_stands(said: Message) -> None:
    text, found = rendered(OWN_THOUGHTS, WHY, said)
    assert text == "R\n</think>\n\nSo.<|im_end|>"
    assert found.notes == ()


def test_a_thought_stays_in_the_content_where_the_template_knows_no_other_place() -> None:
    text, found = rendered(AS_JSON, WHY, Message("assistant", "<think>\nR\n</think>\n\nSo."))
    assert text == "<think>\nR\n</think>\n\nSo.<|im_end|>"
    assert found.notes == ()


def test_a_prompt_that_closes_the_thought_leaves_it_out_and_that_is_said() -> None:
    text, found = rendered(CLOSED, WHY, thinks("R", "So."))
    assert text == "So.<|im_end|>"
    assert found.notes == ("the chat template leaves out the reasoning of an answer",)


def test_a_thought_that_the_prompt_opens_and_the_turn_closes_is_said_without_the_row() -> None:
    long = Message("user", "A question of its own " * 9)
    _, found = rendered(HALF_OPEN, long, Message("assistant", "So."))
    assert found.notes == ("the chat template begins answered turns otherwise than the prompt for an answer",)


def test_an_answer_after_calls_continues_the_prompt_with_their_thoughts() -> None:
    turns = (WHY, thinks("R1", "", call(city="Bern")), Message("tool", "12"))
    text, found = rendered(FORGETTING, *turns, thinks("R2", "So."))
    second = "<|thought|>R2<|say|>So.<|im_end|>"
    assert text == '<|thought|>R1<|call|>weather{"city": "Bern"}<|say|><|im_end|>|' + second
    whole = str(tokenizer(FORGETTING).decode(found.samples[1].input_ids.tolist()))
    assert whole == asked(FORGETTING, *turns) + second
    assert found.notes == ()


def test_a_system_prompt_that_only_the_prompt_has_is_before_every_answer() -> None:
    turns = (Message("system", "S!"), WHY, Message("assistant", "So."), Message("user", "Sure?"))
    text, found = rendered(SYSTEM_LAST, *turns, Message("assistant", "Yes."))
    assert text == " So.</s>| Yes.</s>"
    texts = [str(tokenizer(SYSTEM_LAST).decode(sample.input_ids.tolist())) for sample in found.samples]
    assert texts == [asked(SYSTEM_LAST, *turns[:2]) + " So.</s>", asked(SYSTEM_LAST, *turns) + " Yes.</s>"]
    assert found.notes == ()


@pytest.mark.parametrize(
    "arguments",
    ["{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}", "{{ '' + c.function.arguments }}"],
    ids=["object", "text or Python", "text"],
)
def test_arguments_are_learned_as_json_whichever_way_the_template_wants_them(arguments: str) -> None:
    text, _ = rendered(calling(arguments), WHY, thinks("", "", call(city='Zürich "W"', days=[1, 2])))
    assert text == '<|call|>weather {"city": "Zürich \\"W\\"", "days": [1, 2]}<|im_end|>'


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (calling("{{ c.function.arguments | tojson }}", "(m.tool_calls or [])[:1]"), "does not render tool_calls"),
        (calling(""), "does not render the argument 'Bern'"),
        (calling("{{ c.function.arguments | string | tojson }}"), "as Python, not JSON"),
    ],
    ids=["second call", "arguments", "quoted"],
)
def test_calls_that_would_be_learned_in_part_or_wrong_are_refused(template: str, reason: str) -> None:
    with pytest.raises(TemplateRefusalError, match=reason):
        rendered(template, WHY, thinks("", "", call(city="Bern"), call(city="Basel")))


def test_tools_that_only_a_call_names_are_said_to_be_missing() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    _, found = rendered(AS_JSON, WHY, thinks("", "", call(city="Bern")), tools=(tool,))
    assert found.notes == ("the chat template does not render tools",)


def test_an_indentation_that_the_template_cuts_is_said() -> None:
    trimming = AS_JSON.replace("m.content }}", "m.content | trim }}")
    text, found = rendered(trimming, WHY, Message("assistant", "    return x\n"))
    assert text == "return x<|im_end|>"
    assert found.notes == ("the chat template cuts the white space before an answer",)
    assert rendered(trimming, WHY, Message("assistant", "return x\n"))[1].notes == ()


def test_an_answer_after_an_answer_is_learned_once() -> None:
    merging = (
        "{% for m in messages %}{% set again = loop.index0 > 0 and messages[loop.index0 - 1].role == m.role %}"
        "{% if not again %}<|im_start|>{{ m.role }}\n{% endif %}{{ m.content }}"
        "{% if loop.last or messages[loop.index0 + 1].role != m.role %}<|im_end|>\n{% endif %}{% endfor %}" + _ASK
    )
    text, found = rendered(merging, WHY, Message("assistant", "One. "), Message("assistant", "Two."))
    assert text == "One. <|im_end|>|Two.<|im_end|>"
    assert len(found.notes) == 1
