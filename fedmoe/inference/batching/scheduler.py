"""Continuous batching on our own engine: one thread computes, rows join and leave between two tokens.

All rows are in one batch, each with its own adapter. A row's tokens do not depend on who else is in the batch (up to
the last bits of the logits), and a version stays in the model until the last row that uses it is out of the batch.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, defaultdict, deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress

import structlog
import torch

from fedmoe.inference.backend import BackendError, Generation, ServedModel, Step
from fedmoe.inference.batching.kv_slots import KVSlots, compaction
from fedmoe.inference.batching.sampler import BatchRow, draw
from fedmoe.lora.adapter import Adapter, ShapeError
from fedmoe.models.base import LoadedBase, stop_tokens
from fedmoe.models.final_logits import check_causal_model, logits_of
from fedmoe.models.multilora import DecodingRows, MultiLora, UnknownAdapterError
from fedmoe.models.sampling import SampleSpec, SamplingLimits, read_prompts
from fedmoe.models.text_likelihood import log_likelihoods

_log = structlog.get_logger("fedmoe.serve")

#: Tokens of prompts read between two steps: enough to be fast, few enough that nobody waits for seconds.
_PROMPT_TOKENS = 4096

_Queue = asyncio.Queue[Step | BackendError]


class _Listened(BatchRow):
    """A row that somebody in an event loop listens to."""

    def __init__(self, wanted: Generation, stop: frozenset[int], loop: asyncio.AbstractEventLoop) -> None:
        self.queue: _Queue = asyncio.Queue()
        self.loop = loop
        super().__init__(wanted, stop)


class TransformersBackend:
    """A `Backend` in this process: the base model with all adapters, at most `rows` generations in one batch.

    `modules` are the linear layers that the federation's adapters adapt.
    """

    def __init__(self, base: LoadedBase, modules: Sequence[str], rows: int = 16) -> None:
        check_causal_model(base.model)
        self._model = base.model
        self._multi = MultiLora(base.model, modules)
        self._stop_tokens = stop_tokens(base)
        self._most = rows
        self._changed = threading.Condition()
        self._loaded: set[ServedModel] = set()
        self._users: Counter[ServedModel | None] = Counter()
        self._waiting: deque[_Listened] = deque()
        self._rows: list[_Listened] = []
        self._slots = KVSlots(base.device)
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    def load(self, model: ServedModel, adapter: Adapter) -> None:
        """Make a version available; generations under way are not held up."""
        with self._changed:
            if model in self._loaded:
                raise BackendError(f"{model} is loaded already; a version is loaded once and never changes")
        try:
            self._multi.add(str(model), adapter)
        except ShapeError as error:
            raise BackendError(f"{model} cannot be served: {error}") from error
        with self._changed:
            self._loaded.add(model)

    def unload(self, model: ServedModel) -> None:
        """Let a version go once no row uses it."""
        with self._changed:
            if model not in self._loaded:
                raise BackendError(f"{model} is not loaded; loaded: {_listed(self._loaded)}")
            self._loaded.remove(model)
            self._changed.wait_for(lambda: self._users[model] == 0)
        self._multi.remove(str(model))

    def loaded(self) -> frozenset[ServedModel]:
        """What can be generated with."""
        with self._changed:
            return frozenset(self._loaded)

    def log_likelihoods(self, text: Sequence[int], models: Sequence[ServedModel]) -> list[float]:
        """One batch, beside the one in which the model generates."""
        try:
            found: list[float] = log_likelihoods(self._model, self._multi, text, [str(model) for model in models])
        except UnknownAdapterError as error:
            raise BackendError(str(error)) from error
        return found

    def busy(self) -> tuple[int, int]:
        """How many rows are in the batch, and how many wait."""
        return len(self._rows), len(self._waiting)

    async def generate(self, wanted: Generation) -> AsyncGenerator[Step, None]:
        """The tokens as they come."""
        row = _Listened(wanted, self._stop_tokens, asyncio.get_running_loop())
        self._enter(row)
        try:
            while True:
                item = await row.queue.get()
                if isinstance(item, BackendError):
                    raise item
                yield item
                if item.finish is not None:
                    return
        finally:
            self._give_up(row)

    def close(self) -> None:
        """Give up all generations and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        self._multi.detach()

    def _enter(self, row: _Listened) -> None:
        model = row.wanted.model
        with self._changed:
            if self._closed:
                raise BackendError("the server is stopping")
            if model is not None and model not in self._loaded:
                raise BackendError(f"{model} is not loaded; loaded: {_listed(self._loaded)}")
            self._users[model] += 1
            self._waiting.append(row)
            self._changed.notify_all()

    def _give_up(self, row: _Listened) -> None:
        """A row in the batch is dropped before the next step; one that waits is gone at once."""
        row.given_up = True
        with self._changed:
            if row not in self._waiting:
                return
            self._waiting.remove(row)
        self._leave([row])

    def _leave(self, rows: Sequence[_Listened]) -> None:
        """These rows are out of the batch: their versions may go."""
        with self._changed:
            for row in rows:
                self._users[row.wanted.model] -= 1
            self._changed.notify_all()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _run(self) -> None:
        while self._await_work():
            try:
                self._admit()
                self._decode()
            except Exception as error:  # whatever it is, those who wait must hear of it and the server goes on
                _log.error("batch_failed", error=repr(error), rows=len(self._rows))
                self._fail_all(f"the batch failed: {type(error).__name__}: {error}")
        self._fail_all("the server is stopping")

    def _await_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or self._rows)
            return not self._closed

    def _fail_all(self, why: str) -> None:
        with self._changed:
            left = [*self._rows, *self._waiting]
            self._waiting.clear()
        self._rows = []
        self._slots.keep([])
        _tell((row, BackendError(why)) for row in left)
        self._leave(left)

    def _admit(self) -> None:
        """Read the prompts of those who wait and fit, and draw their first tokens."""
        joining, dropped = self._next_to_join()
        self._leave(dropped)
        if not joining:
            return
        try:
            # Of these only prompt and adapter count here: nothing is drawn by them.
            wanted = [SampleSpec(row.adapter, row.wanted.prompt, 1, 0.0, 0) for row in joining]
            prompts = read_prompts(self._model, self._multi, wanted, 0, SamplingLimits(prompt_tokens=_PROMPT_TOKENS))
            broken = draw(prompts.logits, joining)
        except BaseException:
            # Not in the batch yet: `_fail_all` has to find them.
            with self._changed:
                self._waiting.extendleft(reversed(joining))
            raise
        going, ended = _sorted(joining, broken)
        if going:
            chosen = torch.tensor(going, device=self._multi.device)
            self._slots.join(
                [(layer.keys[chosen], layer.values[chosen]) for layer in prompts.layers],
                [len(joining[index].wanted.prompt) for index in going],
                [joining[index].room for index in going],
            )
        self._rows += [joining[index] for index in going]
        self._leave([joining[index] for index in ended])

    def _next_to_join(self) -> tuple[list[_Listened], list[_Listened]]:
        """Who joins now, in the order they came: as many as there is room for, and one long prompt at a time."""
        joining: list[_Listened] = []
        dropped: list[_Listened] = []
        tokens = 0
        with self._changed:
            while self._waiting and len(self._rows) + len(joining) < self._most:
                row = self._waiting[0]
                tokens += len(row.wanted.prompt)
                if joining and tokens > _PROMPT_TOKENS:
                    break
                (dropped if row.given_up else joining).append(self._waiting.popleft())
        return joining, dropped

    def _decode(self) -> None:
        """Token after token until somebody can join, nobody is left, or the server stops."""
        if not self._rows:
            return
        with self._multi.decoding_rows([row.adapter for row in self._rows]) as decoding:
            while True:
                self._drop(frozenset(i for i, row in enumerate(self._rows) if row.given_up), decoding)
                if not self._rows:
                    return
                self._step(decoding)
                if not self._rows or self._closed or (self._waiting and len(self._rows) < self._most):
                    return

    def _step(self, decoding: DecodingRows) -> None:
        tokens = torch.tensor([[row.tokens[-1]] for row in self._rows], device=self._multi.device)
        looks, positions = self._slots.advance()
        hidden = self._model.get_decoder()(
            input_ids=tokens,
            attention_mask=looks,
            position_ids=positions,
            past_key_values=self._slots.cache,
            use_cache=True,
        ).last_hidden_state
        broken = draw(logits_of(self._model, hidden[:, 0]), self._rows)
        _, ended = _sorted(self._rows, broken)
        self._drop(frozenset(ended), decoding)

    def _drop(self, left: frozenset[int], decoding: DecodingRows) -> None:
        if not left:
            return
        gone = [self._rows[row] for row in left]
        kept = compaction(len(self._rows), left)
        self._rows = [self._rows[row] for row in kept]
        self._slots.keep(kept)
        if kept:
            decoding.keep(torch.tensor(kept, device=self._multi.device))
        self._leave(gone)


