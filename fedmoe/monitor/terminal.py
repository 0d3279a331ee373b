"""Terminal view of an arena run: progress, a row for each policy, the machine, decisions; plain lines elsewhere."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from fedmoe.monitor.palette import POLICY_COLOURS, SAMPLE_TEXT
from fedmoe.runtime.records import Record

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARKS = 24
_DECISIONS = 4
_GIB = 2.0**30


def sparkline(values: Sequence[float], width: int = _SPARKS) -> str:
    """The newest values as one row of blocks, the lowest of them low and the highest high."""
    shown = [value for value in values if math.isfinite(value)][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((value - low) * scale)] for value in shown)


class TerminalView:
    """Shows what the records of a run of so many iterations say: redrawn on a terminal, lines elsewhere. A `Sink`."""

    def __init__(self, console: Console, iterations: int) -> None:
        self._console = console
        self._iterations = iterations
        self._newest: dict[tuple[str, str], Record] = {}
        self._rewards: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_SPARKS))
        self._skipped = 0
        self._decisions: deque[Record] = deque(maxlen=_DECISIONS)
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Leave the last state on the terminal."""
        if self._live is not None:
            self._live.stop()

    def write(self, record: Record) -> None:
        """Take one record and show what is new."""
        kind, policy = str(record["kind"]), str(record.get("policy") or "")
        if kind in ("leader", "skipped"):
            policy = ""  # what counts is the newest of any
        self._newest[kind, policy] = record
        if kind == "policy":
            self._rewards[policy].append(_number(record, "reward"))
        elif kind == "decision":
            self._decisions.append(record)
        elif kind == "skipped":
            self._skipped += int(_number(record, "episodes"))
        if self._live is not None:
            self._live.update(self._picture())
        else:
            self._print(record, kind)

    def _print(self, record: Record, kind: str) -> None:
        """The plain way: a head line, then a line when an iteration is through (its timing comes last) or decided."""
        if kind == "run":
            text = f"{SAMPLE_TEXT}\n" if record.get("sample") is True else ""
            text += _head(record)
        elif kind == "timing":
            text = self._line(record)
        elif kind in _SENTENCES:
            text = f"  {_SENTENCES[kind](record)}"
        else:
            return
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _line(self, timing: Record) -> str:
        policies = "  ".join(
            f"{policy} reward {_show(record, 'reward')} accuracy {_show(record, 'accuracy')}"
            f" version {_show(record, 'version', 0)}"
            for policy, record in self._of_policies()
        )
        speed = f"{_show(timing, 'iteration_seconds', 1)} s, {_show(timing, 'tokens_per_second', 0)} tokens/s"
        return f"iteration {_done(timing)}/{self._iterations}  {speed}  {policies}"

    def _picture(self) -> RenderableType:
        parts: list[RenderableType] = []
        if any(record.get("sample") is True for record in self._newest.values()):
            parts.append(Text(SAMPLE_TEXT, style="bold white on red"))
        parts += [Text(_head(record), style="bold") for record in self._of_kind("run")]
        parts += [self._progress(), self._policies(), Text(self._system(), style="dim")]
        parts += [Text(_evaluation(record)) for record in self._of_kind("evaluation")]
        parts += [Text(_leader(record)) for record in self._of_kind("leader")]
        for record in self._of_kind("skipped"):
            parts.append(Text(f"{self._skipped} episodes skipped so far; {_skipped(record)}", style="red"))
        parts += [Text(_decision(decision)) for decision in self._decisions]
        return Group(*parts)

    def _of_kind(self, *kinds: str) -> list[Record]:
        """The newest record of a kind, or of every policy."""
        return [record for (kind, _), record in self._newest.items() if kind in kinds]

    def _progress(self) -> RenderableType:
        done = max(map(_done, self._of_kind("policy", "timing")), default=0)
        timing = self._newest.get(("timing", ""), {})
        text, remaining = f"{done} of {self._iterations} iterations", self._iterations - done
        if timing:
            seconds = _show(timing, "iteration_seconds", 1)
            text += f", {seconds} s each, {_show(timing, 'tokens_per_second', 0)} tokens/s"
        if timing and remaining > 0:
            text += f", about {remaining * _number(timing, 'iteration_seconds') / 60:.0f} min left"
        grid = Table.grid(padding=(0, 1))
        grid.add_row(ProgressBar(total=self._iterations, completed=done, width=40), text)
        return grid

    def _policies(self) -> Table:
        table = Table("policy", "reward", f"last {_SPARKS}", "accuracy", "rating", "KL", "version", "mode", box=None)
        for place, (policy, record) in enumerate(self._of_policies()):
            rating = self._newest.get(("rating", policy), {})
            colour = POLICY_COLOURS[place % len(POLICY_COLOURS)]
            table.add_row(
                Text(policy, style=f"bold {colour}"),
                _show(record, "reward", 3),
                Text(sparkline(self._rewards[policy]), style=colour),
                _show(record, "accuracy"),
                f"{_show(rating, 'mu', 1)} ± {_show(rating, 'sigma', 1)}" if rating else "–",
                _show(record, "kl", 3),
                _show(record, "version", 0),
                escape(str(record.get("mode") or "–")),
            )
        return table

    def _of_policies(self) -> list[tuple[str, Record]]:
        """The newest record of every policy, in the order of the run's list, then as they came."""
        listed = [name.strip() for name in str(self._newest.get(("run", ""), {}).get("policies") or "").split(",")]
        seen = [policy for kind, policy in self._newest if kind == "policy"]
        order = [*(name for name in listed if name in seen), *(name for name in seen if name not in listed)]
        return [(policy, self._newest["policy", policy]) for policy in order]

    def _system(self) -> str:
        record = self._newest.get(("system", ""))
        if record is None:
            return "system: no sample yet"
        own, limit = _number(record, "process_bytes") / _GIB, _number(record, "memory_limit_bytes") / _GIB
        memory = f"memory {_show(record, 'memory_percent', 0)} %, this run {own:.1f} GiB"
        memory += f" of {limit:.0f}" if math.isfinite(limit) else ""
        gpu = f"GPU {_show(record, 'gpu_percent', 0)} %" if record.get("gpu_percent") is not None else "no GPU"
        disk = f"disk {_show(record, 'disk_percent', 0)} %"
        return f"CPU {_show(record, 'cpu_percent', 0)} %   {memory}   {gpu}   {disk}"


