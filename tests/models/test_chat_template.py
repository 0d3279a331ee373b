"""A chat template given by option, and arguments that every conversation gets, bind all who render."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from base_folders import CHATML

from fedmoe.models.base import BaseModelError, ChatTemplate, LoadedBase, load_base
from fedmoe.models.chat_frame import ChatFrame

ASKING = (
    "\n  {%- if style is defined %}{{ style | tojson }}{% else %}unset{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if thinking is defined and thinking is false %}"
    "<think></think>{% endif %}{% endif %}"
)
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.fixture
def asking(tmp_path: Path) -> Path:
    file = tmp_path / "asking.jinja"
    file.write_text(ASKING)
    return file


def load(chat: ChatTemplate) -> LoadedBase:
    return load_base("tiny", "cpu", "fp32", chat)


def rendered(base: LoadedBase, ask: bool = False) -> str:
    return str(base.tokenizer.apply_chat_template(TURNS[:1], tokenize=False, add_generation_prompt=ask))


def test_a_given_template_is_the_one_of_the_tokenizer(asking: Path) -> None:
    base = load(ChatTemplate.from_options(asking, None))
    assert base.tokenizer.chat_template == ASKING
    assert rendered(base).startswith("unset<|im_start|>user\nhi")


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, -3, 2.5, 1e-9, 10**20, "", "a 'quoted' \"word\"", "line\nand {% end %} {{ x }} #}"),
        *("back\\slash \\n", "Zoë 日本 😀 \u2028", [], [1, "two", None, [False]], {}, {"a": {"b": [1.5, "ä"]}}),
    ],
)
def test_a_value_reaches_the_template_as_it_was_given(asking: Path, value: object) -> None:
    base = load(ChatTemplate.from_options(asking, json.dumps({"style": value})))
    expected = base.tokenizer.apply_chat_template(TURNS, tokenize=False, chat_template=ASKING, style=value)
    assert base.tokenizer.apply_chat_template(TURNS, tokenize=False) == expected
    assert json.loads(expected[: expected.index("<|im_start|>")]) == value


def test_arguments_go_without_a_word_from_whoever_renders(asking: Path) -> None:
    base = load(ChatTemplate.from_options(asking, '{"thinking": false, "style": 1}'))
    assert rendered(base, ask=True).endswith("<|im_start|>assistant\n<think></think>")
    frame = ChatFrame.of(base.tokenizer)
    assert base.tokenizer.decode(frame.after).endswith("<think></think>")


def test_answers_stay_marked(asking: Path) -> None:
    base = load(ChatTemplate.from_options(asking, '{"style": 1}'))
    marked = base.tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    answer = [t for t, m in zip(marked["input_ids"], marked["assistant_masks"], strict=True) if m]
    assert base.tokenizer.decode(answer) == "yo<|im_end|>"


def test_arguments_go_to_the_models_own_template_too(tmp_path: Path) -> None:
    base = load_base("tiny", "cpu", "fp32")
    base.tokenizer.chat_template = {"default": ASKING, "tool_use": CHATML}
    ChatTemplate(None, {"style": 1}).apply(base.tokenizer, "here")
    assert rendered(base).startswith("1<|im_start|>")


@pytest.mark.parametrize("first", ["", "\n", "  {% set x = 1 %}\n", "{#- note -#}\n  "])
def test_what_a_template_begins_with_is_rendered_as_before(tmp_path: Path, first: str) -> None:
    file = tmp_path / "own.jinja"
    file.write_text(first + "{{ style }}" + CHATML)
    base = load(ChatTemplate.from_options(file, '{"style": "S"}'))
    expected = base.tokenizer.apply_chat_template(
        TURNS, tokenize=False, chat_template=first + "{{ style }}" + CHATML, style="S"
    )
    assert base.tokenizer.apply_chat_template(TURNS, tokenize=False) == expected


def test_an_argument_that_the_template_never_asks_for_is_refused_with_those_it_does(asking: Path) -> None:
    with pytest.raises(BaseModelError, match=r"never asks for the argument enable_thinking; it asks for: style, think"):
        load(ChatTemplate.from_options(asking, '{"enable_thinking": false}'))
    with pytest.raises(BaseModelError, match="it asks for: none"):
        load(ChatTemplate.from_options(None, '{"enable_thinking": false}'))


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "a-b", "", "x = 1 %}"])
def test_what_conversations_decide_cannot_be_fixed(name: str) -> None:
    with pytest.raises(BaseModelError, match="cannot set"):
        ChatTemplate.from_options(None, json.dumps({name: 1}))


@pytest.mark.parametrize("text", ["{", "[]", "3", "enable_thinking=false", '{"x": NaN}', ""])
def test_arguments_that_are_no_object_are_refused(text: str) -> None:
    with pytest.raises(BaseModelError, match="--chat-template-kwargs"):
        ChatTemplate.from_options(None, text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{% for m in messages %}", "no Jinja template"),
        (b"{{ messages | nothing }}", "no Jinja template"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"", "never asks for `messages`"),
        (b"Dear reader, this is a text.", "never asks for `messages`"),
        (json.dumps({"chat_template": CHATML}).encode(), "is JSON"),
    ],
)
def test_a_file_that_is_no_template_is_refused_by_name(tmp_path: Path, content: bytes, said: str) -> None:
    file = tmp_path / "given.jinja"
    file.write_bytes(content)
    with pytest.raises(BaseModelError, match=said) as caught:
        ChatTemplate.from_options(file, None)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.jinja", tmp_path):
        with pytest.raises(BaseModelError, match=f"{path.name} cannot be read"):
            ChatTemplate.from_options(path, None)


def test_the_report_says_which_template_is_used(asking: Path) -> None:
    own, given = load(ChatTemplate()), load(ChatTemplate.from_options(asking, None))
    assert own.report["chat_template_hash"] != given.report["chat_template_hash"].split()[0]
    assert "not the model's own" in given.report["chat_template_hash"]
    assert given.identity == own.identity
