"""Prompts to `auto` that wait to be routed: those that came meanwhile are looked at together, in one thread."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from fedmoe.gateway.routers import ExpertCandidates, choose
from fedmoe.gateway.serve.auto_model import PromptRouter
from fedmoe.gateway.serve.catalogue import AUTO, GATEWAY, Catalogue
from fedmoe.gateway.serve.problems import ApiError
from fedmoe.inference.backend import Backend, BackendError, ServedModel

Prompt = tuple[int, ...]
#: Prompts that are looked at together: a pass over them takes memory and processors from the answers under way, and
#: how much must not depend on how many ask.
MOST_PROMPTS = 32


class RoutingQueue:
    """Routes prompts in the order they came; `missing` makes the error for a model that is not served.

    `choose` belongs to one event loop.
    """

    def __init__(
        self, backend: Backend, catalogue: Catalogue, router: PromptRouter, missing: Callable[[str], ApiError]
    ) -> None:
        self._backend, self._catalogue, self._router, self._missing = backend, catalogue, router, missing
        self._waiting: deque[tuple[Prompt, asyncio.Future[str]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="routing")
        self._pump: asyncio.Task[None] | None = None

    def close(self) -> None:
        """Route no further prompt; waits for those that are being routed."""
        self._thread.shutdown(cancel_futures=True)

    async def choose(self, prompt: Prompt) -> str:
        """Who answers this prompt; one whose caller is cancelled while it waits is not looked at.

        Raises `ApiError` where a likely expert is not served, and `BackendError`.
        """
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._waiting.append((prompt, answer))
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._route_waiting())
        return await answer

    async def _route_waiting(self) -> None:
        loop = asyncio.get_running_loop()
        while batch := self._take():
            answers: Sequence[str | Exception]
            try:
                answers = await loop.run_in_executor(self._thread, self.route, [prompt for prompt, _ in batch])
            except Exception as error:  # whatever it is, those who wait must hear of it
                answers = [error] * len(batch)
            for (_, answer), given in zip(batch, answers, strict=True):
                if answer.done():
                    continue
                if isinstance(given, Exception):
                    answer.set_exception(given)
                else:
                    answer.set_result(given)

    def _take(self) -> list[tuple[Prompt, asyncio.Future[str]]]:
        batch: list[tuple[Prompt, asyncio.Future[str]]] = []
        while self._waiting and len(batch) < MOST_PROMPTS:
            prompt, answer = self._waiting.popleft()
            if not answer.done():
                batch.append((prompt, answer))
        return batch

    def route(self, prompts: Sequence[Prompt]) -> list[str | Exception]:
        """Who answers each prompt: a likely expert, or the gateway where there is one; or why nobody does."""
        looked = self._router.candidates(prompts)
        if looked is None:  # the experts have gone since the requests were admitted
            return [AUTO] * len(prompts)
        with ExitStack() as leases:
            models: dict[str, ServedModel] = {}
            merged = {GATEWAY} & self._catalogue.snapshot.models.keys()
            for name in dict.fromkeys([*(name for each in looked for name in each.log_priors), *merged]):
                try:
                    models[name] = leases.enter_context(self._catalogue.lease(name))[0]
                except KeyError:
                    # Only the prompts that it may answer hear of it.
                    continue
            return self._chosen(looked, models, merged)

    def _chosen(
        self, looked: Sequence[ExpertCandidates], models: dict[str, ServedModel], merged: set[str]
    ) -> list[str | Exception]:
        """By the second look, all prompts and models in one call."""
        names = [[*each.log_priors, *merged] for each in looked]
        served = [all(name in models for name in of_prompt) for of_prompt in names]
        pairs = [
            (each.text, models[name])
            for each, of_prompt, there in zip(looked, names, served, strict=True)
            if there and len(of_prompt) > 1
            for name in of_prompt
        ]
        likelihoods = iter(self._backend.log_likelihoods(pairs) if pairs else [])
        answers: list[str | Exception] = []
        for each, of_prompt, there in zip(looked, names, served, strict=True):
            if not there:
                answers.append(self._missing(next(name for name in of_prompt if name not in models)))
                continue
            # One alone needs no second look.
            own = {name: next(likelihoods) if len(of_prompt) > 1 else 0.0 for name in of_prompt}
            try:
                answers.append(choose(each, own, GATEWAY))
            except ValueError as error:
                why = f"this prompt cannot be routed: {error}; an adapter's weights have overflowed"
                answers.append(BackendError(why))
        return answers
