"""Metrics of the gateway server: what was counted since the start, and the state at the scrape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import Metric

from fedmoe.gateway.serve.catalogue import CatalogueSnapshot
from fedmoe.gateway.serve.version_watcher import WatchHealth
from fedmoe.wire.http.metrics import Series, histogram

_PREFIX = "fedmoe_serve_"


class Counters:
    """Counts since the start; written from the event loop only."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, str]] = Counter()
        self.refused: Counter[str] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.seconds = histogram(_PREFIX + "request_duration_seconds", "From a request's admission to its end.")
        self.first_token = histogram(_PREFIX + "first_token_seconds", "From a request's admission to its first token.")

    def collect(self) -> Iterator[Metric]:
        """All of them as they are now."""
        yield from (series.family() for series in self._series())
        for times in (self.seconds, self.first_token):
            yield from times.collect()

    def _series(self) -> Iterator[Series]:
        by_ending, by_code = self.requests.items(), [((code,), count) for code, count in self.refused.items()]
        about = "Requests answered, by the model that answered and how they ended."
        yield Series(_PREFIX + "requests_total", about, ("model", "ended"), by_ending)
        yield Series(_PREFIX + "refused_total", "Requests that were not begun, by code.", ("code",), by_code)
        about = "Prompt tokens of requests answered."
        yield Series.single(_PREFIX + "prompt_tokens_total", about, self.prompt_tokens)
        yield Series.single(_PREFIX + "completion_tokens_total", "Tokens generated.", self.completion_tokens)


def state_metrics(snapshot: CatalogueSnapshot, health: WatchHealth, running: int, waiting: int) -> Iterator[Metric]:
    """What is served, how well the coordinator is followed, and generations that run and wait."""
    versions = [((name,), model.version) for name, model in snapshot.models.items()]
    yield Series(_PREFIX + "model_version", "The version that is served.", ("model",), versions).family()
    for name, about, value in (
        ("generations_running", "Generations in the batch.", running),
        ("generations_waiting", "Generations that wait for a place.", waiting),
        ("models_behind", "Names that are not up to date.", len(health.behind)),
        ("coordinator_silence_seconds", "Since the coordinator last answered.", health.seconds_since_answer),
    ):
        yield Series.single(_PREFIX + name, about, value).family()
