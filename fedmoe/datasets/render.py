"""From samples to tokens and labels: which tokens are learned is decided here and nowhere else.

Labels are aligned with the tokens (the model shifts them); `MASKED` marks a token without loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedmoe.datasets.errors import DataError
from fedmoe.datasets.formats import Chat, Completion, Message, Sample, Text

MASKED = -100
IntArray = NDArray[np.int64]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer (any fast one fits)."""

    @property
    def is_fast(self) -> bool: ...
    @property
    def eos_token_id(self) -> int | None: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def chat_template(self) -> object: ...

    def __call__(
        self, text: str, *, add_special_tokens: bool = ..., return_offsets_mapping: bool = ..., verbose: bool = ...
    ) -> Mapping[str, list[object]]: ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> object: ...

    def decode(self, token_ids: list[int]) -> str: ...


@dataclass(frozen=True, eq=False)
class TokenizedSample:
    """Token ids and labels of equal length, int64; `MASKED` labels carry no loss."""

    input_ids: IntArray
    labels: IntArray

    @property
    def learned(self) -> int:
        """Tokens that carry loss; the first token never does, as nothing predicts it."""
        return int(np.count_nonzero(self.labels[1:] != MASKED))


@dataclass(frozen=True)
class TokenizedData:
    """The samples fit to train on; lines whose every learned token was lost; how many were cut to `max_length`."""

    samples: tuple[TokenizedSample, ...]
    unlearnable_lines: tuple[int, ...]
    truncated: int


def tokenize_samples(samples: Iterable[Sample], tokenizer: Tokenizer, max_length: int) -> TokenizedData:
    """All samples as tokens, none longer than `max_length`: text is split, conversations are cut around their answers.

    Raises `DataError` if not one sample has a token to learn from, or the tokenizer lacks what the samples need.
    """
    if max_length < 2:
        raise DataError(f"max_length must be at least 2 tokens, got {max_length}")
    kept: list[TokenizedSample] = []
    lost: list[int] = []
    truncated = 0
    for sample in samples:
        whole = render_sample(sample, tokenizer)
        pieces = [piece for part in whole for piece in _fit(sample, part, max_length)]
        truncated += sum(not isinstance(sample, Text) and len(part.input_ids) > max_length for part in whole)
        good = [piece for piece in pieces if piece.learned]
        kept += good
        if not good:
            lost.append(sample.line)
    if not kept:
        raise DataError(
            f"no token to learn from in {len(lost)} samples of at most {max_length} tokens (first lines: {lost[:5]}); "
            "raise max_length, or check that the rows hold answers"
        )
    return TokenizedData(tuple(kept), tuple(lost), truncated)


def render_sample(sample: Sample, tokenizer: Tokenizer) -> list[TokenizedSample]:
    """One sample in full length; a conversation can give several, see `_render_chat`."""
    match sample:
        case Text(text=text):
            return [_sample([(text, True)], tokenizer)]
        case Completion(prompt=prompt, completion=completion):
            return [_sample([(prompt, False), (completion, True)], tokenizer)]
        case Chat():
            return _render_chat(sample, tokenizer)


def _sample(parts: list[tuple[str, bool]], tokenizer: Tokenizer) -> TokenizedSample:
    # Prompt and completion are encoded apart because that is what the model sees when it is asked.
    ids = _leading_ids(tokenizer)
    labels = [MASKED] * len(ids)
    for text, learned in parts:
        part = _encode(text, tokenizer)
        ids += part
        labels += part if learned else [MASKED] * len(part)
    eos = _eos(tokenizer)
    return _arrays([*ids, eos], [*labels, eos])


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


def _render_chat(chat: Chat, tokenizer: Tokenizer) -> list[TokenizedSample]:
    """One sample with every answer learned, or one for each answer where the template rewrites earlier turns.

    Templates need no `{% generation %}` marks: an answer is what the template adds to the turns before it. That holds
    only if each shorter conversation is a prefix of the longer; templates that drop earlier reasoning break it.
    """
    _check_template(tokenizer)
    answers = _answers(chat)
    whole = _template(chat, len(chat.messages), tokenizer)
    ends = [_template(chat, index + 1, tokenizer) for index in answers]
    starts = [_template(chat, index, tokenizer, ask=True) for index in answers]
    if all(whole.startswith(text) for text in (*starts, *ends)):
        spans = [_span(start, end) for start, end in zip(starts, ends, strict=True)]
        return [_learn_spans(whole, spans, tokenizer)]
    for index, start, end in zip(answers, starts, ends, strict=True):
        if not end.startswith(start):
            got = end[max(0, len(start) - 60) :][:90]
            raise DataError(
                f"line {chat.line}: the answer in turn {index + 1} cannot be found: the chat template ends the prompt "
                f"with {start[-60:]!r} but renders the answered conversation as {got!r}; "
                "use a template in which the prompt is a prefix of the answered conversation"
            )
    return [_learn_spans(end, [_span(start, end)], tokenizer) for start, end in zip(starts, ends, strict=True)]


