"""Checks that a base model's parts fit together: settings, weights, tokenizer, end tokens, chat template, context.

Every problem names the files, both values and what to do, and all are reported at once. Oddities of published models
that work nevertheless are notes.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedmoe.models.chat_template import OTHER_TEMPLATE, rendered, templates_of, variables
from fedmoe.models.identity import BaseModelError
from fedmoe.models.stop_tokens import context_of, end_marks, special_tokens, stop_token_ids

_SETTINGS: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda value: value >= 0, "0 or more"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "top_k": (lambda value: value >= -1, "0 or more"),
    "min_p": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "repetition_penalty": (lambda value: value > 0, "above 0"),
    "max_length": (lambda value: value >= 1, "1 or more"),
    "max_new_tokens": (lambda value: value >= 1, "1 or more"),
}
# Of models that also see or hear; text never holds them.
_MEDIA_TOKENS = ("image_token", "video_token", "audio_token", "boi_token", "eoi_token", "boa_token", "eoa_token")
# What looks like a token of its own in a template of any family.
_MARK = re.compile(r"<[|\uff5c][^\s<>]{1,60}[|\uff5c]>|</?s>|<(?:start|end)_of_\w+>|<(?:eos|bos|eot)>")
_DIGITS = re.compile(r"\d+")
_NAMED = 5


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """How weights were loaded: names without values, values without a name, and (name, shape, shape in the model)."""

    missing: Collection[str] = ()
    unused: Collection[str] = ()
    mismatched: Collection[tuple[str, tuple[int, ...], tuple[int, ...]]] = ()


def check_settings(folder: Path) -> None:
    """Check config.json and generation_config.json before anything is loaded; raises BaseModelError."""
    problems = []
    config = _json(folder / "config.json")
    inner = config.get("text_config")
    text = inner if isinstance(inner, dict) else config
    vocabulary = text.get("vocab_size")
    generation = _json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
    for file, values in (("config.json", text), ("generation_config.json", generation)):
        problems += [f"{folder / file}: {problem}" for problem in _bad_ids(values, vocabulary)]
    for name, (fits, rule) in _SETTINGS.items():
        value = generation.get(name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not (is_number and fits(float(str(value)))):
            problems.append(
                f"{folder / 'generation_config.json'}: {name} is {value!r}, it must be {rule}; correct or remove it"
            )
    refuse(problems)


def check_loaded(
    where: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: LoadedWeights
) -> tuple[str, ...]:
    """Check a loaded model: raises BaseModelError with all problems, returns notes; `where` names it in messages."""
    refuse(_weight_problems(where, model, weights))
    problems, notes = _token_findings(where, model, tokenizer)
    problems += _end_problems(where, model, tokenizer)
    length, source = context_of(model.config, tokenizer)
    if length < 1:
        problems.append(f"{where}: {source} is {length}; a model needs room for a token: correct it")
    template_problems, template_notes = template_findings(where, tokenizer)
    refuse(problems + template_problems)
    _, others = _split_unused(model, weights)
    if others:
        template_notes.append(f"{where}: weights that this model does not use: {_shown(others)}")
    return tuple(notes + template_notes)


def template_findings(where: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Problems and notes of the tokenizer's chat template, if it has one."""
    texts = templates_of(tokenizer)
    if not texts:
        return [], []
    for text in texts.values():
        variables(text, where)
    if "default" not in texts:
        return [f"{where}: of its chat templates {sorted(texts)} none is called default; name one so"], []
    parts = rendered(tokenizer, answered=True)
    if isinstance(parts, str):
        return [], [f"{where}: the chat template refuses a question with its answer: {parts}"]
    shown, answer, tail = parts
    if not answer:
        return [
            f"{where}: the chat template does not show what was said: of a question and an answer it makes "
            f"{shown[:120]!r}; {OTHER_TEMPLATE}"
        ], []
    split = [mark for mark in dict.fromkeys(_MARK.findall("".join(parts))) if _pieces(tokenizer, mark) > 1]
    ends = [mark for mark in split if mark in tail]
    if ends and not end_marks(tokenizer):
        return [
            f"{where}: the chat template ends an answer with {ends[0]!r}, which the tokenizer splits into "
            f"{_pieces(tokenizer, ends[0])} tokens, so no answer could end there; give a template for this tokenizer "
            "with --chat-template FILE, or the tokenizer that belongs to the template"
        ], []
    notes = [f"{where}: {mark} of the chat template is {_pieces(tokenizer, mark)} tokens, not one" for mark in split]
    if not end_marks(tokenizer):
        notes.append(f"{where}: the chat template puts no end mark behind an answer ({tail[:40]!r})")
    return [], notes


