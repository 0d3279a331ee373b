"""The population: ratings, opponents, and who is replaced by whom."""
