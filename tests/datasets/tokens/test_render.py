"""Which tokens are learned: all of a text, a completion, an assistant's answers with their end mark, nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, make_tokenizer
from transformers import PreTrainedTokenizerFast

from fedmoe.datasets.formats.samples import Chat, Completion, Message, Sample, Text
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.chat_answers import TemplateRefusalError
from fedmoe.datasets.tokens.render import render
from fedmoe.datasets.tokens.tokenization import tokenize_samples
from fedmoe.datasets.tokens.tokenized_sample import MASKED, TokenizedSample, Tokenizer, previews


def render_sample(sample: Sample, tokenizer: Tokenizer) -> list[TokenizedSample]:
    """One sample in full length; a conversation can give several."""
    return list(render(sample, tokenizer).samples)


REASONING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
COUNTING = (
    "{{ messages[-1]['content'] | length }}{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}>>{% endif %}"
)
SHARED = make_tokenizer()
REFUSING = "{{ raise_exception('roles must alternate') }}"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return SHARED


def chat(*turns: tuple[str, str], line: int = 1) -> Chat:
    return Chat(line, tuple(Message(role, content) for role, content in turns))


def learned_text(sample: TokenizedSample, tokenizer: PreTrainedTokenizerFast) -> str:
    assert ((sample.labels == sample.input_ids) | (sample.labels == MASKED)).all()
    return str(tokenizer.decode(sample.labels[sample.labels != MASKED].tolist()))


def test_every_token_of_a_text_is_learned_and_its_end(tokenizer: PreTrainedTokenizerFast) -> None:
    (sample,) = render_sample(Text(1, "né"), tokenizer)
    assert tokenizer.decode(sample.input_ids.tolist()) == "né<|im_end|>"
    assert (sample.labels == sample.input_ids).all()


def test_only_the_completion_is_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    (sample,) = render_sample(Completion(1, "2+2=", "4"), tokenizer)
    assert tokenizer.decode(sample.input_ids.tolist()) == "2+2=4<|im_end|>"
    assert learned_text(sample, tokenizer) == "4<|im_end|>"


def test_a_start_token_comes_first_if_the_tokenizer_puts_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|bos|>"
    bos = tokenizer.convert_tokens_to_ids("<|bos|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A <|im_end|>", special_tokens=[("<|bos|>", bos), ("<|im_end|>", end)]
    )
    (sample,) = render_sample(Completion(1, "a", "b"), tokenizer)
    assert tokenizer.decode(sample.input_ids.tolist()) == "<|bos|>ab<|im_end|>"
    assert learned_text(sample, tokenizer) == "b<|im_end|>"


def test_answers_and_their_end_marks_are_learned_and_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (("system", "S"), ("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2"))
    (sample,) = render_sample(chat(*turns), tokenizer)
    dicts = [{"role": role, "content": content} for role, content in turns]
    assert sample.input_ids.tolist() == tokenizer.apply_chat_template(dicts, tokenize=True)["input_ids"]
    assert learned_text(sample, tokenizer) == "A1<|im_end|>A2<|im_end|>"


def test_a_system_prompt_that_the_template_adds_is_not_learned(tokenizer: PreTrainedTokenizerFast) -> None:
    (sample,) = render_sample(chat(("user", "U"), ("assistant", "A")), tokenizer)
    assert "Be kind." in tokenizer.decode(sample.input_ids.tolist())
    assert learned_text(sample, tokenizer) == "A<|im_end|>"


def test_a_greeting_before_the_first_question_is_context(tokenizer: PreTrainedTokenizerFast) -> None:
    (sample,) = render_sample(chat(("assistant", "Hello"), ("user", "U"), ("assistant", "A")), tokenizer)
    assert learned_text(sample, tokenizer) == "A<|im_end|>"


def test_an_answer_that_also_stands_in_the_question_is_learned_once(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = "say yes<|im_end|>\n<|im_start|>assistant\nyes"
    (sample,) = render_sample(chat(("user", asked), ("assistant", "yes")), tokenizer)
    assert learned_text(sample, tokenizer) == "yes<|im_end|>"
    assert (sample.labels[:-6] == MASKED).all()


content = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: text.strip())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(content, content), min_size=1, max_size=4))
def test_the_learned_text_is_exactly_the_answers(pairs: list[tuple[str, str]]) -> None:
    turns = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    (sample,) = render_sample(chat(*turns), SHARED)
    assert learned_text(sample, SHARED) == "".join(f"{answer}<|im_end|>" for _, answer in pairs)


def test_a_template_that_rewrites_earlier_turns_gives_one_sample_for_each_answer() -> None:
    tokenizer = make_tokenizer(REASONING)
    turns = (("user", "U1"), ("assistant", "A1"), ("user", "U2"), ("assistant", "A2"))
    first, second = render_sample(chat(*turns), tokenizer)
    assert learned_text(first, tokenizer) == "<think></think>A1<|im_end|>"
    assert learned_text(second, tokenizer) == "<think></think>A2<|im_end|>"
    assert "U2" not in tokenizer.decode(first.input_ids.tolist())


def test_conversations_without_a_template_are_an_error() -> None:
    with pytest.raises(DataError, match=r"no chat template[^$]*--chat-template FILE"):
        tokenize_samples([chat(("user", "U"), ("assistant", "A"), line=7)], make_tokenizer(None), 64)


@pytest.mark.parametrize(
    ("template", "message"),
    [(COUNTING, "the answer in turn 2 cannot be found"), (REFUSING, "the chat template refuses .*must alternate")],
)
def test_a_row_that_the_template_refuses_is_named_and_the_others_are_learned(template: str, message: str) -> None:
    refused = chat(("user", "U"), ("assistant", "A"))
    with pytest.raises(TemplateRefusalError, match=message):
        render_sample(refused, make_tokenizer(template))
    found = tokenize_samples([Text(1, "a"), refused, Text(3, "b")], make_tokenizer(template), 64)
    assert [number for number, _ in found.refused] == [1]
    assert found.row_of == [0, 2]


def test_a_tokenizer_without_end_token_is_an_error() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-text"):
        render_sample(Text(1, "a"), tokenizer)


def test_what_a_row_already_holds_is_not_added_again(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in ("a<|im_end|>", "a<|im_end|>\n"):
        (sample,) = render_sample(Text(1, text), tokenizer)
        assert tokenizer.decode(sample.input_ids.tolist()) == text
        (sample,) = render_sample(Completion(1, "p", text), tokenizer)
        assert learned_text(sample, tokenizer) == text
    (sample,) = render_sample(Text(1, "a<|im_end|>b"), tokenizer)
    assert tokenizer.decode(sample.input_ids.tolist()) == "a<|im_end|>b<|im_end|>"


def test_a_start_token_of_the_row_is_not_doubled() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|bos|>"
    bos = tokenizer.convert_tokens_to_ids("<|bos|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    for sample in (Text(1, "<|bos|>a"), Text(1, "a"), Completion(1, "<|bos|>", "a"), Completion(1, "", "<|bos|>a")):
        (found,) = render_sample(sample, tokenizer)
        assert tokenizer.decode(found.input_ids.tolist()) == "<|bos|>a<|im_end|>"


def test_calls_that_the_template_does_not_render_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": {}}}
    called = Chat(1, (Message("user", "U"), Message("assistant", "", extras={"tool_calls": [call]})))
    with pytest.raises(TemplateRefusalError, match=r"does not render tool_calls .*'weather'"):
        render_sample(called, tokenizer)
    # The name in the question is not the call.
    named = Chat(1, (Message("user", "weather?"), Message("assistant", "", extras={"tool_calls": [call]})))
    with pytest.raises(TemplateRefusalError):
        render_sample(named, tokenizer)


def test_what_a_template_leaves_out_is_said(tokenizer: PreTrainedTokenizerFast) -> None:
    tool = {"type": "function", "function": {"name": "weather"}}
    thought = Message("assistant", "A", extras={"reasoning_content": "because"})
    notes = render(Chat(1, (Message("user", "U"), thought), (tool,)), tokenizer).notes
    assert notes == (
        "the chat template does not render tools",
        "the chat template leaves out the reasoning of an answer",
    )
    deaf = make_tokenizer("{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}<|im_end|>{% endfor %}")
    assert render(chat(("system", "S"), ("user", "U"), ("assistant", "A")), deaf).notes == (
        "the chat template leaves out or changes what system says",
    )


def test_turns_that_are_not_to_be_learned_are_context(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (
        Message("user", "U"),
        Message("assistant", "bad", False),
        Message("user", "?"),
        Message("assistant", "good"),
    )
    (sample,) = render_sample(Chat(1, turns), tokenizer)
    assert learned_text(sample, tokenizer) == "good<|im_end|>"
    assert "bad<|im_end|>" in tokenizer.decode(sample.input_ids.tolist())


def test_variables_of_a_row_reach_the_template() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{{ mood }}<|im_end|>{% endfor %}")
    asked = (Message("user", "U"), Message("assistant", "A"))
    (sample,) = render_sample(Chat(1, asked, template_kwargs={"mood": "!"}), tokenizer)
    assert learned_text(sample, tokenizer) == "A!<|im_end|>"
    with pytest.raises(TemplateRefusalError, match="may not set"):
        render_sample(Chat(1, asked, template_kwargs={"tokenize": True}), tokenizer)


def test_samples_without_a_token_to_learn_are_numbered() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    # The answer renders to nothing beyond blanks, so that no token of it is left to learn.
    empty = chat(("user", "hello"), ("assistant", "\n"), line=9)
    found = tokenize_samples([Text(3, "abc"), empty], tokenizer, 16)
    assert found.empty == [1]
    assert found.row_of == [0]
    with pytest.raises(DataError, match="max_length"):
        tokenize_samples([Text(1, "a")], tokenizer, 1)


def test_answers_that_end_without_an_end_mark_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = chat(("user", "U"), ("assistant", "A"))
    assert tokenize_samples([asked], tokenizer, 99).counts["endless"] == 0
    plain = make_tokenizer("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    assert tokenize_samples([asked], plain, 99).counts["endless"] == 1


def test_the_preview_marks_what_is_learned_and_disarms_escapes(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = tokenize_samples(
        [chat(("user", "U\x1b[31m"), ("assistant", "A")), Text(2, "t" * 50), Text(3, "never shown")], tokenizer, 128
    ).samples
    preview = "\n".join(previews(samples, tokenizer, max_chars=60))
    assert preview.count("--- sample") == 2
    assert "never shown" not in preview
    assert "\x1b" not in preview
    assert "more characters" in preview
    assert "assistant\n>>>A<|im_end|><<<\n" in previews(samples, tokenizer)[0]


def test_the_package_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import pkgutil, importlib, sys, fedmoe.datasets as d;"
        "[importlib.import_module(f'fedmoe.datasets.{m.name}') for m in pkgutil.iter_modules(d.__path__)];"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'pyarrow'} & set(sys.modules)))"
    )
    env = {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"


def test_the_template_of_the_fixture_has_no_generation_marks() -> None:
    assert "generation %}" not in CHATML
