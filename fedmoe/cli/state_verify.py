"""`fedmoe state verify`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedmoe.cli.options import AsJson
from fedmoe.cli.output import EXIT_STORAGE, show_json


def verify(
    state_dir: Annotated[
        Path,
        typer.Option(
            "--state-dir", envvar="FEDMOE_COORDINATOR_STATE_DIR", help="A stopped coordinator's state directory."
        ),
    ] = Path("runs/coordinator"),
    as_json: AsJson = False,
) -> None:
    """Read everything in a state directory, hold it against its hashes, and rebuild every version; changes nothing."""
    from fedmoe.server.history.verification import verify_state

    found = verify_state(state_dir)
    if as_json:
        show_json(asdict(found))
    else:
        for finding in found.findings:
            print(f"WRONG  {finding}")
        print(f"{found.events} events, {found.versions} versions ({found.unproven} without a digest or their bytes)")
        print(f"{found.blobs} blobs ({found.absent} let go of before, {found.unnamed} that no journal names)")
        print(f"{len(found.findings)} findings" if found.findings else "all is as it was written")
    if found.findings:
        raise typer.Exit(EXIT_STORAGE)
