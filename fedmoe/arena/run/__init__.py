"""An arena run from its options to its files: engines, checkpoints, records, results."""
