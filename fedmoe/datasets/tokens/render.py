"""Renders samples to tokens and labels: decides which tokens of a text, a completion or a chat are learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any, Protocol, cast

import numpy as np

from fedmoe.datasets.formats.samples import Chat, Completion, Sample, Text
from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.chat_answers import AnswerText, ChatTexts, TemplateRefusalError, chat_texts
from fedmoe.datasets.tokens.tokenized_sample import MASKED, RenderResult, TokenizedSample, Tokenizer

# Encoded together: more at once cost memory and save nothing.
_CHARACTERS_AT_ONCE = 1 << 18


class _BatchTokenizer(Protocol):
    """A fast tokenizer, which encodes several texts at once."""

    def __call__(
        self,
        text: list[str],
        *,
        add_special_tokens: bool,
        return_attention_mask: bool,
        return_token_type_ids: bool,
        return_offsets_mapping: bool,
        verbose: bool,
    ) -> Mapping[str, list[list[Any]]]: ...


def render(sample: Sample, tokenizer: Tokenizer) -> RenderResult:
    """One sample as tokens and labels, uncut; raises `DataError` for what the tokenizer or its template cannot do."""
    (rendering,) = render_all([sample], tokenizer)
    if isinstance(rendering, TemplateRefusalError):
        raise rendering
    return rendering


def render_all(samples: Iterable[Sample], tokenizer: Tokenizer) -> Iterator[RenderResult | TemplateRefusalError]:
    """Samples as tokens and labels, uncut, in their order; in place of one that the template refuses, why.

    Conversations are encoded together, a limited number of characters at once. Raises `DataError` where the tokenizer
    lacks what all samples need.
    """
    waiting: list[ChatTexts | RenderResult | TemplateRefusalError] = []
    characters = 0
    for sample in samples:
        item = _prepared(sample, tokenizer)
        waiting.append(item)
        characters += sum(len(text) for text, _ in item.parts) if isinstance(item, ChatTexts) else 0
        if characters >= _CHARACTERS_AT_ONCE:
            yield from _encoded(waiting, tokenizer)
            waiting, characters = [], 0
    yield from _encoded(waiting, tokenizer)


def _prepared(sample: Sample, tokenizer: Tokenizer) -> ChatTexts | RenderResult | TemplateRefusalError:
    match sample:
        case Text(text=text):
            return RenderResult((_plain([(text, True)], tokenizer),))
        case Completion(prompt=prompt, completion=completion):
            return RenderResult((_plain([(prompt, False), (completion, True)], tokenizer),))
        case Chat():
            try:
                return chat_texts(sample, tokenizer)
            except TemplateRefusalError as error:
                return error


def _encoded(
    items: Sequence[ChatTexts | RenderResult | TemplateRefusalError], tokenizer: Tokenizer
) -> Iterator[RenderResult | TemplateRefusalError]:
    """The items with the texts of conversations encoded."""
    parts = [part for item in items if isinstance(item, ChatTexts) for part in item.parts]
    learned = _learn(parts, tokenizer)
    for item in items:
        if isinstance(item, ChatTexts):
            yield RenderResult(tuple(islice(learned, len(item.parts))), item.notes)
        else:
            yield item


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


def _learn(parts: Sequence[tuple[str, Sequence[AnswerText]]], tokenizer: Tokenizer) -> Iterator[TokenizedSample]:
    """Texts with the answers learned of each."""
    if not parts:
        return
    encoded = cast(_BatchTokenizer, tokenizer)(
        [text for text, _ in parts],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    for (_, answers), numbers, pairs in zip(parts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        ids = np.array(numbers, dtype=np.int64)
        starts = np.fromiter(chain.from_iterable(pairs), np.int64, 2 * len(pairs))[::2]
        learned = np.zeros(len(ids), dtype=np.bool_)
        for answer in answers:
            learned |= (starts >= len(answer.before)) & (starts < len(answer.upto))
        yield TokenizedSample(ids, np.where(learned, ids, MASKED))
