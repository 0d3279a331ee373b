"""Statistics of a worker's data for merging and routing: computed, cached and sent to the coordinator.

Disclosed are: of the prompts, in two halves, how many samples there were, the mean of their features on the base
model (hidden states after up to four numbers of layers, d numbers in all), and of their covariance the 64 main
directions and the diagonal of what is left (at most 66 d numbers a half); of the inputs of the adapted modules how many
tokens, and, each input weighted by the squared gradient of the loss, the mean of their squares and a random sketch of
their second moment ((q + 1) n numbers a module, q = 64). No text, no token and no single prompt's features: every
number is taken over at least half of `LEAST_PROMPTS` samples. That is no anonymity: the numbers tell what the data are
about, whoever has a guess of a text can test whether it was likely among so few, and no noise is added. All of it is
made on the public base model from a sample that is bounded in tokens and never in time, so it is made once, does not
follow the training, and is the same on a fast and on a busy machine.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import structlog

from fedmoe import __version__
from fedmoe.datasets.tokens.packing import Block, collate
from fedmoe.datasets.tokens.tokenized_sample import MASKED, Int64Array
from fedmoe.lora.adapter import FloatMatrix
from fedmoe.lora.moments import InputMoments
from fedmoe.lora.prompt_statistics import PromptStatistics
from fedmoe.models.base import LoadedBase
from fedmoe.models.chat_frame import ChatFrame
from fedmoe.models.input_moments import MomentsCollector
from fedmoe.models.prompt_features import prefix_features
from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.files import write_atomic
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import DataStatisticsHeader, StatisticsKind
from fedmoe.wire.delivery import until_answered

#: Fewer samples than this say too much about each of them, and too little about the domain.
LEAST_PROMPTS = 16
#: Beginnings of a text that stand for prompts, in tokens; short ones are vaguer, and a router has to know that.
PROMPT_LENGTHS = (8, 16, 32, 64, 128)
#: The longest prompt, in tokens, that is used whole.
LONGEST_PROMPT = 256
# Samples between two reports of progress.
_SAMPLES_AT_ONCE = 16
# Seconds that a worker which was asked to stop waits for statistics that are still on their way.
_LAST_WAIT_SECONDS = 5.0
_TICK_SECONDS = 0.2
_KINDS: tuple[StatisticsKind, ...] = ("prompts", "moments")
_log = structlog.get_logger("fedmoe.worker")

#: Tokens of a sample, and how many of the first are a prompt, rising.
Prompt = tuple[Sequence[int], tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class DataStatistics:
    """What one worker discloses; as bytes: `prompts` some MB at most, `moments` about as many as the expert.

    `samples` and `tokens` are what the data hold, of which the statistics rest on `prompts.count` and `moments.tokens`.
    """

    prompts: PromptStatistics
    moments: InputMoments
    samples: int
    tokens: int

    def to_bytes(self) -> dict[StatisticsKind, bytes]:
        """Kind of statistic -> safetensors."""
        return {"prompts": self.prompts.to_bytes(), "moments": self.moments.to_bytes()}


@dataclass(frozen=True, slots=True)
class StatisticsBudget:
    """At most about so many tokens for prompts, which a quarter of the layers are run for, and for moments.

    Tokens of moments are measured, a budget of prompts lies between two that are (about 250 texts beside 96 and 500);
    see `benchmarks/README.md`. A token of moments costs about ten of prompts.
    """

    prompt_tokens: int = 32_000
    tokens: int = 2_048


def data_statistics(
    base: LoadedBase,
    blocks: Sequence[Block],
    targets: Sequence[str] | str,
    budget: StatisticsBudget | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DataStatistics:
    """The statistics of packed training blocks on a bare base model (call it before an adapter is attached).

    Blocks are taken in order until the budget is used up; `pack` has shuffled them. `LEAST_PROMPTS` prompts and one
    block are used, however small the budget. `progress` gets the tokens done so far and their final number. Raises
    ValueError for blocks with fewer samples.
    """
    allowed = budget or StatisticsBudget()
    tokens = sum(map(_moment_tokens, blocks))
    chosen = sample_prompts(base, blocks, allowed.prompt_tokens)
    of_prompts, of_moments = sum(lengths[-1] for _, lengths in chosen), min(tokens, allowed.tokens)
    total = of_prompts + of_moments
    prompts = prompt_statistics(base, chosen, lambda done: progress(done, total))
    used = 0
    with MomentsCollector(base, targets) as collector:
        for block in blocks:
            collector.add(collate([block]))
            used += _moment_tokens(block)
            progress(of_prompts + min(used, of_moments), total)
            if used >= allowed.tokens:
                break
    return DataStatistics(prompts, collector.moments(), sum(1 for _ in _samples(blocks)), tokens)


def prompt_statistics(
    base: LoadedBase, chosen: Sequence[Prompt], progress: Callable[[int], None] = lambda done: None
) -> PromptStatistics:
    """The statistics of prompts; `progress` gets the tokens done so far."""
    parts: list[FloatMatrix] = []
    used = 0
    for start in range(0, len(chosen), _SAMPLES_AT_ONCE):
        ids, lengths = zip(*chosen[start : start + _SAMPLES_AT_ONCE], strict=True)
        parts.append(prefix_features(base, ids, lengths))
        used += sum(prefixes[-1] for prefixes in lengths)
        progress(used)
    of_row = [sample for sample, (_, prefixes) in enumerate(chosen) for _ in prefixes]
    return PromptStatistics.of(np.concatenate(parts), of_row)


def _moment_tokens(block: Block) -> int:
    """Tokens that moments are made of: none of a block without a label, which has no gradient."""
    return int(np.count_nonzero(block.segment_ids >= 0)) if (block.labels != MASKED).any() else 0


def sample_prompts(base: LoadedBase, blocks: Sequence[Block], tokens: int) -> list[Prompt]:
    """The prompts in `blocks`: until about `tokens` tokens are used, but not fewer than `LEAST_PROMPTS`.

    A sample whose beginning carries no loss (a question with its answer) gives that beginning, up to `LONGEST_PROMPT`
    tokens and without the chat template's frame. Other samples (running text) give their first `PROMPT_LENGTHS` tokens,
    all out of one pass. Raises ValueError where there are not `LEAST_PROMPTS` samples of at least two tokens.
    """
    chosen: list[Prompt] = []
    frame = ChatFrame.of(base.tokenizer)
    used = 0
    for ids, labels in _samples(blocks):
        if used >= tokens and len(chosen) >= LEAST_PROMPTS:
            break
        prompt, lengths = _prompts(ids, labels, frame)
        if lengths:
            chosen.append((prompt, lengths))
            used += lengths[-1]
    if len(chosen) < LEAST_PROMPTS:
        raise ValueError(
            f"statistics are made of at least {LEAST_PROMPTS} samples of two tokens or more, there are {len(chosen)}; "
            "give the worker more data, or let it send none"
        )
    return chosen


def _samples(blocks: Sequence[Block]) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Tokens and labels of every sample, in the blocks' order."""
    for block in blocks:
        for segment in range(int(block.segment_ids.max()) + 1):
            inside = block.segment_ids == segment
            yield block.input_ids[inside], block.labels[inside]


