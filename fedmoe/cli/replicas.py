"""`fedmoe replicas`: show which replica owns what."""

from __future__ import annotations

from fedmoe.cli.options import AdminToken, AsJson, with_client
from fedmoe.cli.output import show_json, show_table
from fedmoe.wire.client import CoordinatorClient


@with_client(AdminToken)
def replicas(api: CoordinatorClient, as_json: AsJson = False) -> None:
    """Show which replica owns what, in which term and for how long; any replica answers (needs an admin token)."""
    listing = api.replicas()
    if as_json:
        show_json(listing)
        return
    if not listing.owners:
        print("One coordinator serves this federation alone.")
        return
    rows = [(row.duty, row.replica, str(row.term), f"{row.seconds_left:.1f} s", row.url) for row in listing.owners]
    show_table("Owners", ("duty", "replica", "term", "lease left", "url"), rows)
