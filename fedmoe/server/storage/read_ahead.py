"""Read-ahead: a standby reads and checks a journal's rows while another process writes, so that a takeover is short.

What was read is checked once, when it is read. Whoever opens the journal with it checks that its last row still stands
there as it was, and the rows after it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import SQLAlchemyError

from fedmoe.federation.events import Event
from fedmoe.runtime.errors import ExpectedError
from fedmoe.server.storage.chain import COLUMNS, ChainEnd, check
from fedmoe.server.storage.event_rows import chained_event_of
from fedmoe.server.storage.postgres import postgres_engine
from fedmoe.server.storage.tables import EVENTS

# Rows of one query: a tenth of a second, for which a takeover may have to wait.
_PAGE = 5_000
#: Events that are kept in memory, about 700 bytes each; of a longer journal none are, and its rows are only checked.
MOST_EVENTS = 250_000
# A standby that a takeover finds in the middle of a page which does not come is left alone.
_PATIENCE_SECONDS = 0.5
_log = structlog.get_logger("fedmoe.journal")


@dataclass(frozen=True, slots=True)
class CheckedRows:
    """The first rows of a journal: where they end, and their events, None where those are too many."""

    end: ChainEnd = ChainEnd()
    events: list[Event] | None = field(default_factory=list)


class ReadAhead:
    """Reads the journal in the database at `url` from a thread of its own, every `seconds`, until `take` or `close`.

    It begins `first` seconds after `start`: a replica often starts beside another that takes over, and both read then.
    """

    def __init__(self, url: str, seconds: float, first: float = 0.0) -> None:
        self._engine = postgres_engine(url).execution_options(isolation_level="AUTOCOMMIT")
        self._seconds, self._first = seconds, first
        self._reading = threading.Lock()
        self._rows = CheckedRows()
        self._resumed, self._closed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedmoe-read-ahead", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._resumed.set()
        self._thread.start()

    def take(self) -> CheckedRows:
        """What was read so far, which is let go of; nothing more is read until `resume`."""
        self._resumed.clear()
        if not self._reading.acquire(timeout=_PATIENCE_SECONDS):
            return CheckedRows()
        try:
            rows, self._rows = self._rows, CheckedRows()
            return rows
        finally:
            self._reading.release()

    def resume(self) -> None:
        """Read again, from the beginning."""
        self._resumed.set()

    def close(self) -> None:
        """Read no more."""
        self._closed.set()
        self._resumed.set()
        if self._thread.is_alive():
            self._thread.join(_PATIENCE_SECONDS)
        self._engine.dispose()

    def _run(self) -> None:
        self._closed.wait(self._first)
        while not self._closed.is_set():
            self._resumed.wait()
            with self._reading:
                whole = not self._resumed.is_set() or self._closed.is_set() or self._read_page()
            if whole:
                self._closed.wait(self._seconds)

    def _read_page(self) -> bool:
        """Read the rows after those that were read; whether there are no more now."""
        rows = self._rows
        query = sa.select(*(EVENTS.c[name] for name in COLUMNS), EVENTS.c.chain)
        query = query.where(EVENTS.c.id > rows.end.row).order_by(EVENTS.c.id).limit(_PAGE)
        try:
            with self._engine.connect() as connection:
                page = connection.execute(query).all()
            end = check(page, rows.end)
            events = rows.events
            if events is not None:
                read = [chained_event_of(row.kind, row.payload) for row in page]
                events = None if end.rows > MOST_EVENTS else [*events, *read]
        except (SQLAlchemyError, ValueError, ExpectedError) as error:
            # Whoever opens the journal says what is wrong with it; a federation that is not made yet has no table.
            _log.debug("read_ahead_failed", reason=str(error))
            self._rows = CheckedRows()
            return True
        self._rows = CheckedRows(end, events)
        return len(page) < _PAGE