def _sorted(rows: Sequence[_Listened], broken: frozenset[int]) -> tuple[list[int], list[int]]:
    """Tell everybody their token; which rows go on, and which do not."""
    why = "the numbers of {} are not finite for this prompt; its weights have overflowed"
    told: list[tuple[_Listened, Step | BackendError]] = []
    for index, row in enumerate(rows):
        told.append((row, BackendError(why.format(row.adapter or "the base model")) if index in broken else row.step()))
    _tell(told)
    ended = [index for index, row in enumerate(rows) if index in broken or row.finish is not None]
    return [index for index in range(len(rows)) if index not in frozenset(ended)], ended


def _tell(items: Iterable[tuple[_Listened, Step | BackendError]]) -> None:
    """Put every item into its row's queue; one call into an event loop for all its rows."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[tuple[_Queue, Step | BackendError]]] = defaultdict(list)
    for row, item in items:
        by_loop[row.loop].append((row.queue, item))
    for loop, pairs in by_loop.items():
        # A loop that is closed has no listeners left.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_put, pairs)


def _put(pairs: Sequence[tuple[_Queue, Step | BackendError]]) -> None:
    for queue, item in pairs:
        queue.put_nowait(item)


def _listed(models: Iterable[ServedModel]) -> str:
    return ", ".join(str(model) for model in sorted(models)) or "none"
