"""Interactive page: figures, Plotly's JavaScript and style in one self-contained HTML file."""

from __future__ import annotations

import json
from html import escape
from importlib import resources
from string import Template

from fedmoe.monitor.arena_series import ArenaSeries
from fedmoe.monitor.interactive.figures import InteractiveFigure, interactive_figures
from fedmoe.monitor.palette import INK, MUTED, SAMPLE_COLOUR, SAMPLE_TEXT, run_line

PAGE = "comprehensive_dashboard.html"
# Plotly knows addresses of map tiles that no chart here uses; the policy makes sure that nothing is ever asked for.
# 'unsafe-eval' is for its shaders' code, which it makes while it runs.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; "
    "worker-src blob:; form-action 'none'; base-uri 'none'"
)
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="$policy">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0; font-family: system-ui, sans-serif; color: $ink; background: #F3F5F7; }
.sample { background: $sample; color: white; font-weight: 700; text-align: center; padding: .6rem; }
header { padding: 1rem 1.4rem .2rem; }
h1 { margin: 0; font-size: 1.4rem; }
header p { margin: .3rem 0 0; color: $muted; font-size: .9rem; }
main { display: grid; gap: 1rem; padding: 1rem 1.4rem; }
main { grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); }
section { background: white; border-radius: 8px; padding: .8rem 1rem .4rem; min-width: 0; }
section.wide { grid-column: 1 / -1; }
h2 { margin: 0 0 .3rem; font-size: 1rem; }
</style>
</head>
<body>
$banner
<header><h1>Arena dashboard</h1><p>$facts</p></header>
<main>
$sections
</main>
<script>$library</script>
<script type="application/json" id="figures">$figures</script>
<script>
const options = {responsive: true, displaylogo: false, showSendToCloud: false};
for (const figure of JSON.parse(document.getElementById("figures").textContent)) {
  Plotly.newPlot(figure.name, figure.data, figure.layout, options);
}
</script>
</body>
</html>
""")


def plotly_library() -> str:
    """Plotly's JavaScript from the installed package; raises ModuleNotFoundError where plotly is not installed."""
    return resources.files("plotly").joinpath("package_data", "plotly.min.js").read_text("utf-8")


def dashboard_page(series: ArenaSeries, library: str) -> str:
    """The whole run as one self-contained HTML page of about 5 MB; `library` is what `plotly_library` gives.

    Every text of a record is escaped.
    """
    figures = interactive_figures(series)
    content = [{"name": figure.name, "data": figure.data, "layout": figure.layout} for figure in figures]
    return _PAGE.substitute(
        policy=_POLICY,
        title=f"{'SAMPLE DATA: ' if series.facts.sample else ''}Arena dashboard",
        ink=INK,
        muted=MUTED,
        sample=SAMPLE_COLOUR,
        banner=f'<div class="sample">{SAMPLE_TEXT}</div>' if series.facts.sample else "",
        facts=escape(run_line(series, lambda text, longest: text)),
        sections="\n".join(map(_section, figures)) or "<p>Nothing was recorded yet.</p>",
        library=library,
        figures=_escaped_json(content),
    )


def _section(figure: InteractiveFigure) -> str:
    wide = ' class="wide"' if figure.wide else ""
    return f'<section{wide}><h2>{escape(figure.title)}</h2><div id="{escape(figure.name)}"></div></section>'


def _escaped_json(content: object) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(content, allow_nan=False).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
