"""The training loop: sample, judge, learn, publish.

    iteration t      judge t | learn t ---------> publish | records
    sampler thread             sample t+1 ------------->

While the learner computes on batch t, a second thread already samples batch t+1 with the versions from before the
update. What is sampled with which weights depends on the iteration alone, never on which thread is faster, so a run
that is killed and resumed computes the same numbers. With `max_staleness` 0 the two take turns.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import structlog

from fedmoe.arena import reporting
from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.learning.learner import PolicyUpdate
from fedmoe.arena.learning.loss import gap_alarm
from fedmoe.arena.learning.policies import Policies
from fedmoe.arena.modes.memory import ModeMemory
from fedmoe.arena.modes.protocol import ArenaDecision, Judgement, Mode, PlanInputs
from fedmoe.arena.modes.registry import make_mode
from fedmoe.arena.rollout.chat import Codec
from fedmoe.arena.rollout.episodes import PlayedEpisode, Player
from fedmoe.arena.rollout.evaluate import BASE, CHANCE, Comparison, HeldOutEvaluator
from fedmoe.arena.rollout.metrics import evaluate_metrics, installed_metrics
from fedmoe.arena.rollout.play import RolloutResult, RolloutSettings, attempt
from fedmoe.arena.tasks.task import Task
from fedmoe.inference.engine import AdapterKey, Engine, context_limit
from fedmoe.lora.algebra import product_norm
from fedmoe.runtime.device import pin_threads
from fedmoe.runtime.records import Recorder
from fedmoe.runtime.saved_state import restored, saved_state

_log = structlog.get_logger("fedmoe.arena")

#: Iterations over which the pace is taken: one of them alone says little, since its episodes are sampled beside others.
_PACE = 10


@dataclass(frozen=True)
class _EpisodeBatch:
    """One iteration's episodes, on their way or there."""

    iteration: int
    planning: PlanInputs
    played: Future[tuple[RolloutResult, float]]


