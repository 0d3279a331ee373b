"""A tiny random Qwen2 made in code, with a byte-level tokenizer: the same bits on every machine, no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fedmoe.models.identity import canonical_tokenizer_hash, hash_tensors
from fedmoe.models.known_bases import TINY_CONFIG

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, START, END)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_SEED = 20250101
_SPREAD = 0.25


def tiny_model() -> PreTrainedModel:
    """A float32 Qwen2 of 2 layers and hidden size 64; PyTorch's random state is left as it was."""
    config = Qwen2Config(**TINY_CONFIG, bos_token_id=None, eos_token_id=258, pad_token_id=256, dtype="float32")
    with torch.random.fork_rng(devices=[]):
        model = Qwen2ForCausalLM(config).float()
    with torch.no_grad():
        for place, (name, parameter) in enumerate(sorted(model.named_parameters())):
            if not name.endswith("norm.weight"):
                parameter.copy_(torch.from_numpy(_draw(place, tuple(parameter.shape))))
    return model


def _draw(place: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    # Raw integers and exact arithmetic: the library's distributions may change between versions, these bits may not.
    raw = np.random.PCG64([_SEED, place]).random_raw(int(np.prod(shape)))
    uniform = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)
    return (uniform * np.float32(_SPREAD)).reshape(shape)


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte plus three special tokens, with a ChatML template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_hashes(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The hashes of weights and tokenizer that the saved folder of this model has."""
    tensors = (
        (name, "F32", list(value.shape), [value.detach().numpy().tobytes()]) for name, value in model.named_parameters()
    )
    return hash_tensors(tensors), canonical_tokenizer_hash(tokenizer.backend_tokenizer.to_str())


def save_tiny(folder: Path) -> None:
    """Write the tiny model and its tokenizer as a checkpoint folder."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
