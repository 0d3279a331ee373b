"""Which tokens are learned: all of a text, a completion, an assistant's answers with their end mark, nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHATML, make_tokenizer
from transformers import PreTrainedTokenizerFast

from fedmoe.datasets.errors import DataError
from fedmoe.datasets.formats import Chat, Completion, Message, Text
from fedmoe.datasets.render import MASKED, TokenizedSample, render_sample, rendered_preview, tokenize_samples

REASONING = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OTHER_PROMPT = (
    "{% for message in messages %}{{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}>>{% endif %}"
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


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        (OTHER_PROMPT, "line 7: the answer in turn 2 cannot be found"),
        (REFUSING, "line 7: the chat template refuses .*must alternate"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error(template: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        tokenize_samples([chat(("user", "U"), ("assistant", "A"), line=7)], make_tokenizer(template), 64)


def test_a_tokenizer_without_end_token_is_an_error() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="end-of-text"):
        render_sample(Text(1, "a"), tokenizer)


def test_long_text_is_split_without_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    data = tokenize_samples([Text(1, "abcdefghij" * 10)], tokenizer, 32)
    assert [len(sample.input_ids) for sample in data.samples] == [32, 32, 32, 5]
    joined = np.concatenate([sample.input_ids for sample in data.samples])
    assert tokenizer.decode(joined.tolist()) == "abcdefghij" * 10 + "<|im_end|>"
    assert data.truncated == 0


def test_a_long_conversation_is_cut_around_its_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = (("user", "x" * 200), ("assistant", "the answer"), ("user", "y" * 200), ("assistant", "no"))
    data = tokenize_samples([chat(*turns)], tokenizer, 40)
    (sample,) = data.samples
    assert len(sample.input_ids) == 40
    assert learned_text(sample, tokenizer) == "the answer<|im_end|>"
    assert sample.learned == 11
    assert data.truncated == 1


def test_without_any_token_to_learn_from_there_is_an_error_before_the_first_step(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    # "é" is one character of two tokens, and eos follows: a window of two still learns one token, so nothing less.
    assert tokenize_samples([Text(1, "é")], tokenizer, 2).samples
    with pytest.raises(DataError, match="no token to learn from"):
        tokenize_samples([], tokenizer, 64)
    with pytest.raises(DataError, match="max_length"):
        tokenize_samples([Text(1, "a")], tokenizer, 1)


def test_samples_that_lost_all_their_learned_tokens_are_named() -> None:
    tokenizer = make_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    # The answer renders to nothing beyond blanks, so that no token of it is left to learn.
    empty = chat(("user", "hello"), ("assistant", "\n"), line=9)
    data = tokenize_samples([Text(3, "abc"), empty], tokenizer, 16)
    assert data.unlearnable_lines == (9,)
    with pytest.raises(DataError, match=r"no token to learn from .*\[9\]"):
        tokenize_samples([empty], tokenizer, 16)


def test_the_preview_marks_what_is_learned_and_disarms_escapes(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = tokenize_samples(
        [chat(("user", "U\x1b[31m"), ("assistant", "A")), Text(2, "t" * 50), Text(3, "never shown")], tokenizer, 128
    ).samples
    preview = rendered_preview(samples, tokenizer, max_chars=60)
    assert preview.count("--- sample") == 2
    assert "never shown" not in preview
    assert "\x1b" not in preview
    assert "more characters" in preview
    assert "assistant\n>>>A<|im_end|><<<\n" in rendered_preview(samples, tokenizer)


def test_the_package_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import pkgutil, importlib, sys, fedmoe.datasets as d;"
        "[importlib.import_module(f'fedmoe.datasets.{m.name}') for m in pkgutil.iter_modules(d.__path__)];"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'pyarrow'} & set(sys.modules)))"
    )
    env = {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"


def test_the_template_of_the_fixture_has_no_generation_marks() -> None:
    assert "generation %}" not in CHATML
