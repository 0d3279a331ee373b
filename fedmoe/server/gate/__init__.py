"""The evaluation gate: candidates, scores, verdicts, publication."""
