"""One request's way: a place in the house, a version, its generations, and everything given back at the end.

Everything here runs in the event loop, so nothing needs a lock; only prompts to `auto` are looked at in a thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack, aclosing, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from fedmoe.gateway.rerank import chosen
from fedmoe.gateway.serve.catalogue import AUTO, BASE, GATEWAY, Catalogue
from fedmoe.gateway.serve.counters import Counters
from fedmoe.gateway.serve.problems import ApiError
from fedmoe.gateway.serve.router import Router
from fedmoe.gateway.serve.text import PromptEncoder, StopStringFilter, TextStream
from fedmoe.inference.backend import Backend, BackendError, Finish, Generation, Sampling, ServedModel, Step
from fedmoe.lora.manifest import BaseModel


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for, and how many generations may be in the house, computed or waiting."""

    prompt_tokens: int = 2048
    output_tokens: int = 1024
    generations: int = 128


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What a request wants: every prompt `n` times, all from one model; `seed` None leaves the draw to chance."""

    model: str
    prompts: tuple[tuple[int, ...], ...]
    n: int
    most_new_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    alternatives: int | None
    stops: tuple[str, ...]

    @property
    def choices(self) -> int:
        """How many continuations that makes."""
        return self.n * len(self.prompts)


@dataclass(frozen=True, slots=True)
class Origin:
    """Who made an answer: the fields that every answer carries. `gateway_version` is that of the same moment."""

    model: str
    version: int
    digest: str
    base: str
    gateway_version: int | None

    def headers(self) -> dict[str, str]:
        """The same as HTTP headers."""
        return {
            "x-fedmoe-model": self.model,
            "x-fedmoe-version": str(self.version),
            "x-fedmoe-digest": self.digest,
        }


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one choice's text, the steps it is made of, and why the choice ended if it did."""

    text: str
    steps: tuple[Step, ...]
    finish: Finish | None


@dataclass
class Usage:
    """Tokens read and generated."""

    prompt: int = 0
    completion: int = 0

    def body(self) -> dict[str, int]:
        """As the OpenAI interface tells it."""
        total = self.prompt + self.completion
        return {"prompt_tokens": self.prompt, "completion_tokens": self.completion, "total_tokens": total}


class Service:
    """Answers requests from what the catalogue serves; `random_seed` is asked where a request brings none.

    Where the `router` has no two experts to choose between there is no model `auto`.
    """

    def __init__(
        self,
        backend: Backend,
        catalogue: Catalogue,
        prompter: PromptEncoder,
        base: BaseModel,
        limits: Limits,
        router: Router,
        random_seed: Callable[[], int],
    ) -> None:
        self.backend = backend
        self.catalogue = catalogue
        self.prompter = prompter
        self.base = base
        self.limits = limits
        self.counters = Counters()
        self._router = router
        self._random_seed = random_seed
        self._in_house = 0
        # One prompt after the other: a pass over it takes memory and processors from the answers under way, and how
        # much must not depend on how many ask.
        self._routing = ThreadPoolExecutor(1, thread_name_prefix="routing")

    def close(self) -> None:
        """Let no prompt be looked at any more; waits for the one that is."""
        self._routing.shutdown(cancel_futures=True)

    def names(self) -> list[str]:
        """Everything that can be asked for."""
        served = self.catalogue.snapshot.models
        routed = [AUTO] if self._routes() else []
        return [*routed, BASE, *sorted(served)]

    def _routes(self) -> bool:
        return len(self._router.experts) > 1

    @contextmanager
    def _place(self, choices: int) -> Iterator[None]:
        if self._in_house + choices > self.limits.generations:
            raise ApiError(
                429,
                "server_busy",
                f"{self._in_house} generations are under way or wait, at most {self.limits.generations} may; "
                f"{choices} more do not fit now: try again in a moment",
                retry_after=1,
            )
        self._in_house += choices
        try:
            yield
        finally:
            self._in_house -= choices

    async def begin(self, asked: GenerationRequest) -> ActiveRequest:
        """Take the request in: from now on it has a place and a version; use the result as a context.

        A request that is cancelled while others are routed before it is not routed any more.
        """
        async with AsyncExitStack() as stack:
            stack.enter_context(self._place(asked.choices))
            name = await self._routed(asked)
            try:
                model, origin = self._origin(name, stack)
            except KeyError:
                raise self._missing(asked.model, name) from None
            answering = ActiveRequest(self, asked, origin, model, stack.pop_all())
        self.counters.prompt_tokens += answering.usage.prompt
        return answering

    async def _routed(self, asked: GenerationRequest) -> str:
        if asked.model != AUTO or not self._routes():
            return asked.model
        if len(asked.prompts) != 1:
            raise ApiError(400, "one_prompt_only", "a request to auto has one prompt; send one request each", "prompt")
        return await asyncio.get_running_loop().run_in_executor(self._routing, self._chosen, asked.prompts[0])

    def _chosen(self, prompt: tuple[int, ...]) -> str:
        """Who answers this prompt: one of the likely experts, or the gateway where there is one."""
        found = self._router.candidates(prompt)
        if found is None:  # the experts have gone since the request was taken in
            return AUTO
        merged = [GATEWAY] if GATEWAY in self.catalogue.snapshot.models else []
        names = [*found.log_priors, *merged]
        with ExitStack() as held:
            try:
                models = [held.enter_context(self.catalogue.lease(name))[0] for name in names]
            except KeyError as error:
                raise self._missing(AUTO, error.args[0]) from None
            likelihoods = self.backend.log_likelihoods(found.text, models) if len(models) > 1 else [0.0]
        try:
            return chosen(found, dict(zip(names, likelihoods, strict=True)), GATEWAY)
        except ValueError as error:
            raise BackendError(f"this prompt cannot be routed: {error}; somebody's weights have overflowed") from error

    def _missing(self, asked: str, name: str) -> ApiError:
        """What to say where `name` is not served: a client that asked `auto` did not choose it, and may ask again."""
        there = ", ".join(self.names())
        if asked == name:
            return ApiError(404, "model_not_found", f"there is no model {name!r}; there are: {there}", "model")
        why = f"this prompt may belong to {name!r}, which is not served now; there are: {there}"
        return ApiError(503, "routed_model_missing", why)

    def _origin(self, name: str, stack: AsyncExitStack) -> tuple[ServedModel | None, Origin]:
        """Who answers, kept in `stack`; raises KeyError for a name that is not served."""
        snapshot = self.catalogue.snapshot
        if name == BASE:
            return None, Origin(BASE, 0, self.base.weights_hash, self.base.weights_hash, snapshot.gateway_version)
        model, snapshot = stack.enter_context(self.catalogue.lease(name))
        return model, Origin(name, model.version, model.digest, self.base.weights_hash, snapshot.gateway_version)


