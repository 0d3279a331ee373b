"""Standard output and error that take any text, whatever their encoding, and that may be closed early."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
        for stream in streams:
            stream.flush()
    except BrokenPipeError:
        if not _reader_is_gone(streams):
            raise  # some other pipe
        raise SystemExit(EXIT_READER_GONE) from None
    except SystemExit:
        if _reader_is_gone(streams):
            raise SystemExit(EXIT_READER_GONE) from None
        raise


def _escape_what_does_not_fit() -> tuple[TextIO, TextIO]:
    # A program that was started with a closed output prints into nothing.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        # UTF-8 too: half a surrogate pair, which JSON can hold, has no place in it.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return sys.stdout, sys.stderr


def _reader_is_gone(streams: tuple[TextIO, TextIO]) -> bool:
    """Whether standard output or error is a pipe without a reader; from then on that stream goes nowhere."""
    gone = False
    for stream in streams:
        try:
            stream.flush()
        except BrokenPipeError:
            gone = True
            # What waits in the buffer must not be tried, and complained about, once more when Python ends.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)
    return gone
