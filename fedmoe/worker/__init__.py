"""The parts of a worker process: its data and options, restarts, failures, statistics and reports."""