@dataclass
class ActiveRequest:
    """A request under way; leaving the context gives up what is still generated, then the version and the place."""

    service: Service
    asked: GenerationRequest
    origin: Origin
    model: ServedModel | None
    held: AsyncExitStack
    usage: Usage = field(init=False)
    ended: str = "broken_off"

    def __post_init__(self) -> None:
        self.usage = Usage(sum(len(prompt) for prompt in self.asked.prompts))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        counters = self.service.counters
        counters.requests[self.origin.model, self.ended] += 1
        counters.completion_tokens += self.usage.completion
        await self.held.aclose()

    async def pieces(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Pieces of all choices as they come, with the number of their choice; close it before leaving the context."""
        streams = [self._choice(index) for index in range(self.asked.choices)]
        async with aclosing(_merged(streams)) as merged:
            async for index, piece in merged:
                self.usage.completion += len(piece.steps)
                yield index, piece
        self.ended = "complete"
        # Before the client can know that it has everything: its next request must find the place free.
        await self.held.aclose()

    async def _choice(self, index: int) -> AsyncGenerator[Chunk, None]:
        """One continuation up to its first stop string."""
        text, watch = TextStream(self.service.prompter), StopStringFilter(self.asked.stops)
        wanted = Generation(self.model, self.asked.prompts[index // self.asked.n], self._sampling(index))
        async with aclosing(self.service.backend.generate(wanted)) as steps:
            async for step in steps:
                piece = "" if step.token is None else text.add(step.token)
                shown, stopped = watch.feed(piece + text.end() if step.finish else piece)
                if step.finish and not stopped:
                    shown += watch.end()
                counted = () if step.token is None else (step,)
                yield Chunk(shown, counted, "stop" if stopped else step.finish)
                if stopped:
                    return

    def _sampling(self, index: int) -> Sampling:
        asked = self.asked
        # Choices of one request differ: each has a seed of its own that follows from the request's.
        seed = self.service._random_seed() if asked.seed is None else asked.seed + index % asked.n
        return Sampling(asked.most_new_tokens, asked.temperature, asked.top_p, seed % (1 << 63), asked.alternatives)


async def _merged(streams: Sequence[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """What several generators give, as it comes; the first error ends all."""
    queue: asyncio.Queue[tuple[int, Chunk | BaseException | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async with aclosing(streams[index]) as stream:
                async for piece in stream:
                    queue.put_nowait((index, piece))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    try:
        left = len(tasks)
        while left:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def together(pieces: Sequence[Chunk]) -> Chunk:
    """The whole choice that pieces make."""
    steps = tuple(step for piece in pieces for step in piece.steps)
    return replace(pieces[-1], text="".join(piece.text for piece in pieces), steps=steps)