def _prompts(ids: Int64Array, labels: Int64Array, frame: ChatFrame) -> tuple[Sequence[int], tuple[int, ...]]:
    """A sample's tokens, and how many of the first are a prompt, rising; no number for a sample that is too short."""
    learned = np.flatnonzero(labels != MASKED)
    # The first token never carries loss, so in running text the second is the first that does.
    beginning = int(learned[0]) if learned.size else len(labels)
    if beginning > 1:
        prompt = frame.removed(ids[:beginning].tolist())[:LONGEST_PROMPT]
        return prompt, (len(prompt),)
    lengths = tuple(length for length in PROMPT_LENGTHS if length <= len(labels))
    return ids.tolist(), lengths or ((len(labels),) if len(labels) > 1 else ())


def statistics_key(base: LoadedBase, blocks: Sequence[Block], targets: Sequence[str] | str) -> str:
    """A hash of all that statistics follow from: base model and its precision, data, adapted modules, and this code."""
    made_of = [__version__, base.identity.weights_hash, str(base.dtype), targets]
    key = hashlib.sha256(json.dumps(made_of).encode())
    for block in blocks:
        for array in (block.input_ids, block.labels, block.segment_ids):
            key.update(array.tobytes())
    return key.hexdigest()[:32]


def read_cached(folder: Path, key: str) -> dict[StatisticsKind, bytes]:
    """The statistics cached under this key, by kind; empty unless all are there, can be read and are undamaged."""
    bodies: dict[StatisticsKind, bytes] = {}
    for kind in _KINDS:
        for file in folder.glob(f"{kind}-{key}-*.safetensors"):
            try:
                body = file.read_bytes()
            except OSError as error:
                _log.warning("kept_statistics_unreadable", file=str(file), reason=str(error))
                continue
            if file.name == _name(kind, key, body):
                bodies[kind] = body
            else:
                _log.warning("kept_statistics_damaged", file=str(file))
    return bodies if len(bodies) == len(_KINDS) else {}


