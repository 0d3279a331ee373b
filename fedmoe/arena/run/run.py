"""A whole run in its folder: starts or resumes, logs, checkpoints, measures, and shuts down cleanly.

RUN/metrics.jsonl                              every record, the source of all charts
RUN/logs/training_runner.log, training.log     for people
RUN/checkpoints/checkpoint_YYYYMMDD_HHMMSS/    see `checkpoint`
RUN/multi_model_training_simple_results.json, run_report.json
RUN/episodes.jsonl                             some episodes of every iteration, see `episode_log`
RUN/control.json                               what may be changed while it runs, see `control_file`
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.league.league import League, join_league, learning_rate_only
from fedmoe.arena.learning.adapt import AdaptRules
from fedmoe.arena.learning.learner import Learner, PolicyLearner
from fedmoe.arena.learning.policies import Policies
from fedmoe.arena.modes.protocol import ArenaDecision
from fedmoe.arena.reporting import write_decision
from fedmoe.arena.rollout.chat import ChatCodec
from fedmoe.arena.rollout.interval import few_questions
from fedmoe.arena.run import checkpoint, results
from fedmoe.arena.run.batched_records import BatchedRecords, truncate_records
from fedmoe.arena.run.checkpoint import ArenaState, Checkpoint
from fedmoe.arena.run.engines import place_run
from fedmoe.arena.run.episode_log import EPISODES, EpisodeLog
from fedmoe.arena.run.options import RunError, RunOptions, Stop, Watch
from fedmoe.arena.run.ray_rollouts import rollout_engine
from fedmoe.arena.run.results import REPORT, RESULTS, RunOutcome, sort_records
from fedmoe.arena.run.resuming import accepted_changes
from fedmoe.arena.run.weight_check import WeightCheck, make_probes
from fedmoe.arena.tasks.registry import make_task
from fedmoe.arena.trainer import Trainer
from fedmoe.inference.engine import AdapterKey
from fedmoe.lora.adapter import initial_adapter
from fedmoe.lora.codec import digest
from fedmoe.models.base import ChatTemplate, LoadedBase, load_base
from fedmoe.models.multilora import MultiLora
from fedmoe.runtime.files import lock_folder
from fedmoe.runtime.logs import RunLogs, log_files, run_logs
from fedmoe.runtime.machine import environment, memory
from fedmoe.runtime.memory import ControlFile, MemoryGuard, MemoryLimitError, choose_limit, limit_gpu, watched
from fedmoe.runtime.placement import check_file_system, make_temporary, remove_temporary
from fedmoe.runtime.plugins import PluginGroup
from fedmoe.runtime.records import Recorder, RecordWriter, read_records
from fedmoe.wire.client import CoordinatorClient

METRICS = "metrics.jsonl"
_CHECKPOINTS = "checkpoints"
#: A micro-batch is never made smaller than this many tokens to save memory.
_LEAST_TOKENS = 256


#: From configuration, run folder, base model and the adapters on it to the learner, which is closed at the end.
LearnerMaker = Callable[[ArenaConfig, Path, LoadedBase, MultiLora], AbstractContextManager[PolicyLearner]]
_NO_LEARNERS: Mapping[str, LearnerMaker] = {}


@dataclass
class _Run:
    """What a run consists of once everything is loaded."""

    config: ArenaConfig
    options: RunOptions
    base: LoadedBase
    policies: Policies
    trainer: Trainer
    guard: MemoryGuard
    records: BatchedRecords
    sink: Recorder
    logs: RunLogs
    league: League | None
    started: float
    resumed_from: str | None
    control: ControlFile


def run_arena(
    config: ArenaConfig,
    options: RunOptions,
    stop: Stop,
    watch: Watch | None = None,
    learners: Mapping[str, LearnerMaker] = _NO_LEARNERS,
) -> RunOutcome:
    """Train until the configured iterations are done or `stop` is asked; returns how it ended.

    `learners` are kinds of learners beside our own and those that installed packages offer as `fedmoe.learners`.
    Raises RunError for a folder that cannot be used, and what tasks, modes, models and the coordinator raise.
    """
    makers: dict[str, LearnerMaker] = {
        "multilora": lambda config, folder, base, multi: nullcontext(Learner(base, multi, config.learning)),
        **learners,
    }
    make_learner = PluginGroup("fedmoe.learners", "learner", RunError, makers).get(config.learning.kind)
    check_file_system(options.folder, options.allow_network_fs)
    options.folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stack.callback(lock_folder(options.folder).close)
        logs = stack.enter_context(run_logs(options.folder))
        earlier, changes = _earlier(config, options, logs)
        make_temporary(options.folder)
        stack.callback(remove_temporary, options.folder)
        run = _assemble(config, options, earlier, logs, stack, watch, make_learner)
        if earlier is None:
            _populate(run)
        else:
            _restore(run, earlier.state, changes)
        return _train(run, stop)


def _earlier(config: ArenaConfig, options: RunOptions, logs: RunLogs) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint to resume from, and which settings have changed since then, in words.

    Refuses to write over another run or to go on with another configuration.
    """
    folder, records = options.folder / _CHECKPOINTS, options.folder / METRICS
    if not options.resume:
        # A run that was refused, for its mode for example, leaves at most records of the system.
        began = records.exists() and any(record.get("kind") != "system" for record in read_records(records))
        if began or checkpoint.checkpoints(folder):
            raise RunError(f"{options.folder} holds a run already: pass --resume, --fresh or another --out")
        truncate_records(records, 0)
        return None, []
    checkpoint.clean(folder)
    earlier = checkpoint.load_newest(folder)
    if earlier is None:
        if truncate_records(records, 0):
            logs.runner.warning("no_checkpoint", reason="the run begins anew: it was ended before its first checkpoint")
        return None, []
    state = earlier.state
    changes = accepted_changes(state.config, config.model_dump(mode="json"), state.iteration, str(earlier.path))
    for change in changes:
        logs.runner.info("setting_changed", change=change)
    truncate_records(records, state.records_bytes)
    logs.runner.info("resumed", checkpoint=earlier.path.name, iteration=state.iteration)
    return earlier, changes


