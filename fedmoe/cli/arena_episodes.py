"""`fedmoe arena episodes`: print the episodes that the run's episode log selects."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmoe.cli.options import AsJson
from fedmoe.cli.output import CommandError, show_json
from fedmoe.runtime.safe_text import inert

if TYPE_CHECKING:
    from fedmoe.arena.run.episode_log import EpisodeRow, Order, SeatRow


def episodes(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    policy: Annotated[str | None, typer.Option(help="Only episodes in which this policy or opponent sat.")] = None,
    lowest_reward: Annotated[bool, typer.Option("--lowest-reward", help="Those that earned least come first.")] = False,
    highest_reward: Annotated[
        bool, typer.Option("--highest-reward", help="Those that earned most come first.")
    ] = False,
    iteration: Annotated[int | None, typer.Option(min=0, help="Only those of this iteration.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="At most so many.")] = 5,
    as_json: AsJson = False,
) -> None:
    """Show episodes of a run as it stands, the newest unless rewards decide; control characters are shown, not sent."""
    if lowest_reward and highest_reward:
        raise CommandError("--lowest-reward and --highest-reward are opposites; pass one of them")
    from fedmoe.arena.run.episode_log import EPISODES, read_episodes, select

    try:
        rows = read_episodes(run / EPISODES)
    except FileNotFoundError:
        raise CommandError(
            f"{run} has no {EPISODES}: no run was begun there, or with [episodes] per_iteration = 0"
        ) from None
    _check(rows, policy, iteration)
    order: Order = "lowest" if lowest_reward else "highest" if highest_reward else "newest"
    chosen = select(rows, limit, order, policy, iteration)
    if as_json:
        show_json(chosen)
        return
    for row in chosen:
        print("\n".join(_shown(row)), end="\n\n")
    print(f"{len(chosen)} of {len(rows)} episodes that were kept")


def _check(rows: list[EpisodeRow], policy: str | None, iteration: int | None) -> None:
    names = sorted({seat["policy"] for row in rows for seat in row["seats"]})
    if policy is not None and policy not in names:
        raise CommandError(f"nobody is called {policy!r} in these episodes; there are: {', '.join(names) or 'none'}")
    iterations = [row["iteration"] for row in rows]
    if iteration is not None and iteration not in iterations:
        span = f"{min(iterations)} to {max(iterations)}" if iterations else "none"
        raise CommandError(f"no episode of iteration {iteration} was kept; kept are those of {span}")


def _shown(row: EpisodeRow) -> Iterator[str]:
    ended = "" if row["completed"] else ", broken off"
    why = {"lowest": "lowest reward", "highest": "highest reward"}.get(row["chosen"], "drawn")
    yield f"iteration {row['iteration']}, {inert(row['mode'])}, episode {row['episode']} ({why}{ended})"
    for number, seat in enumerate(row["seats"]):
        yield f"  seat {number}: {_facts(seat)}"
        for turn in seat["turns"]:
            yield _indented("saw ", turn["saw"])
            yield _indented("said", turn["said"]) + ("" if turn["ended"] else "  [ran into the limit of tokens]")
            if turn["cut"]:
                yield "      [the rest is left out]"


def _facts(seat: SeatRow) -> str:
    name = inert(seat["policy"]) + (f"@{seat['version']}" if seat["version"] >= 0 else "")
    reward = "" if seat["reward"] is None else f", reward {seat['reward']:+.3f}"
    invalid = "" if seat["valid"] == 1.0 else f", usable actions {seat['valid']:.0%}"
    team = f"team {seat['team']}" + (f" ({inert(seat['strategy'])})" if seat["strategy"] else "")
    return f"{name}, {team}, score {seat['score']:.3f}{reward}{invalid}"


def _indented(what: str, text: str) -> str:
    """A text of several lines under its first one; what would clear a screen or turn text round is shown, not sent."""
    return f"    {what}  " + inert(text, keep="\n\t").strip("\n").replace("\n", "\n          ")
