"""Small checkpoint folders whose parts can be made to disagree, and chat templates as families of models have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fedmoe.models.tiny import save_tiny

_LOOP = "{% for m in messages %}"
_END = "{% endfor %}"
CHATML = (
    _LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n" + _END + ""
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}"
    + _LOOP
    + "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    + _END
    + "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
INST = (
    "{{ bos_token }}" + _LOOP + "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}" + _END
)
REASONING = (
    "{{ bos_token }}" + _LOOP + "{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}" + _END + ""
    "{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
TWO_ENDS = (
    _LOOP + "<|{{ m.role }}|>\n{{ m.content }}<|end|>\n" + _END + ""
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
CHANNELS = (
    _LOOP + "{% if m.role == 'user' %}<|start|>user<|message|>{{ m.content }}<|end|>"
    "{% else %}<|start|>assistant<|message|>{{ m.content }}{% if loop.last %}<|return|>{% else %}<|end|>{% endif %}"
    "{% endif %}" + _END + "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
MODEL_TURNS = (
    "{{ bos_token }}" + _LOOP + "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content }}"
    "<end_of_turn>\n" + _END + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PLAIN = (
    _LOOP
    + "### {{ m.role }}:\n{{ m.content }}\n\n"
    + _END
    + "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)


def byte_tokenizer(
    special: tuple[str, ...], template: str | None, eos: str | None, bos: str | None = None
) -> PreTrainedTokenizerFast:
    """One token a byte (0 to 255), then `special`, in their order."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: place for place, letter in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(one, special=True, normalized=False) for one in special])
    names = {name: token for name, token in (("eos_token", eos), ("bos_token", bos)) if token is not None}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **names)


def tiny_folder(folder: Path) -> Path:
    """The tiny model: tokens 256 `<|endoftext|>`, 257 `<|im_start|>`, 258 `<|im_end|>`, the embedding's last."""
    folder.mkdir()
    save_tiny(folder)
    return folder


def change(file: Path, **values: object) -> None:
    """Set keys of a JSON file; a value of ... takes the key away."""
    old: Mapping[str, object] = json.loads(file.read_text("utf-8")) if file.exists() else {}
    new = {name: value for name, value in {**old, **values}.items() if value is not ...}
    file.write_text(json.dumps(new), "utf-8")


def change_weights(folder: Path, removed: tuple[str, ...] = (), **added: torch.Tensor) -> None:
    """Take weights out of the only file and put others in (`__` in a name is a dot)."""
    file = folder / "model.safetensors"
    kept = {name: value.clone() for name, value in load_file(file).items() if name not in removed}
    kept |= {name.replace("__", "."): value for name, value in added.items()}
    save_file(kept, file, metadata={"format": "pt"})
