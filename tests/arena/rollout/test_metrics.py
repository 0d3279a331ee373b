"""Metrics of installed packages (E21)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import EntryPoint

import pytest

from fedmoe.arena.rollout import metrics
from fedmoe.arena.rollout.episodes import PlayedEpisode
from fedmoe.runtime import plugins


def how_many(played: Sequence[PlayedEpisode]) -> float:
    return float(len(played))


def not_a_number(played: Sequence[PlayedEpisode]) -> float:
    return float("nan")


def infinite(played: Sequence[PlayedEpisode]) -> float:
    return float("inf")


def broken(played: Sequence[PlayedEpisode]) -> float:
    return sum(episode.outcome.seat_scores[0] for episode in played) / len(played)


def _offer(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    points = [EntryPoint(name, f"{__name__}:{name}", "fedmoe.metrics") for name in names]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)


def test_without_packages_there_are_no_further_metrics() -> None:
    assert metrics.evaluate_metrics(metrics.installed_metrics(), []) == {}


def test_a_metric_of_an_installed_package_is_measured_e21(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, "how_many")
    assert metrics.evaluate_metrics(metrics.installed_metrics(), []) == {"how_many": 0.0}


def test_two_metrics_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, "how_many", "how_many")
    with pytest.raises(metrics.MetricError, match="exists more than once"):
        metrics.installed_metrics()


@pytest.mark.parametrize("name", ["not_a_number", "infinite", "broken"])
def test_a_metric_without_a_number_is_missing_and_the_others_are_measured(
    monkeypatch: pytest.MonkeyPatch, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _offer(monkeypatch, name, "how_many")
    assert metrics.evaluate_metrics(metrics.installed_metrics(), []) == {name: None, "how_many": 0.0}
    assert name in capsys.readouterr().out


def test_what_is_no_callable_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _offer(monkeypatch, "__name__")
    with pytest.raises(metrics.MetricError, match="not a callable"):
        metrics.installed_metrics()
