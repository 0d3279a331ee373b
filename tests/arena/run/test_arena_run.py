"""A whole run in its folder: its files and what they say (E12 to E14), stopping, going on, its memory limit (E16)."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any, cast

import pytest
import torch
from letters import LettersTask
from tiny_arena import NAMES, TIMES, curve, records_of, tiny_config

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.learning.learner import Learner
from fedmoe.arena.modes.competitive import CompetitiveMode
from fedmoe.arena.modes.protocol import ModeError
from fedmoe.arena.run import checkpoint
from fedmoe.arena.run.batched_records import BatchedRecords
from fedmoe.arena.run.episode_log import EPISODES, read_episodes
from fedmoe.arena.run.options import RunError, RunOptions, Stop, Watch
from fedmoe.arena.run.results import REPORT, RESULTS, RunOutcome
from fedmoe.arena.run.run import METRICS, run_arena
from fedmoe.lora.codec import digest
from fedmoe.monitor.exporters import all_monitors
from fedmoe.runtime.files import FolderInUseError, lock_folder
from fedmoe.runtime.memory import GIB, MemoryLimitError
from fedmoe.runtime.records import Record, Recorder, RecordValue

DUEL = LettersTask((2, 2), zero_sum=True, strategies=(), name="test:duel")
PHASES = (("competitive", 3), ("team_battle", 2))
Json = dict[str, object]


class Boom(Exception):
    """What a test breaks a run with."""


@pytest.fixture(autouse=True)
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.arena.run.run.make_task", lambda name, options: LettersTask())


def run_config() -> ArenaConfig:
    config = tiny_config(PHASES, micro_batch_tokens=256)
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"every": 2})})


def run(
    folder: Path,
    config: ArenaConfig | None = None,
    *,
    resume: bool = False,
    stop: Stop | None = None,
    watch: Watch | None = None,
    memory_limit_gb: float | None = None,
) -> RunOutcome:
    options = RunOptions(
        folder,
        resume=resume,
        memory_limit_gb=memory_limit_gb,
        rollout_device="cpu",
        learner_device="cpu",
        dtype="fp32",
    )
    return run_arena(config or run_config(), options, stop or Stop(), watch)


def after(iterations: int, act: Callable[[], None]) -> Watch:
    """Somebody who looks on and does something once so many iterations are written down."""

    class Watching:
        def __init__(self, records: BatchedRecords) -> None:
            self._records = records

        def write(self, kind: str, **values: RecordValue) -> None:
            self._records.write(kind, **values)
            if kind == "timing" and values["iteration"] == iterations - 1:
                act()

        def close(self) -> None:
            """Nothing is held."""

    @contextmanager
    def watching(records: BatchedRecords, folder: Path, limit: Callable[[], int]) -> Iterator[Recorder]:
        yield Watching(records)

    return cast("Callable[[BatchedRecords, Path, Callable[[], int]], AbstractContextManager[Recorder]]", watching)


def boom() -> None:
    raise Boom


def read(path: Path) -> Json:
    found: Json = json.loads(path.read_text())
    return found


def report(folder: Path) -> Json:
    return read(folder / REPORT)


def newest(folder: Path) -> Path:
    return checkpoint.checkpoints(folder / "checkpoints")[-1]


def digests(folder: Path) -> dict[str, str]:
    """Of every adapter in the newest checkpoint, by name and version."""
    return {key: digest(adapter) for key, adapter in checkpoint.load(newest(folder)).adapters.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedmoe.arena.run.run.make_task", lambda name, options: LettersTask())
        assert run(folder) == RunOutcome("finished")
    return folder


def of_kind(folder: Path, kind: str, **values: RecordValue) -> list[Record]:
    found = [record for record in records_of(folder) if record["kind"] == kind]
    return [record for record in found if all(record[name] == value for name, value in values.items())]


def test_a_run_leaves_every_promised_file_and_nothing_else_e12_e13_e14(finished: Path) -> None:
    assert sorted(path.name for path in finished.iterdir()) == sorted(
        [METRICS, RESULTS, REPORT, EPISODES, "checkpoints", "lock", "logs"]
    )
    assert sorted(path.name for path in (finished / "logs").iterdir()) == ["training.log", "training_runner.log"]
    found = checkpoint.checkpoints(finished / "checkpoints")
    assert {row["iteration"] for row in read_episodes(finished / EPISODES)} == set(range(5))
    assert len(found) == 2, "only so many are kept"
    assert len(list((finished / "checkpoints").iterdir())) == 2
    for path in found:
        assert re.fullmatch(r"checkpoint_\d{8}_\d{6}", path.name)
        for name in ("config.json", "performance_metrics.json", f"{RESULTS}.gz", f"{REPORT}.gz", "state.json.gz"):
            assert (path / name).is_file(), name
        for name in ("training.log.gz", "training_runner.log.gz"):
            assert gzip.decompress((path / "logs" / name).read_bytes()), name
        for name in NAMES:
            assert (path / "adapters" / name / "adapter_model.safetensors").is_file()
        assert read(path / "config.json") == run_config().model_dump(mode="json")


def test_the_logs_tell_the_life_of_the_process_and_of_the_training_e14(finished: Path) -> None:
    runner, training = ((finished / "logs" / name).read_text() for name in ("training_runner.log", "training.log"))
    for event in ("run_begins", "base_model", "checkpoint", "run_ends"):
        assert f" info {event} " in runner, event
    assert runner.count(" info checkpoint ") == 4, "after 2, 3 (the end of a phase), 4 and 5 (the end)"
    assert training.count(" info iteration ") == 5
    assert training.count(" info evaluation ") == len(of_kind(finished, "evaluation"))


def test_the_records_are_all_there_and_in_order(finished: Path) -> None:
    assert next(iter(records_of(finished)))["kind"] == "run"
    for iteration in range(5):
        mode = "competitive" if iteration < 3 else "team_battle"
        found = of_kind(finished, "policy", iteration=iteration)
        assert [record["policy"] for record in found] == list(NAMES)
        assert {(record["mode"], record["version"]) for record in found} == {(mode, iteration + 1)}
        for kind in ("team", "timing"):
            assert len(of_kind(finished, kind, iteration=iteration)) == 1
        for kind in ("credit", "rating"):
            assert [record["policy"] for record in of_kind(finished, kind, iteration=iteration)] == list(NAMES)
    measured = {record["iteration"] for record in of_kind(finished, "evaluation", opponent="base")}
    assert measured == {0, 2, 3, 4, 5}, "before training, every second iteration, and at the end of each phase"
    assert len(of_kind(finished, "decision", what="strategy")) == 2 * 2 * 2, "two teams in each of two groups"


def test_the_results_are_the_numbers_of_the_records_e12(finished: Path) -> None:
    results = read(finished / RESULTS)
    assert (results["task"], results["seed"], results["iterations"]) == ("test:letters", 3, 5)
    assert results["modes_run"] == [
        {"mode": "competitive", "first": 0, "last": 2},
        {"mode": "team_battle", "first": 3, "last": 4},
    ]
    held = digests(finished)
    policies = cast("dict[str, dict[str, Any]]", results["policies"])
    assert sorted(policies) == sorted(NAMES)
    for name, found in policies.items():
        turns = of_kind(finished, "policy", policy=name)
        for what in ("reward", "accuracy", "valid", "efficiency_token", "mode"):
            assert found["over_time"][what] == [record[what] for record in turns]
        assert found["totals"] == {
            what: sum(int(str(record[what])) for record in turns) for what in ("episodes", "turns", "tokens")
        }
        assert found["version"] == 5
        assert found["weight_updates"] == turns[-1]["weight_updates"]
        scores = of_kind(finished, "evaluation", policy=name, opponent="base")
        for place, record in (("initial", scores[0]), ("final", scores[-1])):
            assert found["held_out"][place] == {
                key: record[key] for key in ("iteration", "mode", "score", "low", "high", "episodes", "questions")
            }
        assert found["held_out"]["gain"] == pytest.approx(
            float(str(scores[-1]["score"])) - float(str(scores[0]["score"]))
        )
        rating = of_kind(finished, "rating", policy=name)[-1]
        assert found["rating"] == {key: rating[key] for key in ("mu", "sigma", "games")}
        assert found["adapters"] == {key: held[key] for key in held if key.partition("@")[0] == name}
    assert f"{NAMES[0]}@5" in held


def test_the_report_says_how_the_run_went_e12(finished: Path) -> None:
    found, config = report(finished), run_config().model_dump(mode="json")
    assert (found["status"], found["reason"], found["resumed_from"]) == ("finished", "", None)
    assert (found["config"], found["config_digest"]) == (config, checkpoint.config_digest(config))
    assert found["checkpoints"] == [path.name for path in checkpoint.checkpoints(finished / "checkpoints")]
    work = cast("dict[str, float]", found["work"])
    timings = of_kind(finished, "timing")
    assert (work["iterations"], work["episodes"]) == (5, 5 * 4 * 2 * 4)
    assert work["tokens"] == sum(int(str(record["tokens"])) for record in timings)
    assert work["iteration_seconds"] == pytest.approx(
        sum(float(str(record["iteration_seconds"])) for record in timings)
    )
    assert cast("dict[str, str]", found["environment"])["base"] == "tiny"


def test_the_metrics_of_the_last_checkpoint_are_those_of_the_last_iteration_e13(finished: Path) -> None:
    found = read(newest(finished) / "performance_metrics.json")
    assert (found["iteration"], found["mode"]) == (4, "team_battle")
    policies = cast("dict[str, dict[str, object]]", found["policies"])
    for name in NAMES:
        last = of_kind(finished, "policy", policy=name)[-1]
        assert {key: policies[name][key] for key in last if key not in ("at", "kind", "policy")} == {
            key: value for key, value in last.items() if key not in ("at", "kind", "policy")
        }


def stopped_after(folder: Path, iterations: int) -> None:
    stop = Stop()
    if iterations == 0:
        stop.ask("enough")
    ending = run(folder, stop=stop, watch=after(iterations, lambda: stop.ask("enough")))
    assert ending == RunOutcome("stopped", "enough")
    assert (report(folder)["status"], report(folder)["reason"]) == ("stopped", "enough")
    assert checkpoint.load(newest(folder)).iteration == iterations


@pytest.mark.parametrize("iterations", [0, 3])
def test_a_run_that_was_stopped_goes_on_as_if_it_never_had(iterations: int, finished: Path, tmp_path: Path) -> None:
    stopped_after(tmp_path, iterations)
    last = newest(tmp_path).name
    assert run(tmp_path, resume=True) == RunOutcome("finished")
    assert curve(tmp_path) == curve(finished)
    assert digests(tmp_path) == digests(finished)
    assert report(tmp_path)["resumed_from"] == last
    assert read(tmp_path / RESULTS).keys() == read(finished / RESULTS).keys()


@pytest.mark.parametrize("iterations", [1, 3, 5])
def test_a_run_that_broke_goes_on_from_its_newest_checkpoint(iterations: int, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(Boom):
        run(tmp_path, watch=after(iterations, boom))
    assert report(tmp_path)["status"] == "failed"
    assert "Boom" in (tmp_path / "logs" / "training_runner.log").read_text()
    assert run(tmp_path, resume=True) == RunOutcome("finished")
    assert curve(tmp_path) == curve(finished)
    assert digests(tmp_path) == digests(finished)


def test_a_run_may_be_stopped_and_continued_after_every_iteration(finished: Path, tmp_path: Path) -> None:
    stopped_after(tmp_path, 0)
    for iterations in range(1, 5):
        stop = Stop()
        asked = after(iterations, lambda stop=stop: stop.ask("again"))  # type: ignore[misc]
        assert run(tmp_path, resume=True, stop=stop, watch=asked) == RunOutcome("stopped", "again")
    assert run(tmp_path, resume=True).status == "finished"
    assert curve(tmp_path) == curve(finished)
    assert digests(tmp_path) == digests(finished)


@pytest.mark.parametrize(("mode", "bound"), [("cooperative", 0), ("mixed", 1)])
def test_every_mode_and_bound_goes_on_exactly(mode: str, bound: int, tmp_path: Path) -> None:
    config = tiny_config([(mode, 4)], max_staleness=bound, adapt=True)
    stop = Stop()
    run(tmp_path / "whole", config)
    run(tmp_path / "parts", config, stop=stop, watch=after(3, lambda: stop.ask("enough")))
    run(tmp_path / "parts", config, resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")


def test_a_game_with_a_replacement_goes_on_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.arena.run.run.make_task", lambda name, options: DUEL)
    monkeypatch.setattr(CompetitiveMode, "min_games", 2)
    monkeypatch.setattr(CompetitiveMode, "cooldown", 3)
    monkeypatch.setattr("fedmoe.arena.population.pbt.SURELY", 0.01)
    config = tiny_config([("competitive", 3), ("competitive", 4)], groups=4)
    stop = Stop()
    run(tmp_path / "whole", config)
    assert any(record["what"] == "replace" for record in of_kind(tmp_path / "whole", "decision"))
    run(tmp_path / "parts", config, stop=stop, watch=after(5, lambda: stop.ask("enough")))
    run(tmp_path / "parts", config, resume=True)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    assert digests(tmp_path / "parts") == digests(tmp_path / "whole")
    lineages = [read(tmp_path / part / RESULTS)["lineage"] for part in ("whole", "parts")]
    assert lineages[0] == lineages[1] != []


def test_a_finished_run_has_nothing_to_go_on_with(finished: Path, tmp_path: Path) -> None:
    copytree(finished, tmp_path, dirs_exist_ok=True)
    before = curve(tmp_path), [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")]
    assert run(tmp_path, resume=True) == RunOutcome("finished")
    assert (curve(tmp_path), [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")]) == before


def test_a_stop_that_comes_with_the_last_iteration_finds_the_run_finished(tmp_path: Path) -> None:
    stop = Stop()
    assert run(tmp_path, stop=stop, watch=after(5, lambda: stop.ask("too late"))) == RunOutcome("finished")


def test_a_run_is_never_written_over_unasked(tmp_path: Path) -> None:
    stopped_after(tmp_path, 2)
    before = (tmp_path / METRICS).read_bytes()
    with pytest.raises(RunError, match="holds a run already: pass --resume, --fresh or another --out"):
        run(tmp_path)
    assert (tmp_path / METRICS).read_bytes() == before
    (tmp_path / METRICS).unlink()
    with pytest.raises(RunError, match="holds a run already"):
        run(tmp_path)


def test_another_configuration_cannot_go_on_with_a_run(tmp_path: Path) -> None:
    stopped_after(tmp_path, 2)
    before = (tmp_path / METRICS).read_bytes()
    other = run_config().model_copy(update={"seed": 4})
    advice = "seed: 3 in the checkpoint, 4 now. Set these back, or begin anew with --fresh or another --out"
    with pytest.raises(RunError, match=f"was made with another configuration, after 2 iterations: {advice}"):
        run(tmp_path, other, resume=True)
    assert (tmp_path / METRICS).read_bytes() == before


def test_more_iterations_and_another_evaluation_may_go_on_and_are_told(finished: Path, tmp_path: Path) -> None:
    config = run_config()
    copytree(finished, tmp_path, dirs_exist_ok=True)
    last = config.phases[-1]
    phases = (*config.phases[:-1], last.model_copy(update={"iterations": last.iterations + 1}))
    more = config.model_copy(
        update={"phases": phases, "evaluation": config.evaluation.model_copy(update={"episodes": 9})}
    )
    assert run(tmp_path, more, resume=True) == RunOutcome("finished")
    told = [str(record["after"]) for record in of_kind(tmp_path, "decision") if record["what"] == "configuration"]
    assert len(told) == 2
    assert "evaluation.episodes: 6 in the checkpoint, 9 now" in told
    newest = [record for record in of_kind(tmp_path, "evaluation") if record["iteration"] == more.iterations]
    assert {record["episodes"] for record in newest} == {9}


def test_a_start_that_was_refused_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("fedmoe.arena.run.run.make_task", lambda name, options: DUEL)
        with pytest.raises(ModeError, match="team_battle"):
            run(tmp_path)
    assert run(tmp_path, tiny_config([("competitive", 1)])) == RunOutcome("finished")


def test_to_resume_what_never_began_is_to_begin_the_same_run_as_any_other_of_its_configuration(
    tmp_path: Path, finished: Path
) -> None:
    assert run(tmp_path, resume=True) == RunOutcome("finished")
    assert curve(tmp_path) == curve(finished)
    assert digests(tmp_path) == digests(finished)
    assert "no_checkpoint" not in (tmp_path / "logs" / "training_runner.log").read_text()


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    held = lock_folder(tmp_path)
    with pytest.raises(FolderInUseError, match="is in use by the process"):
        run(tmp_path)
    assert not (tmp_path / METRICS).exists()
    held.close()


def test_a_memory_limit_that_is_too_low_ends_the_run_in_order_e16(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(MemoryLimitError, match=r"GiB are in use, above the limit of 0\.05 GiB") as told:
        run(tmp_path, memory_limit_gb=0.05)
    found = report(tmp_path)
    assert (found["status"], found["reason"]) == ("stopped", str(told.value))
    assert "can be resumed" in str(told.value)
    assert checkpoint.load(newest(tmp_path)).iteration == 1, "caches went first"
    runner = (tmp_path / "logs" / "training_runner.log").read_text()
    assert "memory_caches_dropped" in runner
    assert "memory_limit_reached" in runner
    assert run(tmp_path, resume=True) == RunOutcome("finished")
    assert curve(tmp_path) == curve(finished)


def short_of_memory(monkeypatch: pytest.MonkeyPatch, fits: Callable[[Learner], bool]) -> None:
    """Updates find no memory unless `fits` says so."""
    accumulate = Learner._accumulate

    def limited(self: Learner, *arguments: Any) -> Any:
        found = accumulate(self, *arguments)  # in the middle of it: gradients are there already
        if not fits(self):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is")
        return found

    monkeypatch.setattr(Learner, "_accumulate", limited)


def test_an_update_that_does_not_fit_is_tried_again_with_a_smaller_batch_e16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config([("competitive", 2)], micro_batch_tokens=1024)
    run(tmp_path / "whole", config)
    short_of_memory(monkeypatch, lambda learner: learner.micro_batch_tokens <= 256)
    assert run(tmp_path / "short", config) == RunOutcome("finished")
    runner = (tmp_path / "short" / "logs" / "training_runner.log").read_text()
    for before, after_it in ((1024, 512), (512, 256)):
        assert f'memory_batch_reduced before={before} after={after_it} reason="CUDA out of memory"' in runner
    for one, other in zip(curve(tmp_path / "short"), curve(tmp_path / "whole"), strict=True):
        assert {key: one[key] for key in one if not isinstance(one[key], float)} == {
            key: other[key] for key in other if not isinstance(other[key], float)
        }
        numbers = {key: value for key, value in other.items() if isinstance(value, float)}
        assert {key: one[key] for key in numbers} == pytest.approx(numbers, rel=1e-3, abs=1e-5)


def test_an_update_that_never_fits_ends_the_run_where_it_can_go_on_exactly(
    tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        seen: list[int] = []
        short_of_memory(patch, lambda learner: seen.append(1) or len(seen) < 4)  # type: ignore[func-returns-value]
        with pytest.raises(MemoryLimitError, match="CUDA out of memory, and the micro-batch is at its smallest"):
            run(tmp_path)
    assert report(tmp_path)["status"] == "stopped"
    assert checkpoint.load(newest(tmp_path)).iteration == 3
    assert run(tmp_path, resume=True) == RunOutcome("finished")
    assert curve(tmp_path) == curve(finished)
    assert digests(tmp_path) == digests(finished)


def test_the_memory_limit_and_the_batch_follow_control_json_while_running_e16(tmp_path: Path) -> None:
    limits = []

    @contextmanager
    def watching(records: BatchedRecords, folder: Path, limit: Callable[[], int]) -> Iterator[Recorder]:
        def act() -> None:
            limits.append(limit())
            (folder / "control.json").write_text('{"memory_limit_gb": 3, "max_batch": 64}')

        with (
            after(1, act)(records, folder, limit) as first,
            after(3, lambda: limits.append(limit()))(cast(BatchedRecords, first), folder, limit) as second,
        ):
            yield second

    run(tmp_path, watch=watching)
    assert limits[0] > 3 * GIB
    assert limits[1] == 3 * GIB
    runner = (tmp_path / "logs" / "training_runner.log").read_text()
    assert f"memory_limit_changed limit_bytes={3 * GIB}" in runner
    assert "memory_most_batch_changed" in runner


def test_a_watched_run_ends_well_and_keeps_what_the_watchers_measured_e9_e23(tmp_path: Path) -> None:
    assert run(
        tmp_path, watch=partial(all_monitors, iterations=5, prometheus_port=None, tensorboard=True)
    ) == RunOutcome("finished")
    system = of_kind(tmp_path, "system")
    assert system
    assert all(record["process_bytes"] for record in system)
    assert list((tmp_path / "tensorboard").iterdir())
    assert cast("dict[str, float]", report(tmp_path)["peaks"])["process_bytes"] > 0


def test_only_times_differ_between_equal_runs(finished: Path) -> None:
    """What is left out of the comparisons above is really only time."""
    assert set(TIMES) == {"at", "utilisation"} | {
        name for record in records_of(finished) for name in record if name.endswith(("_second", "_seconds"))
    }
