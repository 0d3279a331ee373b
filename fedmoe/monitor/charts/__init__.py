"""The six charts of an arena run. Importing this package loads matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from matplotlib.figure import Figure

from fedmoe.monitor.arena_series import ArenaSeries
from fedmoe.monitor.charts.curves import training_trends
from fedmoe.monitor.charts.dashboard import comprehensive_dashboard
from fedmoe.monitor.charts.heatmap import performance_landscape
from fedmoe.monitor.charts.performance import model_performance
from fedmoe.monitor.charts.radar import model_capability
from fedmoe.monitor.charts.scatter import performance_scatter
from fedmoe.monitor.picture import png

__all__ = ["CHARTS", "arena_pictures"]

#: File name -> the function that draws it.
CHARTS: dict[str, Callable[[ArenaSeries], Figure]] = {
    "training_trends_line_chart.png": training_trends,
    "model_performance_bar_chart.png": model_performance,
    "model_capability_radar_chart.png": model_capability,
    "3d_performance_heatmap.png": performance_landscape,
    "performance_scatter_plot.png": performance_scatter,
    "comprehensive_dashboard.png": comprehensive_dashboard,
}


def arena_pictures(series: ArenaSeries) -> Iterator[tuple[str, bytes]]:
    """Every chart as (file name, PNG bytes), one at a time so that one figure is in memory."""
    for name, draw in CHARTS.items():
        yield name, png(draw(series))
