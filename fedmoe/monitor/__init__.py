"""Showing what was recorded: charts and views that read records only."""