def write_cached(folder: Path, key: str, bodies: Mapping[StatisticsKind, bytes]) -> None:
    """Cache these and no others; a disk that takes none is logged, since training does not need them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in folder.iterdir():
            file.unlink()
        for kind, body in bodies.items():
            write_atomic(folder / _name(kind, key, body), body)
    except OSError as error:
        _log.warning("statistics_not_kept", reason=str(error))


def _name(kind: StatisticsKind, key: str, body: bytes) -> str:
    return f"{kind}-{key}-{hashlib.sha256(body).hexdigest()[:32]}.safetensors"


class StatisticsSender:
    """Sends the statistics of a worker's data once; while the coordinator is away, again and again, as updates are.

    A refusal is logged and ends it. The thread is a daemon: a worker that must leave leaves.
    """

    def __init__(
        self, client: CoordinatorClient, expert: str, worker: str, statistics: Mapping[StatisticsKind, bytes]
    ) -> None:
        self._client = client
        self._waiting = [
            (DataStatisticsHeader(expert=expert, worker=worker, kind=kind), body) for kind, body in statistics.items()
        ]
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedmoe-disclosure", daemon=True)

    def start(self) -> None:
        """Begin to send; the expert must be registered already."""
        self._thread.start()

    def finish(self, seconds: float, stopped: Callable[[], bool]) -> None:
        """Wait for what is on its way, then try no more: `seconds`, as for an update, or little once `stopped`.

        What was not taken by then is logged: the gateway is made without it.
        """
        deadline = time.monotonic() + seconds
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(_TICK_SECONDS)
            if stopped():
                deadline = min(deadline, time.monotonic() + _LAST_WAIT_SECONDS)
        if self._thread.is_alive():
            _log.warning("statistics_not_sent", reason="the coordinator did not take them; the next start sends them")
        self.close()

    def close(self) -> None:
        """Try no more."""
        self._closed.set()

    def _run(self) -> None:
        while self._waiting:
            header, body = self._waiting.pop(0)  # let go of once sent: as large as an adapter
            try:
                if until_answered(partial(self._client.push_data_statistics, header, body), self._closed) is not None:
                    _log.info("statistics_sent", kind=header.kind, size=len(body))
            except RefusedError as error:
                _log.warning("statistics_refused", kind=header.kind, code=error.code, reason=str(error))
            except Exception as error:
                # The client may be closed under a call that was on its way when the worker left.
                if not self._closed.is_set():
                    _log.warning("statistics_not_sent", kind=header.kind, reason=repr(error))
                return
