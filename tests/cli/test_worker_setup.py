"""What the operator of a worker reads when something is wrong before training begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from builders import write_rows
from live import JOIN, listening, open_house
from support import free_port
from workers import Federation, Setup, blocks, federation

from fedmoe.cli import main
from fedmoe.cli import worker_setup as setup
from fedmoe.config import WorkerConfig
from fedmoe.models.base import LoadedBase, load_base
from fedmoe.runtime.stop_signals import StopOnSignal
from fedmoe.worker import preparation as worker_options
from fedmoe.worker.options import OptionError

Told = Callable[..., str]
NEEDED = {"coordinator_url": "http://127.0.0.1:5000", "worker_id": "w1", "specialty": "python", "dataset": "a.jsonl"}
GOOD = [{"prompt": f"{n} and one is ", "completion": f"{n + 1}"} for n in range(20)]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[Federation]:
    """A coordinator on a real socket."""
    with federation(tmp_path / "coordinator") as running:
        yield running


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Told:
    """Runs `fedmoe worker`, which must fail; gives what it said on standard error, checked to be errors in words."""
    monkeypatch.setattr("fedmoe.cli.worker.configure", lambda: None)  # it would log to this test's streams for good
    monkeypatch.delenv("FEDMOE_TOKEN", raising=False)

    def run(status: int, dataset: Path, *options: str, url: str = f"http://127.0.0.1:{free_port()}") -> str:
        fixed = ["--coordinator-url", url, "--worker-id", "w1", "--specialty", "python", "--base-model", "tiny"]
        state = ["--state-dir", str(tmp_path / "w1"), "--dtype", "fp32", "--device", "cpu"]
        if "--num-train-epochs" not in options:
            state += ["--max-steps", "2"]
        with pytest.raises(SystemExit) as left:
            main(["worker", *fixed, *state, "--dataset", str(dataset), *options])
        assert left.value.code == status
        said = capsys.readouterr().err
        assert said
        assert all(line.startswith("error: ") for line in said.splitlines()), said
        return said.strip()

    return run


@pytest.fixture
def _no_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> LoadedBase:
        raise AssertionError("the base model was loaded before the data was found fit")

    monkeypatch.setattr(setup, "load_base", fail)


@pytest.mark.usefixtures("_no_base_model")
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "d.jsonl"),
        (b"", "empty"),
        (b"\n\n", "d.jsonl"),
        (b"not json\n", "line 1"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "comple', "line 2"),
        (b'{"question": "a"}\n', "no known row format"),
        (b'["a"]\n', "line 1"),
        (b'{"messages": [{"role": "user", "content": "hello"}]}\n', "nothing to learn from"),
        (b'{"prompt": "a", "completion": ""}\n' * 3, "'completion' is empty"),
    ],
)
def test_data_that_is_not_fit_is_told_before_the_base_model_is_loaded(
    content: bytes | None, words: str, told: Told, tmp_path: Path
) -> None:
    file = tmp_path / "d.jsonl"
    if content is not None:
        file.write_bytes(content)
    said = told(1, file)
    assert words in said
    assert "d.jsonl" in said


@pytest.mark.usefixtures("_no_base_model")
def test_a_coordinator_that_is_not_there_is_told_before_the_base_model_is_loaded(told: Told, tmp_path: Path) -> None:
    said = told(69, write_rows(tmp_path / "d.jsonl", *GOOD))
    assert "does not answer" in said
    assert said.count("\n") == 0


@pytest.mark.usefixtures("_no_base_model")
def test_a_path_that_is_not_the_coordinators_is_named(told: Told, tmp_path: Path, house: Federation) -> None:
    said = told(1, write_rows(tmp_path / "d.jsonl", *GOOD), url=f"{house.url}/somewhere")
    assert said == "error: GET /somewhere/federation: Not Found. [unknown_route]"


@pytest.mark.parametrize(
    "url", ["localhost:5000", "ftp://h", "http://", "http://h:99999", "http://a b", "http://u:p@h"]
)
def test_a_url_that_cannot_be_one_shows_what_one_looks_like(url: str, told: Told, tmp_path: Path) -> None:
    said = told(2, tmp_path / "d.jsonl", url=url)
    assert said.startswith("error: --coordinator-url: expected a URL like http://192.168.1.100:5000")


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "1e-9", "5m", "", "315360000", "0.009", "3600.1"])
def test_a_sync_interval_out_of_range_shows_the_range(interval: str, told: Told, tmp_path: Path) -> None:
    said = told(2, tmp_path / "d.jsonl", f"--sync-interval={interval}")
    assert said == (
        f"error: --sync-interval: expected seconds from 0.01 to 3600 (5 to 30 recommended), got {interval!r}"
    )


@pytest.mark.usefixtures("_no_base_model")
@pytest.mark.parametrize(("options", "words"), [([], "token"), (["--token", "x" * 32], "token")])
def test_a_missing_or_wrong_token_is_told_without_showing_it(
    options: list[str], words: str, told: Told, tmp_path: Path
) -> None:
    (tmp_path / "locked").mkdir()
    with open_house(tmp_path / "locked", tokens=True) as opened, listening(opened.app) as server:
        said = told(1, write_rows(tmp_path / "d.jsonl", *GOOD), *options, url=server.url)
    assert words in said.lower()
    assert "[unauthorised]" in said
    assert "x" * 32 not in said
    assert JOIN not in said


@pytest.mark.usefixtures("_no_base_model")
def test_a_state_directory_of_another_worker_is_told_before_the_base_model_is_loaded(
    told: Told, tmp_path: Path, house: Federation
) -> None:
    file = write_rows(tmp_path / "d.jsonl", *GOOD)
    (tmp_path / "w1").mkdir()
    identity = {"worker": "w2", "expert": "sql", "epoch": "e1"}
    (tmp_path / "w1" / "identity.json").write_text(json.dumps(identity))
    assert "belongs to worker 'w2' training 'sql', not to 'w1'" in told(1, file, url=house.url)


@pytest.mark.usefixtures("_no_base_model")
def test_a_state_directory_that_cannot_be_made_is_told(told: Told, tmp_path: Path, house: Federation) -> None:
    file = write_rows(tmp_path / "d.jsonl", *GOOD)
    (tmp_path / "w1").write_text("a file")
    assert "w1" in told(1, file, url=house.url)


@pytest.fixture
def _no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the long work began before the options were found fit")

    monkeypatch.setattr(setup, "Disclosure", fail)
    monkeypatch.setattr(setup, "QwenLoRAExpert", fail)


@pytest.mark.usefixtures("_no_training")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["--target-modules", "q_proj", "--target-modules", "wq"],
            ["--target-modules: no linear layer is named 'wq'", "q_proj", "all-linear"],
        ),
        (["--max-length", "4096"], ["--max-length 4096", "context of 2048", "give 2048 or less"]),
        (
            ["--lr-scheduler-type", "linear", "--num-train-epochs", "1", "--max-length", "2048"],
            ["--num-train-epochs 1 are 1 steps", "--warmup-steps at most 0"],
        ),
        (["--eval-split", "0.000001"], ["--eval-split 1e-06 leaves no row held out of 20 different rows"]),
    ],
)
def test_options_that_do_not_fit_are_told_by_their_flag_before_the_long_work(
    options: list[str], words: list[str], told: Told, tmp_path: Path, house: Federation
) -> None:
    said = told(1, write_rows(tmp_path / "d.jsonl", *GOOD), *options, url=house.url)
    for word in words:
        assert word in said


@pytest.mark.usefixtures("_no_training")
def test_a_step_without_room_is_refused_with_what_fits(
    told: Told, tmp_path: Path, house: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_options, "free_memory", lambda device, processes: 60 << 20)
    batch = ("--per-device-train-batch-size", "4")
    said = told(1, write_rows(tmp_path / "d.jsonl", *GOOD), *batch, url=house.url)
    assert "a training step of 4 rows of 1024 tokens takes about 0.12 GiB" in said
    length = said.partition("--max-length ")[2].partition(",")[0]
    fits = WorkerConfig(**NEEDED, max_length=int(length), per_device_train_batch_size=4)  # type: ignore[arg-type]
    base = load_base("tiny", "cpu", "fp32")
    layout = worker_options.adapter_layout(fits, base, "all-linear")
    worker_options.check_memory_of_step(fits, base, layout, int(length))
    assert "--per-device-train-batch-size 1" in said


def test_an_adapter_unlike_the_federations_is_refused_before_the_long_work(
    told: Told, tmp_path: Path, house: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    Setup(house.url, tmp_path / "w2", name="w2", steps=1).run()
    monkeypatch.setattr(setup, "worker_data", None)
    said = told(1, write_rows(tmp_path / "d.jsonl", *GOOD), "--lora-r", "8", "--lora-alpha", "8", url=house.url)
    assert (
        "all experts share one LoRA configuration; rank: expected 4, got 8. To join, leave out --lora-r (the flag, its"
        in said
    )


def test_another_row_length_than_the_coordinators_is_refused(told: Told, tmp_path: Path) -> None:
    with federation(tmp_path / "coordinator", max_length=512) as house:
        said = told(1, write_rows(tmp_path / "d.jsonl", *GOOD), "--max-length", "256", url=house.url)
    assert "max_length: expected 512, got 256. To join, leave out --max-length (the flag" in said


def test_changed_data_are_refused_before_the_long_work(
    told: Told, tmp_path: Path, house: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.cli.worker.configure", lambda: None)
    monkeypatch.setattr(StopOnSignal, "install", lambda self: None)
    fixed = ["--coordinator-url", house.url, "--worker-id", "w1", "--specialty", "python", "--base-model", "tiny"]
    state = ["--state-dir", str(tmp_path / "w1"), "--dtype", "fp32", "--device", "cpu", "--no-send-statistics"]
    data = write_rows(tmp_path / "d.jsonl", *GOOD)
    main(["worker", *fixed, *state, "--dataset", str(data), "--max-steps", "1"])
    monkeypatch.setattr(setup, "Disclosure", None)
    said = told(1, write_rows(tmp_path / "d.jsonl", *GOOD[3:]), url=house.url)
    assert "the checkpoint is of other data: 3 of 20 samples are gone or changed, 0 are new" in said
    assert "--allow-changed-data" in said
    main(["worker", *fixed, *state, "--dataset", str(data), "--max-steps", "2", "--allow-changed-data"])
    assert [update.info["steps"] for update in house.updates()] == [1, 2]


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_one_device_for_several_processes_is_refused(
    device: str, told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = told(1, write_rows(tmp_path / "d.jsonl", *GOOD), "--device", device)
    assert f"--device {device} names one device, but WORLD_SIZE is 2" in said


def test_fewer_blocks_than_processes_is_refused_by_the_flag() -> None:
    config = WorkerConfig(**NEEDED)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"--dataset makes 3 blocks, which 4 processes .*--max-length"):
        worker_options.block_sampler(blocks(count=3), config, 0, 4)
    assert worker_options.block_sampler(blocks(count=3), config, 0, 3).shard == 1


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2.5, 7), (0.01, 1), (3, 8)])
def test_epochs_are_passes_over_the_data_in_steps(epochs: float, steps: int) -> None:
    config = WorkerConfig(
        **NEEDED,  # type: ignore[arg-type]
        num_train_epochs=epochs,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
    )
    assert worker_options.training_config(config, 10).max_steps == steps


def test_values_may_come_from_the_environment(
    tmp_path: Path, house: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.cli.worker.configure", lambda: None)
    monkeypatch.setattr(StopOnSignal, "install", lambda self: None)
    values = {
        "COORDINATOR_URL": house.url,
        "WORKER_ID": "w1",
        "SPECIALTY": "python",
        "DATASET": str(write_rows(tmp_path / "d.jsonl", *GOOD)),
        "STATE_DIR": str(tmp_path / "w1"),
        "BASE_MODEL": "tiny",
        "DTYPE": "fp32",
        "MAX_STEPS": "2",
        "LORA_R": "4",
    }
    for name, value in values.items():
        monkeypatch.setenv(f"FEDMOE_WORKER_{name}", value)
    main(["worker"])
    assert [update.info["steps"] for update in house.updates()] == [2]
