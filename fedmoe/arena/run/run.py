"""A whole run in its folder: started or resumed, logged, checkpointed, measured, and ended in order.

RUN/metrics.jsonl                              every record, the source of all charts
RUN/logs/training_runner.log, training.log     for people
RUN/checkpoints/checkpoint_YYYYMMDD_HHMMSS/    see `checkpoint`
RUN/multi_model_training_simple_results.json, run_report.json
RUN/episodes.jsonl                             some episodes of every iteration, see `episodes`
RUN/control.json                               what may be changed while it runs, see `control`
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.league.league import League, join_league, learning_rate_only
from fedmoe.arena.learning.adapt import AdaptRules
from fedmoe.arena.learning.learner import Learner
from fedmoe.arena.learning.policies import Policies
from fedmoe.arena.modes.protocol import ArenaDecision
from fedmoe.arena.reporting import write_decision
from fedmoe.arena.rollout.chat import ChatCodec
from fedmoe.arena.rollout.interval import few_questions
from fedmoe.arena.run import checkpoint, results
from fedmoe.arena.run.batched_records import BatchedRecords, truncate_records
from fedmoe.arena.run.checkpoint import ArenaState, Loaded
from fedmoe.arena.run.engines import make_engine
from fedmoe.arena.run.episode_log import EPISODES, EpisodeLog
from fedmoe.arena.run.options import RunError, RunOptions, Stop, Watch, unwatched
from fedmoe.arena.run.results import Ending
from fedmoe.arena.run.resuming import accepted_changes
from fedmoe.arena.run.sorted_records import sort_records
from fedmoe.arena.run.sync_check import SyncCheck, make_probes
from fedmoe.arena.tasks.registry import make_task
from fedmoe.arena.trainer import Trainer
from fedmoe.inference.engine import AdapterKey, Engine
from fedmoe.lora.adapter import initial_adapter
from fedmoe.lora.codec import digest
from fedmoe.models.base import ChatTemplate, LoadedBase, load_base
from fedmoe.models.multilora import MultiLora
from fedmoe.runtime.control_file import ControlFile
from fedmoe.runtime.environment import environment
from fedmoe.runtime.files import lock_folder
from fedmoe.runtime.logs import RunLogs, log_files, run_logs
from fedmoe.runtime.machine import memory
from fedmoe.runtime.memory import MemoryGuard, MemoryLimitError, choose_limit, limit_gpu, watched
from fedmoe.runtime.records import Recorder, RecordWriter, read_records
from fedmoe.runtime.resources import check_file_system, make_temporary, place, remove_temporary
from fedmoe.wire.client import CoordinatorClient

__all__ = ["METRICS", "REPORT", "RESULTS", "RunError", "RunOptions", "Stop", "run_arena"]

METRICS = "metrics.jsonl"
RESULTS = "multi_model_training_simple_results.json"
REPORT = "run_report.json"
#: A micro-batch is never made smaller than this many tokens to save memory.
_LEAST_TOKENS = 256


@dataclass
class _Run:
    """What a run consists of once everything is loaded."""

    config: ArenaConfig
    options: RunOptions
    base: LoadedBase
    engine: Engine
    learner: Learner
    policies: Policies
    trainer: Trainer
    guard: MemoryGuard
    records: BatchedRecords
    writer: Recorder
    logs: RunLogs
    league: League | None
    started: float
    resumed_from: str | None = None
    control: ControlFile = field(init=False)

    def __post_init__(self) -> None:
        self.control = ControlFile(self.options.folder)


def run_arena(config: ArenaConfig, options: RunOptions, stop: Stop, watch: Watch = unwatched) -> Ending:
    """Train until the configured iterations are done or `stop` is asked; returns how it ended.

    Raises RunError for a folder that cannot be used, and what tasks, modes, models and the coordinator raise.
    """
    check_file_system(options.folder, options.allow_network_fs)
    options.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.enter_context(_owned(options.folder))
        logs = stack.enter_context(run_logs(options.folder))
        found = _earlier(config, options, logs)
        make_temporary(options.folder)
        stack.callback(remove_temporary, options.folder)
        run = _assemble(config, options, found, logs, stack, watch)
        return _train(run, stop)


@contextmanager
def _owned(folder: Path) -> Iterator[None]:
    lock = lock_folder(folder)
    try:
        yield
    finally:
        os.close(lock)


def _earlier(config: ArenaConfig, options: RunOptions, logs: RunLogs) -> Loaded | None:
    """The checkpoint to go on from; refuses to write over another run or to go on with another configuration."""
    folder = options.folder / "checkpoints"
    records = options.folder / METRICS
    if not options.resume:
        if checkpoint.checkpoints(folder) or _began(records):
            raise RunError(f"{options.folder} holds a run already: pass --resume, --fresh or another --out")
        truncate_records(records, 0)
        return None
    checkpoint.clean(folder)
    found = checkpoint.load_newest(folder)
    if found is None:
        if truncate_records(records, 0):
            logs.runner.warning("no_checkpoint", reason="the run begins anew: it was ended before its first checkpoint")
        return None
    for change in accepted_changes(found.state.config, _plain(config), found.state.iteration, str(found.path)):
        logs.runner.info("setting_changed", change=change)
    truncate_records(records, found.state.records_bytes)
    logs.runner.info("resumed", checkpoint=found.path.name, iteration=found.state.iteration)
    return found


def _began(records: Path) -> bool:
    """Whether a run was begun; one that was refused, for its mode for example, leaves at most records of the system."""
    return records.exists() and any(record.get("kind") != "system" for record in read_records(records))


def _assemble(
    config: ArenaConfig, options: RunOptions, found: Loaded | None, logs: RunLogs, stack: ExitStack, watch: Watch
) -> _Run:
    started = time.time()
    chat = ChatTemplate.given(config.chat_template, config.chat_template_kwargs)
    rollout, learner_device, plan = place(options.rollout_device, options.learner_device)
    limit, sentence = choose_limit(options.memory_limit_gb, memory().total)
    if options.gpu_memory_limit_gb is not None:
        for device in dict.fromkeys((str(rollout), str(learner_device))):
            logs.runner.info("gpu_memory", plan=limit_gpu(device, options.gpu_memory_limit_gb))
    logs.runner.info("run_begins", devices=plan, memory=sentence, iterations=config.iterations, task=config.task.name)
    task = make_task(config.task.name, config.task.options)
    base = load_base(config.base_model, learner_device, options.dtype, chat)
    logs.runner.info("base_model", **base.report)
    for note in base.notes:
        logs.runner.warning("base_model_note", note=note)
    multi = MultiLora(base.model)
    engine = stack.enter_context(make_engine(config, options.folder, base, multi, rollout))
    learner = Learner(base, multi, config.learning)
    policies = Policies(learner, engine, config.learning.max_staleness, _adapt_rules(config))
    codec = ChatCodec(base.tokenizer, config.learning.max_prompt_tokens)
    if config.engine.kind != "transformers":
        # Another process has its own copy of the weights: what it computes with is checked, never assumed.
        policies.after_publish = SyncCheck(learner, engine, make_probes(task, engine, codec))
    guard = MemoryGuard(limit, learner.micro_batch_tokens, min(_LEAST_TOKENS, learner.micro_batch_tokens))
    guard.register_cache("encoded prompts", codec.forget)
    learner.when_short = guard.failed
    stack.enter_context(watched(guard))
    records = stack.enter_context(BatchedRecords(RecordWriter(options.folder / METRICS)))
    writer = stack.enter_context(watch(records, options.folder, lambda: guard.limit))
    trainer = Trainer(config, task, policies, engine, codec, writer)
    trainer.after_iteration = _episode_log(config, options.folder, found).write
    stack.callback(trainer.close)
    league = _join(config, options, base, policies)
    run = _Run(
        *(config, options, base, engine, learner, policies, trainer, guard, records, writer, logs, league, started)
    )
    if league is not None:
        stack.callback(league.close)
        trainer.may_sample_ahead = lambda following: not league.due(following)
    _populate(run, found)
    return run


def _episode_log(config: ArenaConfig, folder: Path, found: Loaded | None) -> EpisodeLog:
    wanted, iteration = config.episodes, found.state.iteration if found else 0
    return EpisodeLog(
        folder / EPISODES, wanted.per_iteration, int(wanted.megabytes * (1 << 20)), config.seed, iteration
    )


def _join(config: ArenaConfig, options: RunOptions, base: LoadedBase, policies: Policies) -> League | None:
    section = config.federation
    if section is None:
        return None
    client = CoordinatorClient(section.url, options.token)
    folder = options.folder / "federation"
    return join_league(client, section, config.policies, config.iterations, base, policies, folder)


def _adapt_rules(config: ArenaConfig) -> AdaptRules | None:
    if not config.learning.adapt:
        return None
    rules = AdaptRules(max_rank=config.policies.max_rank)
    return learning_rate_only(rules, config.policies) if config.federation else rules


def _populate(run: _Run, found: Loaded | None) -> None:
    """Policies from the coordinator, the checkpoint, or their seeds; every policy begins with an A of its own."""
    config, multi = run.config, run.learner
    shape = config.policies
    layout = multi.layout(shape.rank)
    alpha = shape.scaled_alpha
    for index, name in enumerate(shape.all_names):
        start = run.league.start(name) if run.league and found is None else None
        run.policies.add(name, start or initial_adapter(layout, alpha, config.seed * 1009 + index))
    if found is None:
        _announce(run)
        if run.league:
            run.league.meet(run.trainer.society)
        return
    run.resumed_from = found.path.name
    _tell_changes(run, found)
    state = found.state.state
    adapters = {_key(name): adapter for name, adapter in found.state.adapters.items()}
    saved = state["policies"]
    assert isinstance(saved, Mapping)
    run.policies.restore(saved, adapters, found.state.arrays)
    if run.league and run.league.rejoin(_mapping(state["league"])):
        state = {**state, "sampling_with": None}  # what was sampled ahead came from weights that are gone
    run.trainer.resume(state)


def _tell_changes(run: _Run, found: Loaded) -> None:
    """Record settings that are not those of the checkpoint: a reader of the curve sees where they changed."""
    changes = accepted_changes(found.state.config, _plain(run.config), found.state.iteration, str(found.path))
    for change in changes:
        decision = ArenaDecision("configuration", "", "", change, "resumed with another setting")
        write_decision(run.writer, found.state.iteration, "", decision)
    if changes:
        _announce(run)


def _announce(run: _Run) -> None:
    run.writer.write(
        "run",
        task=run.config.task.name,
        mode=", ".join(dict.fromkeys(phase.mode for phase in run.config.phases)),
        seed=run.config.seed,
        policies=",".join(run.config.policies.all_names),
        base_model=run.base.identity.name,
        iterations=run.config.iterations,
        sample=False,
    )


def _keep_within_memory(run: _Run) -> None:
    """Follow the control file and the memory guard; between iterations, so that stopping loses nothing."""
    asked = run.control.changed()
    if asked is not None:
        run.guard.apply(asked)
    try:
        run.learner.micro_batch_tokens = run.guard.check()
    except MemoryLimitError:
        # Only here: in the middle of an iteration there is no state to go on from but that of the last checkpoint.
        _save(run)
        raise


def _train(run: _Run, stop: Stop) -> Ending:
    """Iterations with evaluations and checkpoints between them, and the files at the end however it ends."""
    ending = Ending("failed", "ended by an error; see logs/training_runner.log")
    try:
        if run.resumed_from is None:
            _evaluate(run)
        while run.trainer.iteration < run.config.iterations and not stop.reason:
            _keep_within_memory(run)
            _iteration(run)
        if run.league:
            run.league.leave()
        if run.trainer.iteration < run.config.iterations:
            _save(run)
            ending = Ending("stopped", stop.reason)
        else:
            ending = Ending("finished")
    except MemoryLimitError as error:
        ending = Ending("stopped", str(error))
        raise
    finally:
        run.records.flush()
        _write_results(run, ending)
        run.logs.runner.info("run_ends", status=ending.status, reason=ending.reason, iteration=run.trainer.iteration)
    return ending


def _iteration(run: _Run) -> None:
    trainer, config = run.trainer, run.config
    trainer.iterate()
    run.logs.training.info("iteration", number=trainer.iteration, of=config.iterations, mode=trainer.playing)
    if run.league and run.league.due(trainer.iteration):
        run.league.exchange(trainer.society, trainer.iteration)
    ended = trainer.at_phase_end
    if ended:
        trainer.end_phase()
    if ended or (config.evaluation.every and trainer.iteration % config.evaluation.every == 0):
        _evaluate(run)
    if ended or trainer.iteration % config.checkpoint.every == 0:
        _save(run)
    run.records.flush()


def _evaluate(run: _Run) -> None:
    compared = run.trainer.evaluate()
    for found in compared:
        run.logs.training.info(
            "evaluation",
            policy=found.policy,
            opponent=found.opponent,
            score=round(found.score.mean, 4),
            base=round(found.base.mean, 4),
            wins=round(found.wins.mean, 4),
            better=found.better,
            questions=found.questions,
        )
    few = min((found.questions for found in compared if found.few), default=None)
    if few is not None:
        run.logs.training.warning("few_questions", questions=few, reason=few_questions(few))


def _save(run: _Run) -> None:
    """A checkpoint, with the result files and logs as they stand; older ones are pruned."""
    folder = run.options.folder
    length = run.records.sync()
    _write_results(run, Ending("running"))
    adapters = {str(key): adapter for key, adapter in run.policies.adapters().items()}
    values = run.trainer.state() | ({"league": run.league.state()} if run.league else {})
    state = ArenaState(run.trainer.iteration, _plain(run.config), values, run.policies.moments(), adapters, length)
    copies = {RESULTS: folder / RESULTS, REPORT: folder / REPORT, **log_files(folder)}
    found = sort_records(read_records(folder / METRICS))
    path = checkpoint.save(
        folder / "checkpoints",
        state,
        metrics=results.build_metrics(found),
        base_model=run.base.identity.name,
        now=time.time(),
        copies=copies,
    )
    removed = checkpoint.prune(folder / "checkpoints", run.config.checkpoint.keep, path)
    run.logs.runner.info("checkpoint", name=path.name, iteration=run.trainer.iteration, removed=len(removed))


def _write_results(run: _Run, ending: Ending) -> None:
    folder = run.options.folder
    found = sort_records(read_records(folder / METRICS))
    digests = {str(key): digest(adapter) for key, adapter in run.policies.adapters().items()}
    lineage = run.trainer.society.lineage.state()
    results.write_json(folder / RESULTS, results.build_results(found, digests, lineage))
    report = results.build_report(
        found,
        config=_plain(run.config),
        environment={**environment(), **run.base.report},
        started=run.started,
        ended=time.time(),
        ending=ending,
        checkpoints=[path.name for path in checkpoint.checkpoints(folder / "checkpoints")],
        resumed_from=run.resumed_from,
    )
    results.write_json(folder / REPORT, report)


def _plain(config: ArenaConfig) -> dict[str, object]:
    plain: dict[str, object] = config.model_dump(mode="json")
    return plain


def _mapping(value: object) -> Mapping[str, object]:
    assert isinstance(value, Mapping)
    return value


def _key(text: str) -> AdapterKey:
    name, _, version = text.rpartition("@")
    return AdapterKey(name, int(version))
