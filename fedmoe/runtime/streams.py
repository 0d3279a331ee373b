"""Standard output and error of commands: unencodable text is escaped; a closed pipe ends the command quietly."""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

#: The exit status of a program whose reader went away, as shells count it: 128 and the number of SIGPIPE.
EXIT_READER_GONE = 141


@contextmanager
def printing_safely() -> Iterator[None]:
    """Run a program that prints: what its output cannot show is escaped, and a reader that left ends it quietly.

    A character that the encoding lacks becomes `\\u6771`; nobody loses a run to a sample in Chinese. When standard
    output or error is a pipe that nobody reads any more (`| head`), SystemExit with status 141 follows, without a word.
    """
    streams = _escape_what_does_not_fit()
    try:
        yield
    except BrokenPipeError:
        if not _reader_is_gone(streams):
            raise  # some other pipe
        _give_up(streams)
        raise SystemExit(EXIT_READER_GONE) from None
    except SystemExit as left:
        failed = _give_up(streams)
        # Libraries for command lines and tables make an exit of it themselves.
        if isinstance(left.__context__ or failed, BrokenPipeError):
            raise SystemExit(EXIT_READER_GONE) from None
        raise
    failed = _give_up(streams)
    if isinstance(failed, BrokenPipeError):
        raise SystemExit(EXIT_READER_GONE)
    if failed is not None:
        print(f"error: standard output: {failed}", file=streams[1])
        raise SystemExit(1)


def _escape_what_does_not_fit() -> tuple[TextIO, TextIO]:
    # A program that was started with a closed output prints into nothing.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # UTF-8 too: half a surrogate pair, which JSON can hold, has no place in it.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return sys.stdout, sys.stderr


def _give_up(streams: tuple[TextIO, TextIO]) -> OSError | None:
    """Write what still waits; a stream that does not take it goes nowhere from now on, and why is returned."""
    failed = None
    for stream in reversed(streams):
        try:
            stream.flush()
        except OSError as error:
            failed = error
            # What waits in the buffer must not be tried, and complained about, once more when Python ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return failed


def _reader_is_gone(streams: tuple[TextIO, TextIO]) -> bool:
    """Whether one of the streams is a pipe whose other end is closed; where it cannot be told, yes."""
    if not hasattr(select, "poll"):
        return True
    watched = select.poll()
    for stream in streams:
        with suppress(OSError, ValueError):  # a stream of tests has no number
            watched.register(stream.fileno(), 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in watched.poll(0))
