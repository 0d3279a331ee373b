"""`fedmoe state`: backup, restore, migrate, verify."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from fedmoe.cli.options import AsJson
from fedmoe.cli.output import EXIT_STORAGE, show_json

app = typer.Typer(help="Look after a coordinator's state directory.", no_args_is_help=True)

StateDirectory = Annotated[
    Path, typer.Option("--state-dir", envvar="FEDMOE_COORDINATOR_STATE_DIR", help="The coordinator's state directory.")
]
FromDatabase = Annotated[
    str | None,
    typer.Option(
        envvar="FEDMOE_FROM_DATABASE_URL", help="The database with the journal, if it is in one.", show_envvar=False
    ),
]
ToDatabase = Annotated[
    str | None,
    typer.Option(envvar="FEDMOE_TO_DATABASE_URL", help="The empty database to move the journal to.", show_envvar=False),
]
ToBlobs = Annotated[str | None, typer.Option(help="The object store to move the blobs to: s3://bucket/prefix.")]
DEFAULT_STATE_DIR = Path("runs/coordinator")


@app.command()
def backup(
    dest: Annotated[Path, typer.Argument(help="The new folder to make; best on another disk.")],
    state_dir: StateDirectory = DEFAULT_STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Make a verified backup of a state directory, while its coordinator runs or not."""
    from fedmoe.server.history.verification import check_start
    from fedmoe.server.storage.backup import make_backup

    made = make_backup(state_dir, dest, time.time(), check_start)
    if as_json:
        show_json(asdict(made))
        return
    print(f"{dest} holds {made.events} events and {made.blobs} blobs, {made.size / 1e6:.1f} MB, every one checked.")
    if made.blobs_at:
        print(f"The blobs stay in {made.blobs_at}; those that a start needs were read. Guard them there (versioning).")
    if not made.incarnation:
        print(f"Its journal is kept as it is, of schema {made.schema}: the FedMoE that wrote it opens it too.")
    if made.linked:
        print(
            f"{made.linked} blobs are hard links: safe from deletion, not from this disk. Copy {dest} to another one."
        )
    if made.damaged:
        print(f"{made.damaged} damaged blobs that no start needs are left out; 'fedmoe state verify' names them.")
    if made.absent:
        print(f"{made.absent} older blobs were let go of before and are not in it.")


@app.command()
def restore(
    backup: Annotated[Path, typer.Argument(help="A folder that 'fedmoe state backup' made.")],
    state_dir: StateDirectory = DEFAULT_STATE_DIR,
    replace: Annotated[
        bool, typer.Option("--replace", help="Move what is in the state directory aside, into a folder inside it.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a state directory of a backup; its history goes on as another incarnation."""
    from fedmoe.server.storage.backup import JOURNAL
    from fedmoe.server.storage.object_store import noted_url
    from fedmoe.server.storage.restore import restore as restore_backup

    made = restore_backup(backup, state_dir, replace)
    if as_json:
        show_json({**asdict(made), "moved": str(made.moved) if made.moved else None})
        return
    print(f"{state_dir} holds the {made.events} events of {backup}, as incarnation {made.incarnation}.")
    if made.moved:
        print(f"What was there lies in {made.moved}; delete it when nobody needs it.")
    if url := noted_url(state_dir / JOURNAL):
        print(f"Its blobs lie in {url}: start it with --blobs {url}.")
    print("Updates made from the history before are refused by name, and their workers send again what they can.")
    print("Tokens are those of the backup: revoke again what was revoked since ('fedmoe token revoke').")


@app.command()
def migrate(
    source: Annotated[Path, typer.Argument(help="The state directory to move from; its coordinator is stopped.")],
    target: Annotated[Path, typer.Argument(help="The new folder to move to.")],
    from_database_url: FromDatabase = None,
    to_database_url: ToDatabase = None,
    to_blobs: ToBlobs = None,
    accept_database_loss: Annotated[
        bool, typer.Option("--accept-database-loss", help="Accept a database whose crash loses what was written last.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Move a stopped federation between SQLite and PostgreSQL, folder and object store; everything is compared."""
    from fedmoe.runtime.urls import usable_blobs
    from fedmoe.server.history.state_move import FederationPlace, move_state
    from fedmoe.server.storage.state_dir import Database

    try:
        to_blobs = to_blobs and usable_blobs(to_blobs)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--to-blobs") from None
    databases = [
        Database(url, accept_database_loss) if url is not None else None for url in (from_database_url, to_database_url)
    ]
    made = move_state(FederationPlace(source, databases[0]), FederationPlace(target, databases[1], to_blobs))
    if as_json:
        show_json(asdict(made))
        return
    print(f"{made.events} events and {made.blobs} blobs, {made.size / 1e6:.1f} MB, were moved and compared; ", end="")
    print(f"{made.experts} experts were rebuilt.")
    print(
        f"Start the coordinator on {target} from now on. {source} is as it was: never start it again, delete it later."
    )


@app.command()
def verify(
    state_dir: StateDirectory = DEFAULT_STATE_DIR,
    as_json: AsJson = False,
) -> None:
    """Check a stopped coordinator's state directory against its hashes and rebuild every version; changes nothing."""
    from fedmoe.server.history.verification import verify_state

    report = verify_state(state_dir)
    if as_json:
        show_json(asdict(report))
    else:
        for finding in report.findings:
            print(f"WRONG  {finding}")
        print(f"{report.events} events, {report.versions} versions ({report.unproven} without a digest or their bytes)")
        print(f"{report.blobs} blobs ({report.absent} let go of before, {report.unnamed} that no journal names)")
        print(f"{len(report.findings)} findings" if report.findings else "all is as it was written")
    if report.findings:
        raise typer.Exit(EXIT_STORAGE)