def _assemble(
    config: ArenaConfig,
    options: RunOptions,
    earlier: Checkpoint | None,
    logs: RunLogs,
    stack: ExitStack,
    watch: Watch | None,
    make_learner: LearnerMaker,
) -> _Run:
    started = time.time()
    folder, learning = options.folder, config.learning
    chat = ChatTemplate.from_options(config.chat_template, config.chat_template_kwargs)
    rollout, learner_device, plan = place_run(config, options)
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
    engine = stack.enter_context(rollout_engine(config, folder, base, multi, rollout, options.ray_address))
    learner = stack.enter_context(make_learner(config, folder, base, multi))
    policies = Policies(learner, engine, learning.max_staleness, _adapt_rules(config))
    codec = ChatCodec(base.tokenizer, learning.max_prompt_tokens)
    if config.engine.elsewhere:
        # Another process has its own copy of the weights: what it computes with is checked, never assumed.
        policies.after_publish = WeightCheck(learner, engine, make_probes(task, engine, codec))
    guard = MemoryGuard(limit, learner.micro_batch_tokens, min(_LEAST_TOKENS, learner.micro_batch_tokens))
    guard.register_cache("encoded prompts", codec.forget)
    if isinstance(learner, Learner):
        learner.when_short = guard.failed
    stack.enter_context(watched(guard))
    records = stack.enter_context(BatchedRecords(RecordWriter(folder / METRICS)))
    sink = stack.enter_context(watch(records, folder, lambda: guard.limit)) if watch else records
    trainer = Trainer(config, task, policies, engine, codec, sink)
    next_iteration = earlier.state.iteration if earlier else 0
    trainer.after_iteration = EpisodeLog(folder / EPISODES, config.episodes, config.seed, next_iteration).write
    stack.callback(trainer.close)
    league = _join(config, options, base, policies)
    if league is not None:
        stack.callback(league.close)
        trainer.may_sample_ahead = lambda following: not league.due(following)
    resumed_from = earlier.path.name if earlier else None
    control = ControlFile(folder)
    return _Run(
        config, options, base, policies, trainer, guard, records, sink, logs, league, started, resumed_from, control
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
    # Other sites have agreed on rank and scale, and only the learner in this process can change them.
    fixed = config.federation is not None or config.learning.kind != "multilora"
    return learning_rate_only(rules, config.policies) if fixed else rules


def _populate(run: _Run) -> None:
    """New policies, from the coordinator or from their seeds; every policy begins with an A of its own."""
    for name in run.config.policies.all_names:
        if run.league:
            run.policies.add(name, run.league.start(name))
        else:
            _add_from_seed(run, name)
    _announce(run)
    if run.league:
        run.league.meet(run.trainer.memory)


def _add_from_seed(run: _Run, name: str) -> None:
    shape = run.config.policies
    seed = run.config.seed * 1009 + shape.all_names.index(name)
    run.policies.add(name, initial_adapter(run.policies.learner.layout(shape.rank), shape.scaled_alpha, seed))


def _restore(run: _Run, saved: ArenaState, changes: Sequence[str]) -> None:
    """The policies of a checkpoint, and everything that resumes from there."""
    for name in run.config.policies.all_names:
        _add_from_seed(run, name)
    # A reader of the curve sees where settings changed.
    for change in changes:
        decision = ArenaDecision("configuration", "", "", change, "resumed with another setting")
        write_decision(run.sink, saved.iteration, "", decision)
    if changes:
        _announce(run)
    state = saved.state
    adapters = {_key(name): adapter for name, adapter in saved.adapters.items()}
    run.policies.restore(_mapping(state["policies"]), adapters, saved.arrays)
    if run.league and run.league.rejoin(_mapping(state["league"])):
        state = {**state, "sampling_with": None}  # what was sampled ahead came from weights that are gone
    run.trainer.resume(state)


def _announce(run: _Run) -> None:
    run.sink.write(
        "run",
        task=run.config.task.name,
        mode=", ".join(dict.fromkeys(phase.mode for phase in run.config.phases)),
        seed=run.config.seed,
        policies=",".join(run.config.policies.all_names),
        base_model=run.base.identity.name,
        iterations=run.config.iterations,
        sample=False,
    )


def _train(run: _Run, stop: Stop) -> RunOutcome:
    """Iterations with evaluations and checkpoints between them, and the files at the end however it ends."""
    ending = RunOutcome("failed", "ended by an error; see logs/training_runner.log")
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
            ending = RunOutcome("stopped", stop.reason)
        else:
            ending = RunOutcome("finished")
    except MemoryLimitError as error:
        ending = RunOutcome("stopped", str(error))
        raise
    finally:
        run.records.flush()
        _write_results(run, ending)
        run.logs.runner.info("run_ends", status=ending.status, reason=ending.reason, iteration=run.trainer.iteration)
    return ending


def _keep_within_memory(run: _Run) -> None:
    """Follow the control file and the memory guard; between iterations, so that stopping loses nothing."""
    control = run.control.changed()
    if control is not None:
        run.guard.apply(control)
    try:
        run.policies.learner.micro_batch_tokens = run.guard.check()
    except MemoryLimitError:
        # Only here: in the middle of an iteration there is no state to go on from but that of the last checkpoint.
        _save(run)
        raise


def _iteration(run: _Run) -> None:
    trainer, config = run.trainer, run.config
    trainer.iterate()
    run.logs.training.info("iteration", number=trainer.iteration, of=config.iterations, mode=trainer.playing)
    if run.league and run.league.due(trainer.iteration):
        run.league.exchange(trainer.memory, trainer.iteration)
    ended = trainer.at_phase_end
    if ended:
        trainer.end_phase()
    if ended or (config.evaluation.every and trainer.iteration % config.evaluation.every == 0):
        _evaluate(run)
    if ended or trainer.iteration % config.checkpoint.every == 0:
        _save(run)
    run.records.flush()


def _evaluate(run: _Run) -> None:
    comparisons = run.trainer.evaluate()
    for comparison in comparisons:
        run.logs.training.info(
            "evaluation",
            policy=comparison.policy,
            opponent=comparison.opponent,
            score=round(comparison.score.mean, 4),
            base=round(comparison.base.mean, 4),
            wins=round(comparison.wins.mean, 4),
            better=comparison.better,
            questions=comparison.questions,
        )
    few = min((comparison.questions for comparison in comparisons if comparison.few), default=None)
    if few is not None:
        run.logs.training.warning("few_questions", questions=few, reason=few_questions(few))


def _save(run: _Run) -> None:
    """Write a checkpoint, with the result files and logs as they stand, and prune older ones."""
    folder = run.options.folder
    length = run.records.sync()
    _write_results(run, RunOutcome("running"))
    state = ArenaState(
        iteration=run.trainer.iteration,
        config=run.config.model_dump(mode="json"),
        state=run.trainer.state() | ({"league": run.league.state()} if run.league else {}),
        arrays=run.policies.moments(),
        adapters={str(key): adapter for key, adapter in run.policies.adapters().items()},
        records_bytes=length,
    )
    path = checkpoint.save(
        folder / _CHECKPOINTS,
        state,
        metrics=results.build_metrics(sort_records(read_records(folder / METRICS))),
        base_model=run.base.identity.name,
        now=time.time(),
        copies={RESULTS: folder / RESULTS, REPORT: folder / REPORT, **log_files(folder)},
    )
    removed = checkpoint.prune(folder / _CHECKPOINTS, run.config.checkpoint.keep, path)
    run.logs.runner.info("checkpoint", name=path.name, iteration=run.trainer.iteration, removed=len(removed))


def _write_results(run: _Run, ending: RunOutcome) -> None:
    folder = run.options.folder
    records = sort_records(read_records(folder / METRICS))
    digests = {str(key): digest(adapter) for key, adapter in run.policies.adapters().items()}
    lineage = run.trainer.memory.lineage.state()
    results.write_json(folder / RESULTS, results.build_results(records, digests, lineage))
    report = results.build_report(
        records,
        config=run.config.model_dump(mode="json"),
        environment={**environment(), **run.base.report},
        started=run.started,
        ended=time.time(),
        ending=ending,
        checkpoints=[path.name for path in checkpoint.checkpoints(folder / _CHECKPOINTS)],
        resumed_from=run.resumed_from,
    )
    results.write_json(folder / REPORT, report)


def _mapping(value: object) -> Mapping[str, Mapping[str, object]]:
    assert isinstance(value, Mapping)
    return value


def _key(text: str) -> AdapterKey:
    name, _, version = text.rpartition("@")
    return AdapterKey(name, int(version))
