"""Report on training data before the first step: formats, tokens learned, rows left out and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from fedmoe.datasets.formats.row_formats import accepted_shapes
from fedmoe.datasets.readers.common import BadRow, DataError

MAX_BAD_FRACTION = 0.01
BAD_ROWS_KEPT = 100
_BAD_ROWS_SHOWN = 10


@dataclass(frozen=True)
class TokenCounts:
    """What the rows become for one base model.

    `samples` go into training (a row can give several), `tokens` and `learned` count them, `previews` are the first
    ones as text. `median` and `longest` are full lengths of rows in tokens, before anything is cut to `max_length`.
    `cut`, `split`, `lost`, `too_long`, `empty`, `endless`: see `TokenData`; `refused` rows count as bad too.
    """

    max_length: int
    long_rows: str
    samples: int
    tokens: int
    learned: int
    median: int
    longest: int
    cut: int
    split: int
    lost: int
    too_long: int
    empty: int
    refused: int
    endless: int
    notes: Mapping[str, int]
    previews: tuple[str, ...]


@dataclass(frozen=True)
class DataReport:
    """The report on one data source; `tokens` is None where no base model was named.

    `bad` holds the first `BAD_ROWS_KEPT` of `bad_count` rows (among all `rows`) that cannot be used: unreadable, unfit
    for their format, or refused by the chat template. `formats`: rows by format; `marked_out`: rows that their own
    marks keep out, by reason; `ignored`: keys that hold something and are not used; `obeyed`: keys with a meaning that
    are; `rejected`: answers of preference data that are not learned.
    """

    source: str
    sha256: str
    files: int
    max_bad_fraction: float
    rows: int
    formats: Mapping[str, int]
    bad: tuple[BadRow, ...]
    bad_count: int
    marked_out: Mapping[str, int]
    ignored: tuple[str, ...]
    obeyed: tuple[str, ...]
    rejected: int
    first_keys: tuple[str, ...]
    notes: tuple[str, ...]
    tokens: TokenCounts | None = None

    @property
    def format(self) -> str | None:
        """The formats found, the most frequent first."""
        names = sorted(self.formats, key=lambda name: -self.formats[name])
        return ", ".join(names) or None

    @property
    def left_out(self) -> Mapping[str, int]:
        """Sound rows of which nothing is learned, by reason."""
        reasons = dict(self.marked_out)
        if self.tokens and self.tokens.too_long:
            reasons[f"no part of an answer fits {self.tokens.max_length:,} tokens"] = self.tokens.too_long
        if self.tokens and self.tokens.empty:
            reasons["no token to learn"] = self.tokens.empty
        return reasons

    @property
    def good(self) -> int:
        """Rows of which something is learned."""
        return self.rows - self.bad_count - sum(self.left_out.values())

    @property
    def problem(self) -> str | None:
        """Why training refuses the data and what to do, or None if they are fit."""
        if not self.formats:
            keys = f"the first row has {list(self.first_keys)}" if self.first_keys else "no row was read"
            return (
                f"{self.source}: no known row format ({keys}); rename columns with --map COLUMN=NAME, for example "
                f"--map question=prompt --map answer=completion; accepted are\n{accepted_shapes()}{self._bad_lines()}"
            )
        if self.bad_count > self.max_bad_fraction * self.rows:
            share = self.bad_count / self.rows
            return (
                f"{self.source}: {self.bad_count:,} of {self.rows:,} rows are bad ({share:.1%}, allowed are "
                f"{self.max_bad_fraction:.1%}); mend or remove them{self._bad_lines()}"
            )
        if self.good < 1:
            reasons = "; ".join(f"{_rows(count)}: {reason}" for reason, count in self.left_out.items())
            longer = "raise --max-length, or " if self.tokens and self.tokens.too_long else ""
            return (
                f"{self.source}: not one of {self.rows:,} rows can be learned from ({reasons or 'all are bad'}); "
                f"{longer}check that the rows hold answers which are to be learned{self._bad_lines()}"
            )
        return None

    def raise_problem(self) -> None:
        """Raise `DataError` for data that are not fit."""
        if self.problem:
            raise DataError(self.problem)

    @property
    def previews(self) -> tuple[str, ...]:
        """The first samples as the model will see them."""
        return self.tokens.previews if self.tokens else ()

    @property
    def summary(self) -> dict[str, object]:
        """The report as a line of a log: every number that says what is learned and what is not."""
        line: dict[str, object] = {"file": self.source, "format": self.format, "rows": self.rows, "bad": self.bad_count}
        if self.tokens:
            names = ("tokens", "learned", "median", "longest", "max_length", "cut", "split", "too_long", "empty")
            line |= {name: getattr(self.tokens, name) for name in names} | {"lost_tokens": self.tokens.lost}
        return line | {"left_out": sum(self.left_out.values())}

    @property
    def text(self) -> str:
        """The report for people, without the samples."""
        if self.problem:
            return self.problem
        formats = ", ".join(f"{name} ({_rows(count)})" for name, count in self.formats.items())
        formats = f"format {self.format}" if len(self.formats) == 1 else f"formats {formats}"
        lines = [f"{self.source}: {self.good:,} of {self.rows:,} rows fit, {formats}", *self._token_lines()]
        lines += [f"left out: {_rows(count)}, {reason}" for reason, count in self.left_out.items()]
        if self.rejected:
            lines.append(f"preference data: {self.rejected:,} rejected answers are not learned")
        if self.obeyed:
            lines.append(f"obeyed: {', '.join(self.obeyed)}")
        if self.ignored:
            lines.append(f"not used: {', '.join(self.ignored)}")
        return "\n  ".join([*lines, *(f"note: {note}" for note in self.notes)]) + self._bad_lines()

    def to_json(self) -> dict[str, object]:
        """The fields and what follows from them, as `json` writes them."""
        fields = asdict(self)
        for name in ("source", "max_bad_fraction", "marked_out", "first_keys"):
            del fields[name]
        derived = {"good": self.good, "left_out": self.left_out, "ok": self.problem is None, "problem": self.problem}
        return {"path": self.source, "format": self.format} | fields | derived

    def _token_lines(self) -> Sequence[str]:
        counts = self.tokens
        if counts is None:
            return ()
        lines = [
            f"tokens: {counts.tokens:,}, {counts.learned:,} of them learned; rows have {counts.median:,} (median) to "
            f"{counts.longest:,} (longest); at most {counts.max_length:,} are used at once"
        ]
        if counts.cut:
            more = "a larger --max-length" + ("" if counts.long_rows == "split" else " or --long-rows split")
            cut = f"in {_rows(counts.cut)} the tail of an answer is not learned, {counts.lost:,} tokens in all"
            lines.append(f"cut: {cut}; {more} learns it")
        if counts.split:
            lines.append(f"split: {_rows(counts.split)} beyond that length, into several samples")
        if counts.endless:
            endless = f"in {_rows(counts.endless)} an answer ends without one"
            lines.append(f"no end mark: {endless}; the model will not learn to stop")
        return [*lines, *(f"{note} ({_rows(count)})" for note, count in counts.notes.items())]

    def _bad_lines(self) -> str:
        lines = [f"\n  {row.place}: {row.reason}" for row in self.bad[:_BAD_ROWS_SHOWN]]
        more = self.bad_count - len(lines)
        return "".join(lines) + (f"\n  and {more:,} more" if more > 0 else "")


def _rows(count: int) -> str:
    return f"{count:,} row" if count == 1 else f"{count:,} rows"