class Trainer:
    """Runs iterations of the phases of a configuration; knows nothing of files.

    `may_sample_ahead`: whether an iteration may be sampled before those before it are over; not when weights come from
    elsewhere in between.
    """

    def __init__(
        self, config: ArenaConfig, task: Task, policies: Policies, engine: Engine, codec: Codec, records: Recorder
    ) -> None:
        self.config = config
        self.iteration = 0
        self.memory = ModeMemory()
        self.policies = policies
        self._task, self._engine, self._codec, self._records = task, engine, codec, records
        self._modes = [make_mode(phase.mode) for phase in config.phases]
        for mode in self._modes:
            mode.check(task, config.policies.count)
        self._settings = RolloutSettings(config.learning.temperature, context=context_limit(engine))
        self._metrics = installed_metrics()
        self._evaluator = HeldOutEvaluator(task, engine, codec, config.evaluation.episodes, config.seed, self._settings)
        self._sampler = ThreadPoolExecutor(1, "sampler", initializer=pin_threads)
        self._pending: _EpisodeBatch | None = None
        self._pace: deque[tuple[int, float]] = deque(maxlen=_PACE)
        self.playing = ""
        self.may_sample_ahead: Callable[[int], bool] = lambda iteration: True
        #: Called with everything there is to say about an iteration, after its records.
        self.after_iteration: Callable[[reporting.IterationReport], None] = lambda report: None

    def _mode_of(self, iteration: int) -> Mode:
        return self._modes[self.config.phase_at(iteration)[0]]

    def iterate(self) -> None:
        """One iteration, with its records; the weights that come out are published."""
        began = time.perf_counter()
        batch = self._pending or self._start(self.iteration)
        rollout, rollout_seconds = batch.played.result()
        rollout.check_some(self._task.name)
        played = rollout.played
        # Before judging: a policy that is replaced does not learn from what its predecessor played.
        staleness = {
            player.name: self.policies.version(player.name) - _version(player) for player in batch.planning.policies
        }
        judged = self._judged(batch, played)
        playing = self.playing
        self._start_next()
        learning = time.perf_counter()
        updates = self.policies.learner.update(judged.examples, self._task.max_action_tokens)
        learn_seconds = time.perf_counter() - learning
        changes = self.policies.learned(updates, reporting.accuracies(played), staleness)
        self.let_go()
        lanes = 2 if self._pending else 1
        tokens = sum(len(turn.tokens) for episode in played for turn in episode.turns)
        seconds = time.perf_counter() - began
        self._pace.append((tokens, seconds))
        timing = reporting.Timing(rollout_seconds, learn_seconds, seconds, lanes, tokens, reporting.pace(self._pace))
        report = reporting.IterationReport(self.iteration, playing, played, judged, updates, staleness, timing)
        reporting.write_iteration(self._records, report, self.policies, self.memory)
        if rollout.failed:
            self._skipped("training", len(rollout.failed), rollout.reason)
        self.after_iteration(report)
        for name, value in evaluate_metrics(self._metrics, played).items():
            self._records.write("metric", iteration=self.iteration, mode=playing, metric=name, value=value)
        for name, made in changes.items():
            for change in made:
                decision = ArenaDecision(change.what, name, f"{change.before:g}", f"{change.after:g}", change.reason)
                reporting.write_decision(self._records, self.iteration, playing, decision)
        self._watch(updates, staleness)
        self.iteration += 1

    def _judged(self, batch: _EpisodeBatch, played: Sequence[PlayedEpisode]) -> Judgement:
        mode = self._mode_of(batch.iteration)
        self.playing = mode.playing if mode.name == mode.playing else f"{mode.name}: {mode.playing}"
        judged = mode.judge(self.memory, batch.planning, played)
        for replacement in judged.replacements:
            rng = np.random.default_rng([self.config.seed, 3, batch.iteration])
            self.policies.replace(replacement, self.memory.lineage, batch.iteration, rng)
            self.memory.ratings.copy_of(replacement.worst, replacement.best)
            self.memory.opponents.forget(replacement.worst)
        # What the replaced policy played, its successor has not said.
        replaced = {replacement.worst for replacement in judged.replacements}
        return replace(judged, examples=tuple(each for each in judged.examples if each.policy not in replaced))

    def _start_next(self) -> None:
        """Let the sampler go on with the next iteration, if the bound on staleness lets it and there is one."""
        following = self.iteration + 1
        self._pending = None
        # At the end of a phase the mode and the baselines change before the next iteration.
        ahead = not self.config.ends_phase(self.iteration) and self.may_sample_ahead(following)
        if ahead and self.policies.may_start():
            self._pending = self._start(following)

    def _start(self, iteration: int, players: tuple[Player, ...] | None = None) -> _EpisodeBatch:
        learning = self.config.learning
        planning = PlanInputs(
            iteration,
            self._task,
            players or self.policies.players(),
            learning.groups,
            learning.samples,
            np.random.default_rng([self.config.seed, 1, iteration]),
        )
        plans = self._mode_of(iteration).plan(self.memory, planning)
        self.policies.started()

        def work() -> tuple[RolloutResult, float]:
            began = time.perf_counter()
            seed = int(np.random.SeedSequence([self.config.seed, 2, iteration]).generate_state(1)[0])
            rollout = attempt(self._task, plans, self._engine, self._codec, seed, self._settings)
            return rollout, time.perf_counter() - began

        return _EpisodeBatch(iteration, planning, self._sampler.submit(work))

    def let_go(self) -> None:
        """Unload what neither is played with nor is an opponent."""
        needed = [player.key for player in self._pending.planning.policies if player.key] if self._pending else []
        needed += [opponent.key for opponent in self.memory.opponents.opponents if opponent.key]
        self.policies.let_go(needed)

    def _watch(self, updates: Mapping[str, PolicyUpdate], staleness: Mapping[str, int]) -> None:
        """Sound the alarm when trainer and engine disagree about the same version (of a stale one they should)."""
        for name, update in updates.items():
            alarm = gap_alarm(update.statistics.gap_mean) if staleness[name] == 0 else None
            if alarm:
                _log.warning("logprob_gap", policy=name, reason=alarm)
                reporting.write_decision(
                    self._records, self.iteration, self.playing, ArenaDecision("alarm", name, "", "", alarm)
                )

    def _skipped(self, where: str, episodes: int, reason: str) -> None:
        """Say how many episodes failed: they are left out, and the run goes on."""
        _log.warning("episodes_skipped", where=where, iteration=self.iteration, episodes=episodes, reason=reason)
        self._records.write("skipped", iteration=self.iteration, where=where, episodes=episodes, reason=reason)

    def evaluate(self) -> list[Comparison]:
        """Every policy beside the base model on held-out episodes, and against frozen opponents; with records."""
        mode = self._mode_of(max(0, self.iteration - 1)).name
        comparisons, players = [], {}
        for player in self.policies.players():
            # An adapter whose B is still zero is the base model: it need not be played to know how it plays.
            untrained = product_norm(self.policies.adapter(player.name)) == 0.0
            players[player.name] = Player(player.name, None) if untrained else player
            for opponent in self._frozen(player.name):
                comparison = self._evaluator.compare(players[player.name], opponent)
                reporting.write_comparison(
                    self._records, self.iteration, mode, comparison, self.policies.version(player.name)
                )
                comparisons.append(comparison)
        if len(players) > 1:
            reporting.write_leader(self._records, self.iteration, mode, self._evaluator.leader(players))
        worst = max(comparisons, key=lambda comparison: comparison.failed)
        if worst.failed:
            self._skipped("evaluation", worst.failed, worst.reason)
        return comparisons

    def _frozen(self, policy: str) -> list[Player]:
        """Whom a policy is measured against: the base model, chance in games, and the newest foreign or past player."""
        opponents = self.memory.opponents.opponents
        pool = [opponent.player() for opponent in opponents if opponent.key and opponent.key.name != policy]
        return [BASE, *([CHANCE] if self._task.zero_sum else []), *pool[-1:]]

    def end_phase(self) -> None:
        """After the last iteration of a phase: the strongest becomes a frozen opponent, baselines begin anew."""
        ratings, names = self.memory.ratings, self.policies.names
        for name in names:
            ratings.ensure(name)
        leader = ratings.leader(names)[0] if len(names) > 1 else names[0]
        self.memory.opponents.add_champion(self.policies.key(leader), ratings[leader].mu)
        self.memory.baselines.reset()
        self.let_go()

    @property
    def at_phase_end(self) -> bool:
        """Whether the iteration just made was the last of its phase."""
        return self.iteration > 0 and self.config.ends_phase(self.iteration - 1)

    def state(self) -> dict[str, object]:
        """Everything but weights and moments, as JSON."""
        ahead = self._pending.planning.policies if self._pending else None
        return {
            "iteration": self.iteration,
            "society": saved_state(self.memory),
            "modes": [mode.state() for mode in self._modes],
            "policies": self.policies.state(),
            "sampling_with": {player.name: _version(player) for player in ahead} if ahead else None,
        }

    def resume(self, state: Mapping[str, object]) -> None:
        """Go on after `state`; the policies have been restored. What was being sampled is sampled again."""
        self.iteration = int(str(state["iteration"]))
        memory, modes, sampling = state["society"], state["modes"], state["sampling_with"]
        assert isinstance(memory, Mapping)
        assert isinstance(modes, list)
        self.memory = restored(ModeMemory, memory)
        # Phases that have not begun have no state yet, and there may be other ones than before.
        begun = 1 + self.config.phase_at(max(0, self.iteration - 1))[0]
        for mode, saved in zip(self._modes[:begun], modes, strict=False):
            mode.restore(saved)
        if isinstance(sampling, Mapping) and self.iteration < self.config.iterations:
            players = tuple(Player(name, AdapterKey(name, version), True) for name, version in sampling.items())
            self._pending = self._start(self.iteration, players)

    def close(self) -> None:
        """Let the sampler end; what it is sampling is thrown away."""
        self._sampler.shutdown(wait=True, cancel_futures=True)


def _version(player: Player) -> int:
    return player.key.version if player.key else 0
