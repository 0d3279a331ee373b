"""Charts, live views and exporters of a run, made from its records only."""
