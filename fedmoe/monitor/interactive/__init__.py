"""The charts of an arena run as one interactive page that loads nothing from anywhere."""

from __future__ import annotations

from fedmoe.monitor.arena_series import ArenaSeries
from fedmoe.monitor.interactive.figures import interactive_figures
from fedmoe.monitor.interactive.page import page, plotly_library

__all__ = ["PAGE", "dashboard_page", "interactive_figures", "plotly_library"]

PAGE = "comprehensive_dashboard.html"


def dashboard_page(series: ArenaSeries, library: str) -> str:
    """The whole run as one self-contained HTML page of about 5 MB; `library` is what `plotly_library` gives."""
    return page(series, interactive_figures(series), library)
