"""Refuses start options that contradict those a state directory was made with."""

from __future__ import annotations

from fedmoe.coordinator import Aggregation
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.choices import StoredChoices


def check_choices(aggregation: Aggregation, kept: StoredChoices) -> None:
    """Refuse options that would rebuild other weights than the ones there were, or count a gateway twice."""
    chosen, rule = aggregation.rule.name, kept.update_rule
    if rule is not None and rule != chosen:
        # An expert's past was made with one rule; another one would rebuild other weights.
        raise RefusedError(
            "rule_mismatch",
            f"this state directory was made with the update rule {rule!r}, started with {chosen!r}.",
            f"Start with --server-optimizer {rule.partition(',')[0]} and its --buffer-size (1 if none is named), "
            "or choose another --state-dir.",
        )
    if kept.last_fold is not None and aggregation.merge_after is None:
        # Merged anew, experts that went on from one gateway would count it once each.
        raise RefusedError(
            "start_mismatch",
            f"the experts of this state directory went on from their gateway, last after fold {kept.last_fold}.",
            "Start with --start-from gateway, or choose another --state-dir.",
        )
