"""From samples to tokens and labels: which tokens are learned is decided here and in `chat_template.py`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmoe.datasets.formats.samples import Chat, Completion, Sample, Text
from fedmoe.datasets.readers.lines import DataError
from fedmoe.datasets.tokens.chat_template import render_chat
from fedmoe.datasets.tokens.tokenized import MASKED, Rendering, TokenizedSample, Tokenizer


def render_sample(sample: Sample, tokenizer: Tokenizer) -> list[TokenizedSample]:
    """One sample in full length; a conversation can give several, see `chat_template.render_chat`."""
    return list(render(sample, tokenizer).samples)


def render(sample: Sample, tokenizer: Tokenizer) -> Rendering:
    """One sample as tokens and labels, uncut; raises `DataError` for what the tokenizer or its template cannot do."""
    match sample:
        case Text(text=text):
            return Rendering((_plain([(text, True)], tokenizer),))
        case Completion(prompt=prompt, completion=completion):
            return Rendering((_plain([(prompt, False), (completion, True)], tokenizer),))
        case Chat():
            return render_chat(sample, tokenizer)


def _plain(parts: Sequence[tuple[str, bool]], tokenizer: Tokenizer) -> TokenizedSample:
    """Texts one after the other with the tokenizer's start and end tokens, each once: a row may hold its own."""
    # Prompt and completion are encoded apart because that is what the model sees when it is asked.
    encoded = [(_encode(text, tokenizer), learned) for text, learned in parts]
    start = _leading_ids(tokenizer)
    first = next((ids for ids, _ in encoded if ids), [])
    ids = start if first[: len(start)] != start else []
    labels = [MASKED] * len(ids)
    for part, learned in encoded:
        ids = ids + part
        labels += part if learned else [MASKED] * len(part)
    eos = _eos(tokenizer)
    if _ends_with(parts[-1][0], eos, tokenizer):
        return _arrays(ids, labels)
    return _arrays([*ids, eos], [*labels, eos])


def _ends_with(text: str, eos: int, tokenizer: Tokenizer) -> bool:
    """Whether the text brings its own end token, perhaps with white space after it."""
    last = _encode(text.rstrip()[-64:], tokenizer)
    return last[-1:] == [eos]


def _leading_ids(tokenizer: Tokenizer) -> list[int]:
    """The start-of-text token, for tokenizers that put it before every text."""
    ids = tokenizer("")["input_ids"]
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and ids[:1] == [bos] else []


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    # verbose=False: longer than the model's context is fine here, it is cut to max_length later.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [int(token) for token in ids]  # type: ignore[call-overload]


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no end-of-text token; set tokenizer.eos_token")
    return tokenizer.eos_token_id


def _arrays(ids: list[int], labels: list[int]) -> TokenizedSample:
    return TokenizedSample(np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64))
