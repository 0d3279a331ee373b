"""What a worker keeps on disk and how its updates reach the coordinator."""
