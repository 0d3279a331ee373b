"""What ends an answer is what conversations teach, in one set for all who generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from base_folders import (
    CHANNELS,
    CHATML,
    HEADERS,
    INST,
    MODEL_TURNS,
    PLAIN,
    REASONING,
    TWO_ENDS,
    byte_tokenizer,
)
from transformers import GenerationConfig, PreTrainedTokenizerFast

from fedmoe.arena.rollout.chat import ChatCodec
from fedmoe.datasets.formats.samples import Chat, Message
from fedmoe.datasets.tokens.render import render
from fedmoe.datasets.tokens.tokenized_sample import MASKED
from fedmoe.gateway.serve.text import PromptEncoder, TextStream
from fedmoe.inference import transformers_engine
from fedmoe.models.base import LoadedBase, load_base, pad_token, stop_tokens
from fedmoe.models.stop_tokens import end_marks, stop_token_ids
from fedmoe.models.tiny import tiny_tokenizer
from fedmoe.qwen_finetune import QwenLoRAExpert

# Of each family: the template, its special tokens, the tokenizer's end and start, and the marks behind an answer.
FAMILIES = {
    "chatml, as its base model": (CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|endoftext|>", None),
    "chatml": (CHATML, ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>", None),
    "headers": (
        HEADERS,
        ("<|bot|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        *("<|end_of_text|>", "<|bot|>"),
    ),
    "inst": (INST, ("<s>", "</s>"), "</s>", "<s>"),
    "reasoning": (REASONING, ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"), "<|eos|>", "<|bos|>"),
    "two ends": (TWO_ENDS, ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", None),
    "channels": (CHANNELS, ("<|start|>", "<|message|>", "<|end|>", "<|return|>"), "<|return|>", None),
    "model turns": (MODEL_TURNS, ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"),
}
MARKS = {
    "chatml, as its base model": ["<|im_end|>"],
    "chatml": ["<|im_end|>"],
    "headers": ["<|eot_id|>"],
    "inst": ["</s>"],
    "reasoning": ["<|eos|>"],
    "two ends": ["<|end|>", "<|endoftext|>"],
    "channels": ["<|return|>"],
    "model turns": ["<end_of_turn>"],
}


def tokenizer_of(family: str) -> PreTrainedTokenizerFast:
    template, special, eos, bos = FAMILIES[family]
    return byte_tokenizer(special, template, eos, bos)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_marks_are_what_stands_behind_an_answer(family: str) -> None:
    tokenizer = tokenizer_of(family)
    assert [tokenizer.decode([token]) for token in end_marks(tokenizer)] == MARKS[family]
    assert stop_token_ids(tokenizer, None) == {*end_marks(tokenizer), tokenizer.eos_token_id}


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"reasoning"}))
def test_the_last_token_that_is_learned_ends_an_answer(family: str) -> None:
    tokenizer = tokenizer_of(family)
    samples = render(Chat(1, (Message("user", "hi"), Message("assistant", "yo"))), tokenizer).samples
    last = [int(sample.labels[sample.labels != MASKED][-1]) for sample in samples]
    assert set(last) <= stop_token_ids(tokenizer, None)


def test_ordinary_text_behind_an_answer_ends_nothing() -> None:
    tokenizer = byte_tokenizer(("<|end|>",), PLAIN, "<|end|>")
    assert end_marks(tokenizer) == ()
    assert stop_token_ids(tokenizer, None) == {tokenizer.eos_token_id}


def test_without_a_template_there_are_no_marks() -> None:
    assert end_marks(byte_tokenizer(("<|end|>",), None, "<|end|>")) == ()


@pytest.mark.parametrize(("named", "more"), [(256, {256}), ([256, 257], {256, 257}), (None, set())])
def test_the_generation_settings_add_theirs(named: object, more: set[int]) -> None:
    tokenizer = tiny_tokenizer()
    assert stop_token_ids(tokenizer, GenerationConfig(eos_token_id=named)) == {258} | more


@pytest.fixture
def base() -> LoadedBase:
    """The tiny model as base models come: its tokenizer's end is not the mark that its template teaches."""
    loaded = load_base("tiny", "cpu", "fp32")
    loaded.tokenizer.eos_token = "<|endoftext|>"
    loaded.model.generation_config.eos_token_id = 256
    return loaded


def test_everybody_asks_the_same_function(base: LoadedBase) -> None:
    assert transformers_engine.stop_tokens is stop_tokens
    assert stop_tokens(base) == {256, 258}


def test_a_row_is_filled_up_by_the_padding_token_or_one_that_ends(base: LoadedBase) -> None:
    assert pad_token(base) == 256
    base.tokenizer.pad_token = None
    base.tokenizer.eos_token = None
    base.model.generation_config.eos_token_id = None
    assert pad_token(base) == 258


def saying(base: LoadedBase, text: str) -> LoadedBase:
    """The base with a model that says `text`, whatever it is asked."""
    tokens = base.tokenizer(text)["input_ids"]
    head = base.model.get_output_embeddings()

    class Said(torch.nn.Module):  # type: ignore[misc]  # torch is not followed
        def __init__(self) -> None:
            super().__init__()
            self.weight = head.weight
            self.place = -1

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            self.place = min(self.place + 1, len(tokens) - 1)
            scores = torch.zeros(*hidden.shape[:-1], 259)
            scores[..., tokens[self.place]] = 9.0
            return scores

    base.model.set_output_embeddings(Said())
    return base


def test_generate_ends_at_the_mark_that_was_learned_and_does_not_show_it(base: LoadedBase) -> None:
    assert QwenLoRAExpert(saying(base, "Yes.<|im_end|>\nand on"), None).generate("?", 20) == "Yes."


def test_a_mark_that_is_not_marked_special_is_not_shown(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(("<|endoftext|>", "<|im_start|>"), CHATML, "<|endoftext|>")
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=False)
    (mark,) = end_marks(tokenizer)
    said = [*tokenizer("Yes.")["input_ids"], mark]
    assert tokenizer.decode(said, skip_special_tokens=True) == "Yes.<|im_end|>"
    assert ChatCodec(tokenizer).text(said) == "Yes."
    stream = TextStream(PromptEncoder(tokenizer, 259, 100, stop_token_ids(tokenizer, None)))
    assert "".join([*(stream.add(token) for token in said), stream.end()]) == "Yes."
