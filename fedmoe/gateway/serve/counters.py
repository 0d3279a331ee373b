"""What the server has done so far, as text that Prometheus reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedmoe.gateway.serve.catalogue import Snapshot
from fedmoe.gateway.serve.version_watcher import Health


@dataclass
class Counters:
    """Counts since the start; written from the event loop only."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def page(self, snapshot: Snapshot, health: Health, running: int, waiting: int) -> str:
        """All counts and the present state in the text format of Prometheus."""
        lines = _counter("requests_total", "Requests answered, by the model that answered and how they ended.")
        for (model, ended), count in sorted(self.requests.items()):
            lines.append(_line("requests_total", count, {"model": model, "ended": ended}))
        lines += _counter("refused_total", "Requests that were not begun, by code.")
        lines += [_line("refused_total", count, {"code": code}) for code, count in sorted(self.refused.items())]
        for name, count, about in (
            ("prompt_tokens_total", self.prompt_tokens, "Prompt tokens of requests answered."),
            ("completion_tokens_total", self.completion_tokens, "Tokens generated."),
        ):
            lines += [*_counter(name, about), _line(name, count)]
        lines += _gauge("model_version", "The version that is served.")
        lines += [_line("model_version", one.version, {"model": name}) for name, one in snapshot.models.items()]
        for name, value, about in (
            ("generations_running", float(running), "Generations in the batch."),
            ("generations_waiting", float(waiting), "Generations that wait for a place."),
            ("models_behind", float(len(health.behind)), "Names that are not up to date."),
            ("coordinator_silence_seconds", health.seconds_since_answer, "Since the coordinator last answered."),
        ):
            lines += [*_gauge(name, about), _line(name, value)]
        return "\n".join(lines) + "\n"


def _counter(name: str, about: str) -> list[str]:
    return _heading(name, about, "counter")


def _gauge(name: str, about: str) -> list[str]:
    return _heading(name, about, "gauge")


def _heading(name: str, about: str, kind: str) -> list[str]:
    return [f"# HELP fedmoe_serve_{name} {about}", f"# TYPE fedmoe_serve_{name} {kind}"]


def _line(name: str, value: float, labels: Mapping[str, str] | Iterable[tuple[str, str]] = ()) -> str:
    shown = ",".join(f'{key}="{text}"' for key, text in dict(labels).items())
    return f"fedmoe_serve_{name}{{{shown}}} {value:g}" if shown else f"fedmoe_serve_{name} {value:g}"
