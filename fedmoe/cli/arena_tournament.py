"""`fedmoe arena tournament`: let frozen players play each other, and print the table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedmoe.cli.options import AsJson
from fedmoe.cli.output import show_json

if TYPE_CHECKING:
    from fedmoe.arena.rollout.interval import MeanInterval
    from fedmoe.arena.rollout.tournament import TournamentTable
    from fedmoe.arena.run.entrants import EntryList


def tournament(
    runs: Annotated[list[Path], typer.Argument(help="Folders of runs, or of single checkpoints.")],
    pool: Annotated[
        list[Path] | None, typer.Option(help="Further frozen players: a folder of PEFT adapters, or a run; repeatable.")
    ] = None,
    deals: Annotated[int, typer.Option(min=1, help="Held-out deals or questions that every pair meets on.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Decides all draws.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Let the newest policies of runs meet each other, the base model and chance; writes nothing into the runs."""
    from fedmoe.arena.rollout.interval import FEW_QUESTIONS
    from fedmoe.runtime.device import pin_threads

    pin_threads(1)  # sums over several threads differ in the last bit, and with it a sampled word and the table
    field, table = _play(runs, pool or [], deals, seed)
    if as_json:
        facts = {"task": field.config.task.name, "base_model": field.config.base_model, "seed": seed, "deals": deals}
        show_json(facts | asdict(table))
        return
    print(f"{field.config.task.name}, {table.questions} different questions or deals, every pair met on all of them")
    print("\n".join(_lines(table)))
    print("points: a draw counts half; [95 % over questions or deals]; won, lost: by play + by an invalid action")
    if table.questions < FEW_QUESTIONS:
        print(f"fewer than {FEW_QUESTIONS} different questions or deals say little of others; raise --deals")


def _play(runs: list[Path], pools: list[Path], deals: int, seed: int) -> tuple[EntryList, TournamentTable]:
    from fedmoe.arena.rollout.chat import ChatCodec
    from fedmoe.arena.rollout.episodes import SCRIPTED, Player
    from fedmoe.arena.rollout.evaluate import BASE, CHANCE
    from fedmoe.arena.rollout.play import RolloutSettings
    from fedmoe.arena.rollout.tournament import check_players, run_tournament
    from fedmoe.arena.run.entrants import EntrantError, read_field
    from fedmoe.arena.tasks.registry import make_task
    from fedmoe.arena.tasks.task import ScriptedTask
    from fedmoe.inference.engine import context_limit
    from fedmoe.inference.transformers_engine import TransformersEngine
    from fedmoe.lora.adapter import ShapeError
    from fedmoe.models.base import ChatTemplate, load_base
    from fedmoe.models.multilora import MultiLora

    field = read_field(runs, pools)
    config = field.config
    task = make_task(config.task.name, config.task.options)
    rules = [Player(SCRIPTED, None)] if isinstance(task, ScriptedTask) and task.scripted else []
    players = [*(Player(entrant.shown, entrant.key) for entrant in field.entrants), BASE, CHANCE, *rules]
    check_players(task, players)
    base = load_base(
        config.base_model, chat=ChatTemplate.from_options(config.chat_template, config.chat_template_kwargs)
    )
    field.check_base([config.base_model, base.identity.name])
    engine = TransformersEngine(base, MultiLora(base.model))
    try:
        for entrant in field.entrants:
            try:
                engine.load(entrant.key, entrant.adapter)
            except ShapeError as error:
                raise EntrantError(f"{entrant.folder} does not fit {config.base_model}: {error}") from error
        codec = ChatCodec(base.tokenizer, config.learning.max_prompt_tokens)
        settings = RolloutSettings(config.learning.temperature, context=context_limit(engine))
        return field, run_tournament(task, players, engine, codec, deals, seed, settings)
    finally:
        engine.close()


def _lines(table: TournamentTable) -> Iterator[str]:
    """The table as text, never narrower than its names: a table that wraps them could not be read."""
    width = max(len("player"), *(len(row.player) for row in table.rows))
    yield f"{'player':{width}}  {'points':18}  {'score':18}  {'won':>9}  {'drawn':>5}  {'lost':>9}"
    for row in table.rows:
        own = row.tally
        won, lost = f"{own.wins_by_play}+{own.wins_by_errors}", f"{own.losses_by_play}+{own.losses_by_errors}"
        intervals = f"{_interval(own.points):18}  {_interval(row.score):18}"
        yield f"{row.player:{width}}  {intervals}  {won:>9}  {own.draws:>5}  {lost:>9}"


def _interval(interval: MeanInterval) -> str:
    return f"{interval.mean:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
