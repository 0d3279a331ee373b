"""Counters of the gateway server in the text format of Prometheus."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedmoe.gateway.serve.catalogue import CatalogueSnapshot
from fedmoe.gateway.serve.version_watcher import WatchHealth


@dataclass
class Counters:
    """Counts since the start; written from the event loop only."""

    requests: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def page(self, snapshot: CatalogueSnapshot, health: WatchHealth, running: int, waiting: int) -> str:
        """All counts and the present state in the text format of Prometheus."""
        by_ending = {
            f'{{model="{model}",ended="{ended}"}}': count for (model, ended), count in sorted(self.requests.items())
        }
        by_code = {f'{{code="{code}"}}': count for code, count in sorted(self.refused.items())}
        versions = {f'{{model="{name}"}}': model.version for name, model in snapshot.models.items()}
        families: tuple[tuple[str, str, Mapping[str, float]], ...] = (
            ("requests_total", "Requests answered, by the model that answered and how they ended.", by_ending),
            ("refused_total", "Requests that were not begun, by code.", by_code),
            ("prompt_tokens_total", "Prompt tokens of requests answered.", {"": self.prompt_tokens}),
            ("completion_tokens_total", "Tokens generated.", {"": self.completion_tokens}),
            ("model_version", "The version that is served.", versions),
            ("generations_running", "Generations in the batch.", {"": running}),
            ("generations_waiting", "Generations that wait for a place.", {"": waiting}),
            ("models_behind", "Names that are not up to date.", {"": len(health.behind)}),
            ("coordinator_silence_seconds", "Since the coordinator last answered.", {"": health.seconds_since_answer}),
        )
        lines = []
        for name, about, values in families:
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP fedmoe_serve_{name} {about}", f"# TYPE fedmoe_serve_{name} {kind}"]
            lines += [f"fedmoe_serve_{name}{labels} {value:g}" for labels, value in values.items()]
        return "\n".join(lines) + "\n"
