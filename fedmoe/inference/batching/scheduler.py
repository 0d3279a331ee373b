"""Continuous batching in this process: one thread computes what the batch plan says, token after token.

All rows are in one batch, each with its own adapter. A row's tokens do not depend on who else is in the batch (up to
the last bits of the logits), and a version stays in the model until the last row that uses it is out of the batch.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import suppress

import structlog
import torch

from fedmoe.inference.backend import BackendError, ContinuationRequest, DecodingStep, ServedModel
from fedmoe.inference.batching.kv_slots import KVSlots
from fedmoe.inference.batching.plan import BatchPlan, ended_rows
from fedmoe.inference.batching.sampler import BatchRow, draw
from fedmoe.lora.adapter import Adapter, ShapeError
from fedmoe.models.base import LoadedBase, stop_tokens
from fedmoe.models.final_logits import check_causal_model, logits_of
from fedmoe.models.multilora import DecodingRows, MultiLora, UnknownAdapterError
from fedmoe.models.policy_logprobs import log_likelihoods
from fedmoe.models.sampling import SampleSpec, SamplingLimits, read_prompts

_log = structlog.get_logger("fedmoe.serve")

#: Tokens of prompts read between two steps: enough to be fast, few enough that nobody waits for seconds.
_PROMPT_TOKENS = 4096

_Queue = asyncio.Queue[DecodingStep | BackendError]
_Delivery = tuple[_Queue, DecodingStep | BackendError]


class _StreamedRow(BatchRow):
    """A row whose tokens go to a queue of an event loop."""

    def __init__(self, request: ContinuationRequest, stop: frozenset[int], loop: asyncio.AbstractEventLoop) -> None:
        self.queue: _Queue = asyncio.Queue()
        self.loop = loop
        super().__init__(request, stop)


class TransformersBackend:
    """A `Backend` in this process: the base model with all adapters, at most `rows` generations in one batch.

    `modules` are the linear layers that the federation's adapters adapt.
    """

    def __init__(self, base: LoadedBase, modules: Sequence[str], rows: int = 16) -> None:
        check_causal_model(base.model)
        self._model = base.model
        self._multi = MultiLora(base.model, modules)
        self._stop_tokens = stop_tokens(base)
        self._changed = threading.Condition()
        self._loaded: set[ServedModel] = set()
        self._users: Counter[ServedModel | None] = Counter()
        self._plan: BatchPlan[_StreamedRow] = BatchPlan(rows, _PROMPT_TOKENS)
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
        """Unload a version once no row uses it."""
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

    def log_likelihoods(self, pairs: Sequence[tuple[Sequence[int], ServedModel]]) -> list[float]:
        """In batches of their own, beside the one in which the model generates."""
        named = [(text, str(model)) for text, model in pairs]
        try:
            likelihoods: list[float] = log_likelihoods(self._model, self._multi, named)
        except UnknownAdapterError as error:
            raise BackendError(str(error)) from error
        return likelihoods

    def busy(self) -> tuple[int, int]:
        """How many rows are in the batch, and how many wait."""
        return len(self._plan.rows), len(self._plan.waiting)

    async def generate(self, request: ContinuationRequest) -> AsyncGenerator[DecodingStep, None]:
        """The tokens as they come."""
        row = _StreamedRow(request, self._stop_tokens, asyncio.get_running_loop())
        with self._changed:
            if self._closed:
                raise BackendError("the server is stopping")
            if request.model is not None and request.model not in self._loaded:
                raise BackendError(f"{request.model} is not loaded; loaded: {_listed(self._loaded)}")
            self._users[request.model] += 1
            self._plan.waiting.append(row)
            self._changed.notify_all()
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

    def _give_up(self, row: _StreamedRow) -> None:
        """A row in the batch is dropped before the next step; one that waits is gone at once."""
        row.given_up = True
        with self._changed:
            if row not in self._plan.waiting:
                return
            self._plan.waiting.remove(row)
        self._release([row])

    def _release(self, rows: Sequence[_StreamedRow]) -> None:
        """Release the versions of rows that are no longer computed."""
        with self._changed:
            for row in rows:
                self._users[row.request.model] -= 1
            self._changed.notify_all()

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._plan.waiting or self._plan.rows)
            if self._closed:
                break
            try:
                self._admit()
                self._decode()
            except Exception as error:  # whatever it is, those who wait must hear of it and the server goes on
                _log.error("batch_failed", error=repr(error), rows=len(self._plan.rows))
                self._fail_all(f"the batch failed: {type(error).__name__}: {error}")
        self._fail_all("the server is stopping")

    def _fail_all(self, why: str) -> None:
        with self._changed:
            dropped = self._plan.clear()
        self._slots.keep([])
        _send((row, BackendError(why)) for row in dropped)
        self._release(dropped)

    def _admit(self) -> None:
        """Read the prompts of the rows that join, and draw their first tokens."""
        with self._changed:
            joining, dropped = self._plan.take_joining()
        self._release(dropped)
        if not joining:
            return
        try:
            # Of these only prompt and adapter count here: nothing is drawn by them.
            specs = [SampleSpec(row.adapter, row.request.prompt, 1, 0.0, 0) for row in joining]
            prompts = read_prompts(self._model, self._multi, specs, 0, SamplingLimits(prompt_tokens=_PROMPT_TOKENS))
            broken = draw(prompts.logits, joining)
        except BaseException:
            # Not in the batch yet: `_fail_all` has to find them.
            with self._changed:
                self._plan.put_back(joining)
            raise
        ended = _deliver(joining, broken)
        running = [place for place in range(len(joining)) if place not in ended]
        if running:
            chosen = torch.tensor(running, device=self._multi.device)
            self._slots.join(
                [(layer.keys[chosen], layer.values[chosen]) for layer in prompts.cache.layers],
                [len(joining[place].request.prompt) for place in running],
                [joining[place].room for place in running],
            )
        self._plan.rows += [joining[place] for place in running]
        self._release([joining[place] for place in ended])

    def _decode(self) -> None:
        """Token after token until a row can join, none is left, or the server stops."""
        plan = self._plan
        if not plan.rows:
            return
        with self._multi.decoding_rows([row.adapter for row in plan.rows]) as decoding:
            while True:
                self._drop(plan.given_up(), decoding)
                if not plan.rows:
                    return
                tokens = torch.tensor([[row.tokens[-1]] for row in plan.rows], device=self._multi.device)
                looks, positions = self._slots.advance()
                hidden = self._model.get_decoder()(
                    input_ids=tokens,
                    attention_mask=looks,
                    position_ids=positions,
                    past_key_values=self._slots.cache,
                    use_cache=True,
                ).last_hidden_state
                broken = draw(logits_of(self._model, hidden[:, 0]), plan.rows)
                self._drop(_deliver(plan.rows, broken), decoding)
                if not plan.rows or self._closed or plan.has_room:
                    return

    def _drop(self, places: frozenset[int], decoding: DecodingRows) -> None:
        if not places:
            return
        leaving, staying = self._plan.leave(places)
        self._slots.keep(staying)
        if staying:
            decoding.keep(torch.tensor(staying, device=self._multi.device))
        self._release(leaving)


def _deliver(rows: Sequence[_StreamedRow], broken: frozenset[int]) -> frozenset[int]:
    """Send each row its token, or why it has none; the places of the rows that are finished."""
    why = "the numbers of {} are not finite for this prompt; its weights have overflowed"
    _send(
        (row, BackendError(why.format(row.adapter or "the base model")) if place in broken else row.step())
        for place, row in enumerate(rows)
    )
    return ended_rows(rows, broken)


def _send(items: Iterable[tuple[_StreamedRow, DecodingStep | BackendError]]) -> None:
    """Put every item into its row's queue; one call into an event loop for all its rows."""
    by_loop: defaultdict[asyncio.AbstractEventLoop, list[_Delivery]] = defaultdict(list)
    for row, item in items:
        by_loop[row.loop].append((row.queue, item))
    for loop, deliveries in by_loop.items():
        # A loop that is closed has no listeners left.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(_put, deliveries)


def _put(deliveries: Sequence[_Delivery]) -> None:
    for queue, item in deliveries:
        queue.put_nowait(item)


def _listed(models: Iterable[ServedModel]) -> str:
    return ", ".join(str(model) for model in sorted(models)) or "none"