def _check_template(tokenizer: Tokenizer) -> None:
    if not tokenizer.chat_template:
        raise DataError(
            "the rows are conversations but the tokenizer has no chat template; use an instruct model's tokenizer, "
            "or rows of the shape text or prompt+completion"
        )
    if not tokenizer.is_fast:
        raise DataError("conversations need a fast tokenizer, which tells the place of each token; this one is slow")


def _answers(chat: Chat) -> list[int]:
    # An assistant's greeting before anything was said is context: no template can render the nothing before it.
    first = next(index for index, message in enumerate(chat.messages) if message.role != "assistant")
    return [i for i, message in enumerate(chat.messages) if message.role == "assistant" and i > first]


def _template(chat: Chat, turns: int, tokenizer: Tokenizer, ask: bool = False) -> str:
    turn_dicts = [_turn(message) for message in chat.messages[:turns]]
    try:
        return str(tokenizer.apply_chat_template(turn_dicts, tokenize=False, add_generation_prompt=ask))
    except Exception as error:  # templates are programs of their own and raise what they like
        roles = [message.role for message in chat.messages]
        raise DataError(f"line {chat.line}: the chat template refuses the turns {roles}: {error}") from error


def _turn(message: Message) -> dict[str, str]:
    return {"role": message.role, "content": message.content}


def _span(start: str, end: str) -> tuple[int, int]:
    """The learned characters: the answer with its end-of-turn mark, without the blank that separates turns."""
    return len(start), len(start) + len(end[len(start) :].rstrip())


def _learn_spans(text: str, spans: list[tuple[int, int]], tokenizer: Tokenizer) -> TokenizedSample:
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoded["input_ids"], dtype=np.int64)
    offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    learned = np.zeros(len(ids), dtype=np.bool_)
    for start, stop in spans:
        learned |= (offsets[:, 0] >= start) & (offsets[:, 0] < stop)
    return TokenizedSample(ids, np.where(learned, ids, MASKED))


def _arrays(ids: list[int], labels: list[int]) -> TokenizedSample:
    return TokenizedSample(np.array(ids, dtype=np.int64), np.array(labels, dtype=np.int64))


def _fit(kind: Sample, sample: TokenizedSample, max_length: int) -> list[TokenizedSample]:
    length = len(sample.input_ids)
    if length <= max_length:
        return [sample]
    starts = range(0, length, max_length) if isinstance(kind, Text) else [_best_window(sample, max_length)]
    return [
        TokenizedSample(sample.input_ids[start : start + max_length], sample.labels[start : start + max_length])
        for start in starts
    ]


def _best_window(sample: TokenizedSample, max_length: int) -> int:
    """The start of the window with the most learned tokens, the earliest of equals."""
    learned = np.concatenate(([0], np.cumsum(sample.labels != MASKED)))
    # A window's first token is never learned, so the count starts at its second.
    return int(np.argmax(learned[max_length:] - learned[1 : len(learned) - max_length + 1]))


def rendered_preview(
    samples: Sequence[TokenizedSample], tokenizer: Tokenizer, count: int = 2, max_chars: int = 2000
) -> str:
    """The first `count` samples as text for a person, what is learned between `>>>` and `<<<`."""
    blocks = []
    for number, sample in enumerate(samples[:count], start=1):
        text = "".join(f">>>{part}<<<" if learned else part for part, learned in _parts(sample, tokenizer))
        cut = f"... ({len(text) - max_chars:,} more characters)" if len(text) > max_chars else ""
        head = f"--- sample {number}: {len(sample.input_ids)} tokens, {sample.learned} with loss (between >>> and <<<)"
        blocks.append(f"{head}\n{text[:max_chars]}{cut}")
    return "\n".join(blocks)


def _parts(sample: TokenizedSample, tokenizer: Tokenizer) -> list[tuple[str, bool]]:
    """Runs of tokens of one kind: their text and whether they are learned."""
    learned = sample.labels != MASKED
    cuts = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(learned)]
    runs = [(start, stop) for start, stop in pairwise(cuts) if start < stop]
    return [(_printable(tokenizer.decode(sample.input_ids[a:b].tolist())), bool(learned[a])) for a, b in runs]


def _printable(text: str) -> str:
    # A data set may hold terminal escapes; a preview must not run them.
    return "".join(char if char.isprintable() or char in "\n\t" else "\N{REPLACEMENT CHARACTER}" for char in text)
