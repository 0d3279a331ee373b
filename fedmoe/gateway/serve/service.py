"""Request life cycle: admitted or refused as busy, version lease, generation, release.

Everything here runs in the event loop, so nothing needs a lock; `routing_queue` routes prompts to `auto` in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

from fedmoe.gateway.serve.auto_model import PromptRouter
from fedmoe.gateway.serve.catalogue import AUTO, BASE, Catalogue
from fedmoe.gateway.serve.counters import Counters
from fedmoe.gateway.serve.problems import ApiError
from fedmoe.gateway.serve.routing_queue import RoutingQueue
from fedmoe.gateway.serve.text import PromptEncoder, StopStringFilter, TextStream
from fedmoe.inference.backend import (
    Backend,
    ContinuationRequest,
    DecodingStep,
    Finish,
    SamplingOptions,
    ServedModel,
)
from fedmoe.lora.manifest import BaseModel


@dataclass(frozen=True, slots=True)
class Limits:
    """What a request may ask for, and how many generations may be admitted at once, computed or waiting."""

    prompt_tokens: int = 2048
    output_tokens: int = 1024
    generations: int = 128


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A checked request: every prompt continued `n` times by one model; `seed` None leaves the draw to chance."""

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
        version = str(self.version)
        return {"x-fedmoe-model": self.model, "x-fedmoe-version": version, "x-fedmoe-digest": self.digest}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one choice's text, the steps it is made of, and why the choice ended if it did."""

    text: str
    steps: tuple[DecodingStep, ...]
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
        router: PromptRouter,
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
        self._admitted = 0
        self._routing = RoutingQueue(backend, catalogue, router, lambda name: self._missing(AUTO, name))

    def close(self) -> None:
        """Route no further prompt; waits for those that are being routed."""
        self._routing.close()

    def names(self) -> list[str]:
        """Everything that can be asked for."""
        auto = [AUTO] if len(self._router.experts) > 1 else []
        return [*auto, BASE, *sorted(self.catalogue.snapshot.models)]

    @contextmanager
    def _admission(self, choices: int) -> Iterator[None]:
        if self._admitted + choices > self.limits.generations:
            raise ApiError(
                "server_busy",
                f"{self._admitted} generations are under way or wait, at most {self.limits.generations} may; "
                f"{choices} more do not fit now: try again in a moment",
                retry_after=1,
            )
        self._admitted += choices
        try:
            yield
        finally:
            self._admitted -= choices

    async def begin(self, request: GenerationRequest) -> ActiveRequest:
        """Admit the request and lease the version that answers it; use the result as a context.

        A request that is cancelled while others are routed before it is not routed any more.
        """
        began = time.monotonic()
        async with AsyncExitStack() as stack:
            stack.enter_context(self._admission(request.choices))
            name = request.model
            if name == AUTO and len(self._router.experts) > 1:
                if len(request.prompts) != 1:
                    why = "a request to auto has one prompt; send one request each"
                    raise ApiError("one_prompt_only", why, "prompt")
                name = await self._routing.choose(request.prompts[0])
            model, snapshot = None, self.catalogue.snapshot
            if name != BASE:
                try:
                    model, snapshot = stack.enter_context(self.catalogue.lease(name))
                except KeyError:
                    raise self._missing(request.model, name) from None
            base = self.base.weights_hash
            version, digest = (model.version, model.digest) if model else (0, base)
            origin = Origin(name, version, digest, base, snapshot.gateway_version)
            active = ActiveRequest(self, request, origin, model, stack.pop_all(), began)
        self.counters.prompt_tokens += active.usage.prompt
        return active

    def _missing(self, requested: str, name: str) -> ApiError:
        """What to say where `name` is not served: a client that asked `auto` did not choose it, and may ask again."""
        there = ", ".join(self.names())
        if requested == name:
            return ApiError("model_not_found", f"there is no model {name!r}; there are: {there}", "model")
        why = f"this prompt may belong to {name!r}, which is not served now; there are: {there}"
        return ApiError("routed_model_missing", why)


@dataclass
class ActiveRequest:
    """An admitted request; leaving the context stops its generations and releases the version and the admission.

    `began` is when it was admitted, by a clock that is never set.
    """

    service: Service
    request: GenerationRequest
    origin: Origin
    model: ServedModel | None
    resources: AsyncExitStack
    began: float
    usage: Usage = field(init=False)
    ended: str = "broken_off"

    def __post_init__(self) -> None:
        self.usage = Usage(sum(len(prompt) for prompt in self.request.prompts))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        counters = self.service.counters
        counters.requests[self.origin.model, self.ended] += 1
        counters.completion_tokens += self.usage.completion
        counters.seconds.observe(time.monotonic() - self.began)
        await self.resources.aclose()

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """Chunks of all choices as they come, with the number of their choice; close it before leaving the context."""
        streams = [self._choice(index) for index in range(self.request.choices)]
        async with aclosing(_interleave(streams)) as interleaved:
            async for index, chunk in interleaved:
                if chunk.steps and not self.usage.completion:
                    self.service.counters.first_token.observe(time.monotonic() - self.began)
                self.usage.completion += len(chunk.steps)
                yield index, chunk
        self.ended = "complete"
        # Before the client can know that it has everything: its next request must be admitted.
        await self.resources.aclose()

    async def _choice(self, index: int) -> AsyncGenerator[Chunk, None]:
        """One continuation up to its first stop string."""
        request, service = self.request, self.service
        # Choices of one request differ: each has a seed of its own that follows from the request's.
        seed = service._random_seed() if request.seed is None else request.seed + index % request.n
        sampling = SamplingOptions(
            request.most_new_tokens, request.temperature, request.top_p, seed % (1 << 63), request.alternatives
        )
        generation = ContinuationRequest(self.model, request.prompts[index // request.n], sampling)
        text, stop_filter = TextStream(service.prompter), StopStringFilter(request.stops)
        async with aclosing(service.backend.generate(generation)) as steps:
            async for step in steps:
                new = "" if step.token is None else text.add(step.token)
                shown, stopped = stop_filter.feed(new + text.end() if step.finish else new)
                if step.finish and not stopped:
                    shown += stop_filter.end()
                yield Chunk(shown, () if step.token is None else (step,), "stop" if stopped else step.finish)
                if stopped:
                    return


async def _interleave(streams: Sequence[AsyncGenerator[Chunk, None]]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """What several generators give, as it comes; the first error ends all."""
    queue: asyncio.Queue[tuple[int, Chunk | BaseException | None]] = asyncio.Queue()

    async def pump(index: int) -> None:
        try:
            async with aclosing(streams[index]) as stream:
                async for chunk in stream:
                    queue.put_nowait((index, chunk))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(pump(index)) for index in range(len(streams))]
    try:
        running = len(tasks)
        while running:
            index, item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """All chunks of a choice as one."""
    steps = tuple(step for chunk in chunks for step in chunk.steps)
    return replace(chunks[-1], text="".join(chunk.text for chunk in chunks), steps=steps)
