"""What several benchmarks share: measuring, data, trained experts, loads, charts and tables."""
