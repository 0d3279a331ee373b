"""The population: ratings, pool of opponents, and replacement of the worst policy (population based training)."""