def stored_template_findings(folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """Problems and notes of a folder that stores a chat template in two files."""
    file, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not (file.is_file() and settings.is_file()):
        return [], []
    other = _json(settings).get("chat_template")
    if isinstance(other, list):
        named = {str(entry.get("name")): entry.get("template") for entry in other if isinstance(entry, dict)}
        other = named.get("default")
    text = file.read_text("utf-8")
    if not isinstance(other, str) or other.strip() == text.strip():
        return [], []
    both = [rendered(tokenizer, answered, template) for template in (text, other) for answered in (True, False)]
    if both[:2] == both[2:]:
        return [], [f"{file} and the chat_template of {settings.name} differ, though not for plain conversations"]
    shown = [parts if isinstance(parts, str) else "".join(parts[:2]) for parts in (both[0], both[2])]
    return [
        f"{file} and the chat_template of {settings} are different templates: a conversation reads {shown[0]!r} by the "
        f"first and {shown[1]!r} by the second; remove one of them, or choose with --chat-template {file}"
    ], []


def refuse(problems: list[str]) -> None:
    """Raise BaseModelError with all problems, if there are any."""
    if problems:
        lines = ("the base model's parts do not fit together:", *(f"  {problem}" for problem in problems))
        raise BaseModelError("\n".join(lines))


def _json(file: Path) -> dict[str, object]:
    try:
        values = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise BaseModelError(f"{file} holds {type(values).__name__}, not a JSON object; download it again")
    return values


def _bad_ids(values: Mapping[str, object], vocabulary: object) -> list[str]:
    """Token ids that are no ids, or beyond the embedding's rows."""
    problems = []
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        value = values.get(name)
        for token in value if isinstance(value, list) and name == "eos_token_id" else [value]:
            if token is None or token == -1:
                continue
            if not isinstance(token, int) or isinstance(token, bool):
                problems.append(f"{name} is {value!r}, it must be a token id; correct it")
            elif token < 0 or (isinstance(vocabulary, int) and token >= vocabulary):
                problems.append(f"{name} is {token}, but vocab_size of config.json is {vocabulary}; correct one")
    return problems


def _weight_problems(where: str, model: PreTrainedModel, weights: LoadedWeights) -> list[str]:
    """The first kind of problem that there is: the others may follow from it."""
    vocabulary = model.config.get_text_config().vocab_size
    if weights.mismatched:
        return [
            f"{where}: {name} is stored as {list(stored)}, but config.json (vocab_size {vocabulary}) makes it "
            f"{list(expected)}; give the config.json that belongs to these weights"
            for name, stored, expected in sorted(weights.mismatched)[:_NAMED]
        ]
    if weights.missing:
        return [
            f"{where}: config.json describes weights that are not stored, they would be random: "
            f"{_shown(weights.missing)}; complete the download, or correct config.json"
        ]
    unused, _ = _split_unused(model, weights)
    if unused:
        return [
            f"{where}: weights are stored that config.json has no place for: {_shown(unused)}; give the config.json "
            "that belongs to these weights"
        ]
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    can_tie = tied and head is not None and getattr(model, "_tied_weights_keys", None)
    if can_tie and head.weight.data_ptr() != embedding.weight.data_ptr():
        return [
            f"{where}: config.json says tie_word_embeddings true, but input and output embeddings are stored with "
            "different values; set tie_word_embeddings to false, or remove the output embeddings"
        ]
    return []


def _split_unused(model: PreTrainedModel, weights: LoadedWeights) -> tuple[list[str], list[str]]:
    """Unused weights of this kind of model (of a further layer, or of a module that is there), and all others."""
    if not weights.unused:
        return [], []
    kinds = {_DIGITS.sub("N", name) for name in model.state_dict()}
    modules = {name for name, _ in model.named_modules() if name}
    ours = {n for n in weights.unused if _DIGITS.sub("N", n) in kinds or n.rpartition(".")[0] in modules}
    return sorted(ours), sorted(set(weights.unused) - ours)


def _token_findings(
    where: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[str], list[str]]:
    rows = int(model.get_input_embeddings().weight.shape[0])
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    media = {str(getattr(tokenizer, name, None)) for name in _MEDIA_TOKENS}
    wrong = [f"{token!r} ({number})" for number, token in beyond if token not in media]
    if wrong:
        return [
            f"{where}: tokenizer.json has {_shown(wrong, sort=False)} but the embedding has only {rows} rows (0 to "
            f"{rows - 1}); give the tokenizer that belongs to these weights, or lengthen them by "
            "resize_token_embeddings"
        ], []
    spare = [f"{token!r} ({number})" for number, token in beyond]
    if spare:
        return [], [f"{where}: the embedding's {rows} rows have no place for {_shown(spare)}; no data may hold them"]
    return [], []


def _end_problems(where: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if not stop_token_ids(tokenizer, model.generation_config):
        return [
            f"{where}: nothing ends an answer: the tokenizer has no eos_token, the settings have no eos_token_id, and "
            "the chat template has no end mark; set eos_token in tokenizer_config.json"
        ]
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    names = configured if isinstance(configured, list | tuple) else [configured]
    special, vocabulary = special_tokens(tokenizer), set(tokenizer.get_vocab().values())
    problems = []
    for token in names:
        if token is None or token in special:
            continue
        what = f"{tokenizer.decode([token])!r}, ordinary text" if token in vocabulary else "no token"
        problems.append(
            f"{where}: eos_token_id {token} of generation_config.json (or config.json) is {what} for the tokenizer, "
            f"whose eos_token is {tokenizer.eos_token!r} ({tokenizer.eos_token_id}); correct eos_token_id"
        )
    return problems


def _pieces(tokenizer: PreTrainedTokenizerBase, mark: str) -> int:
    return len(tokenizer(mark, add_special_tokens=False)["input_ids"])


def _shown(names: Collection[str], sort: bool = True) -> str:
    ordered = sorted(names) if sort else list(names)
    more = f" and {len(ordered) - _NAMED} more" if len(ordered) > _NAMED else ""
    return ", ".join(ordered[:_NAMED]) + more
