"""Copy of all blobs from one store to another: goes on where it stopped, every byte held against its digest."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from fedmoe.server.storage.blobs import BlobStore, CorruptBlobError, MissingBlobError, put

Argument = TypeVar("Argument")
Result = TypeVar("Result")

# Blobs on their way at once: an object store answers late and takes many requests.
_AT_ONCE = 4


@dataclass(frozen=True, slots=True)
class CopyReport:
    """How many blobs were copied, of how many bytes, and how many were there; `damaged` are left out, by name."""

    copied: int
    size: int
    there: int
    damaged: tuple[str, ...]


def copy_blobs(
    source: BlobStore, target: BlobStore, progress: Callable[[int, int], None] = lambda done, all_: None
) -> CopyReport:
    """Copy what `target` lacks; what is there with the right size stays. Done again, it goes on where it stopped.

    Nothing is taken from `source`, which may be in use: what vanishes meanwhile is left out. `progress` is told how
    many blobs are done, of how many. Raises what the stores raise, and may be called again then.
    """
    wanted, there = source.sizes(), target.sizes()
    missing = sorted(digest for digest, size in wanted.items() if there.get(digest) != size)
    done = len(wanted) - len(missing)
    progress(done, len(wanted))

    def copy(digest: str) -> int | CorruptBlobError | None:
        """The bytes copied, or what is wrong with them; None for a blob that vanished."""
        try:
            data = source.read(digest)
        except CorruptBlobError as error:
            return error
        except MissingBlobError:
            return None
        put(target, data)
        return len(data)

    copied, damaged = [], []
    for digest, outcome in zip(missing, in_threads(copy, missing), strict=True):
        if isinstance(outcome, int):
            copied.append(outcome)
        elif outcome is not None:
            damaged.append(digest)
        done += 1
        progress(done, len(wanted))
    return CopyReport(len(copied), sum(copied), len(wanted) - len(missing), tuple(damaged))


def check_blobs(store: BlobStore, digests: Iterable[str]) -> list[str]:
    """Read every blob; what is wrong with those that are missing or damaged, in words."""

    def problem(digest: str) -> str | None:
        try:
            store.read(digest)
        except (MissingBlobError, CorruptBlobError) as error:
            return str(error)
        return None

    return [what for what in in_threads(problem, sorted(digests)) if what is not None]


def in_threads(call: Callable[[Argument], Result], arguments: Iterable[Argument]) -> Iterator[Result]:
    """The result of a call for each argument, in order; a few calls go on at once, and a few results are in memory."""
    under_way = deque[Future[Result]]()
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="fedmoe-blobs") as pool:
        for argument in arguments:
            under_way.append(pool.submit(call, argument))
            if len(under_way) > _AT_ONCE:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