def _skipped(record: Record) -> str:
    return f"{_show(record, 'episodes', 0)} episodes of {record.get('where')} skipped: {record.get('reason')}"


def _evaluation(record: Record) -> str:
    """A held-out comparison with what it rests on, and a warning where that is little."""
    policy, opponent = record.get("policy"), record.get("opponent", "base")
    if opponent == "base":
        score = f"{_show(record, 'score')} [{_show(record, 'low')}, {_show(record, 'high')}]"
        text = f"{policy} held out {score}, base {_show(record, 'base_score')}"
    else:
        wins = f"{_show(record, 'win_rate')} [{_show(record, 'win_low')}, {_show(record, 'win_high')}]"
        text = f"{policy} held out wins {wins} of its games against {opponent}"
    questions = _number(record, "questions")
    if not math.isfinite(questions):
        return text
    few = " only: too few to say much of others" if record.get("few") is True else ""
    return f"{text}, {questions:.0f} different questions{few}"


def _leader(record: Record) -> str:
    """Who is the best, if anybody surely is."""
    policy, rival = record.get("policy"), record.get("rival")
    lead = f"{_show(record, 'lead')} [{_show(record, 'lead_low')}, {_show(record, 'lead_high')}]"
    if record.get("apart") is True:
        return f"best policy {policy}, ahead of {rival} by {lead}"
    return f"the best policies are not told apart: {policy} is ahead of {rival} by {lead}"


def _number(record: Record, field: str) -> float:
    value = record.get(field)
    return float(value) if isinstance(value, int | float) else math.nan


def _show(record: Record, field: str, digits: int = 2) -> str:
    value = _number(record, field)
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _done(record: Record) -> int:
    """How many iterations are through: they count from 0."""
    iteration = _number(record, "iteration")
    return int(iteration) + 1 if math.isfinite(iteration) else 0


def _head(run: Record) -> str:
    shown = {name: run.get(name) for name in ("task", "mode", "base_model", "seed", "policies")}
    return "  ".join(f"{name.replace('_', ' ')} {value}" for name, value in shown.items() if value not in (None, ""))


def _decision(record: Record) -> str:
    who = f" of {record['policy']}" if record.get("policy") else ""
    reason = f" ({record['reason']})" if record.get("reason") else ""
    return f"{_done(record) - 1}: {record.get('what')}{who} {record.get('before')} → {record.get('after')}{reason}"


_SENTENCES: Mapping[str, Callable[[Record], str]] = {
    "decision": _decision,
    "skipped": _skipped,
    "evaluation": _evaluation,
    "leader": _leader,
}
