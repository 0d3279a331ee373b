"""Renders samples to tokens and labels; which tokens of texts and completions are learned (chats: `chat_template`)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmoe.datasets.formats.samples import Chat, Completion, Sample, Text
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.chat_template import render_chat
from fedmoe.datasets.tokens.tokenized_sample import MASKED, RenderResult, TokenizedSample, Tokenizer


def render(sample: Sample, tokenizer: Tokenizer) -> RenderResult:
    """One sample as tokens and labels, uncut; raises `DataError` for what the tokenizer or its template cannot do."""
    match sample:
        case Text(text=text):
            return RenderResult((_plain([(text, True)], tokenizer),))
        case Completion(prompt=prompt, completion=completion):
            return RenderResult((_plain([(prompt, False), (completion, True)], tokenizer),))
        case Chat():
            return render_chat(sample, tokenizer)


def _plain(parts: Sequence[tuple[str, bool]], tokenizer: Tokenizer) -> TokenizedSample:
    """Texts one after the other with the tokenizer's start and end tokens, each once: a row may hold its own."""
    # Prompt and completion are encoded apart because that is what the model sees when it is asked.
    encoded = [(_encode(text, tokenizer), learned) for text, learned in parts]
    # The start-of-text token, for tokenizers that put it before every text.
    bos = tokenizer.bos_token_id
    start = [bos] if bos is not None and tokenizer("")["input_ids"][:1] == [bos] else []
    first = next((ids for ids, _ in encoded if ids), [])
    ids = start if first[: len(start)] != start else []
    labels = [MASKED] * len(ids)
    for part, learned in encoded:
        ids = ids + part
        labels += part if learned else [MASKED] * len(part)
    eos = tokenizer.eos_token_id
    if eos is None:
        raise DataError("the tokenizer has no end-of-text token; set tokenizer.eos_token")
    # The text may bring its own end token, perhaps with white space after it.
    if _encode(parts[-1][0].rstrip()[-64:], tokenizer)[-1:] != [eos]:
        ids, labels = [*ids, eos], [*labels, eos]
    return TokenizedSample(np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64))


def _encode(text: str, tokenizer: Tokenizer) -> list[int]:
    # verbose=False: longer than the model's context is fine here, it is cut to max_length later.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [int(token) for token in ids]  # type: ignore[call-overload]
