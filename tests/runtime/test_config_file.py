"""One file configures every process: flag > environment > file > default, and nothing in it is ignored."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import typer
from pydantic import SecretStr
from pydantic_settings import BaseSettings

from fedmoe.cli import coordinator, evaluator, main, worker
from fedmoe.cli.gateway_options import EVALUATE_OPTIONS, GENERATE_OPTIONS, SERVE_OPTIONS
from fedmoe.cli.options import OptionText, configured
from fedmoe.config import PROCESSES
from fedmoe.runtime.config_file import ConfigFileError, toml_kind, variables_of

OPTIONS: Mapping[str, Mapping[str, OptionText]] = {
    "coordinator": coordinator._OPTIONS,
    "worker": worker._OPTIONS,
    "evaluator": evaluator._OPTIONS,
    "gateway": {**SERVE_OPTIONS, **EVALUATE_OPTIONS, **GENERATE_OPTIONS},
}
REQUIRED: Mapping[str, Mapping[str, str]] = {
    "coordinator": {},
    "gateway": {},
    "worker": {"coordinator_url": "http://a:1", "worker_id": "w", "specialty": "e", "dataset": "d"},
    "evaluator": {"coordinator_url": "http://a:1", "evaluator_id": "w", "expert": "e", "held_out": "d"},
}
#: Values of fields that take neither any word nor a number around ten.
VALUES: Mapping[str, tuple[object, ...]] = {
    "coordinator_url": ("http://b:1", "http://b:2", "http://b:3"),
    "advertise": ("http://b:1", "http://b:2", "http://b:3"),
    "blobs": ("s3://a", "s3://b", "s3://c"),
    "database_url": ("postgresql://a/b", "postgresql://a/c", "postgresql://a/d"),
    "gate_tolerance": (0.25, 0.5, 0.75),
    "eval_split": (0.25, 0.5, 0.75),
    "lora_dropout": (0.25, 0.5, 0.75),
    "strategy": ("sum", "concat", "scaled"),
    "server_optimizer": ("nesterov", "adam", "nesterov"),
    "staleness": ("constant", "hinge", "exponential"),
    "fold_staleness": ("polynomial", "hinge", "exponential"),
    "report_to": ("wandb", "trackio,mlflow", "mlflow"),
    "token": ("a" * 20, "b" * 20, "c" * 20),
    "admin_token": ("d" * 20, "e" * 20, "f" * 20),
}
#: What a field needs beside it.
_REPLICA = {"replica": "r", "advertise": "http://a:1", "replica_secret_file": "f", "blobs": "s3://a"}
_REPLICA |= {"database_url": "postgresql://a/b"}
BESIDE: Mapping[str, Mapping[str, object]] = {
    **dict.fromkeys(("replica", "advertise", "replica_secret_file", "lease_seconds"), _REPLICA),
    "merge_after": {"start_from": "gateway"},
    "fold_staleness": {"start_from": "gateway"},
    "accept_database_loss": {"database_url": "postgresql://a/b"},
    "tls_cert": {"tls_key": "k"},
    "tls_key": {"tls_cert": "k"},
    "early_stopping_patience": {"eval_split": 0.5},
    "early_stopping_threshold": {"eval_split": 0.5, "early_stopping_patience": 3},
    "eval_steps": {"eval_split": 0.5},
    "lr_scheduler_type": {"max_steps": 100},
}
FIELDS = [(process, name) for process, kind in PROCESSES.items() for name in kind.model_fields]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder without a file, and no variable of ours."""
    for variable in [name for name in os.environ if name.startswith("FEDMOE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def three_values(kind: type[BaseSettings], name: str) -> list[tuple[object, ...]]:
    """Values for flag, environment and file; twice where there are not three different ones."""
    annotation = kind.model_fields[name].annotation
    choices = next((get_args(part) for part in (annotation, *get_args(annotation)) if get_origin(part) is Literal), ())
    if choices or toml_kind(kind.model_fields[name]) is bool:
        a, b, *more = [*(choices or (True, False)), *choices][:3] if len(choices) != 1 else choices * 2
        return [(a, b, more[0])] if len(choices) > 2 else [(a, b, a), (b, b, a)]
    numbers = {int: (11, 12, 13), float: (2.5, 3.5, 4.5), list: (["a=b"], ["c=d"], ["e=f"]), str: ("ab", "bb", "cb")}
    return [VALUES.get(name, numbers[toml_kind(kind.model_fields[name])])]


def flags(name: str, value: object) -> list[str]:
    option = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    return [word for item in (value if isinstance(value, list) else [value]) for word in (option, str(item))]


def as_toml(values: Mapping[str, object]) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def started(process: str, arguments: list[str]) -> BaseSettings:
    """The configuration that the process would run with; the options are the command's own."""
    command, configurations = probe(process)
    command(arguments, standalone_mode=False)
    return configurations.pop()


@cache
def probe(process: str) -> tuple[Callable[..., object], list[BaseSettings]]:
    """A command with the options of a process, and where it puts the configuration it would run with."""
    configurations: list[BaseSettings] = []
    app = typer.Typer(add_completion=False)

    @app.command()
    @configured(PROCESSES[process], OPTIONS[process])
    def _start(config: BaseSettings) -> None:
        configurations.append(config)

    return typer.main.get_command(app), configurations


#: Whether a flag, a variable and the file say something, in every combination.
LEVELS = list(itertools.product((True, False), repeat=3))


@pytest.mark.parametrize(("process", "name"), FIELDS)
def test_flag_wins_over_environment_over_file_over_default(process: str, name: str, folder: Path) -> None:
    kind = PROCESSES[process]
    beside = {**REQUIRED[process], **{key: value for key, value in BESIDE.get(name, {}).items() if key != name}}
    fixed = [word for key, value in beside.items() if key != name for word in flags(key, value)]
    file = folder / "fedmoe.toml"
    required = kind.model_fields[name].is_required()
    for by_flag, by_environment, by_file in three_values(kind, name):
        for levels in LEVELS:
            if not any(levels) and (required or name in BESIDE.get(name, {}) or name.startswith("tls_")):
                continue
            flag = flags(name, by_flag) if levels[0] else []
            if flag and flag[0].startswith("--no-") and name in ONLY_ON:
                continue
            text = json.dumps(by_environment) if isinstance(by_environment, list | bool) else str(by_environment)
            with pytest.MonkeyPatch.context() as patch:
                if levels[1]:
                    patch.setenv(variables_of(kind, name)[0], text)
                file.write_text(f"[{process}]\n" + as_toml({name: by_file} if levels[2] else {}))
                file.chmod(0o600)
                value = getattr(started(process, [*fixed, *flag]), name)
            given = (by_flag, by_environment, by_file)
            expected = next(
                (item for item, level in zip(given, levels, strict=True) if level), kind.model_fields[name].default
            )
            value = value.get_secret_value() if isinstance(value, SecretStr) else value
            assert (list(value) if isinstance(expected, list) else value) == expected, (levels, given)


#: Switches without a --no-... form.
ONLY_ON = {"insecure", "allow_network_fs", "accept_database_loss", "skip_damaged", "accept_older_journal"}


def refused(text: str, capsys: pytest.CaptureFixture[str], *arguments: str, mode: int = 0o600) -> str:
    """What a command says of a file that it refuses."""
    file = Path("fedmoe.toml")
    file.write_text(text)
    file.chmod(mode)
    with pytest.raises(SystemExit) as error:
        main(list(arguments) or ["coordinator"])
    assert error.value.code
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[coordinater]\n", "the section [coordinater] is not known; did you mean coordinator?"),
        ("port = 5\n", "the key port outside a section is not known"),
        ("worker = 5\n", "write [worker] on a line of its own"),
        ("[coordinator]\nprot = 5\n", "[coordinator] prot: not known; did you mean port?"),
        ("[worker]\nlora-r = 5\n", "[worker] lora-r: not known; did you mean lora_r?"),
        ('[coordinator]\nport = "5000"\n', "[coordinator] port: expected a whole number, got a string"),
        ("[coordinator]\nport = true\n", "[coordinator] port: expected a whole number, got true or false"),
        ("[coordinator]\nport = 70000\n", "fedmoe.toml: [coordinator] port: Input should be less than or equal to"),
        ("[coordinator]\nport = \n", "fedmoe.toml: not TOML"),
    ],
)
def test_a_mistake_names_file_section_and_key(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(text, capsys)


@pytest.mark.skipif(os.name != "posix", reason="modes of files are POSIX's")
def test_a_secret_that_others_can_read_is_refused_and_never_shown(capsys: pytest.CaptureFixture[str]) -> None:
    secret = "s3cret-" * 4
    said = refused(f'[coordinator]\ntoken = "{secret}"\n', capsys, mode=0o644)
    assert "[coordinator] token" in said
    assert "chmod 600" in said
    assert secret not in said


def test_the_file_is_that_of_the_flag_else_of_the_variable_else_of_the_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("fedmoe.toml", "variable.toml", "flag.toml")):
        (folder / name).write_text(f"[coordinator]\nport = {number + 1}\n")
    assert getattr(started("coordinator", []), "port") == 1  # noqa: B009
    monkeypatch.setenv("FEDMOE_CONFIG", "variable.toml")
    assert getattr(started("coordinator", []), "port") == 2  # noqa: B009
    assert getattr(started("coordinator", ["--config", "flag.toml"]), "port") == 3  # noqa: B009
    with pytest.raises(ConfigFileError, match=r"missing\.toml: no such file"):
        started("coordinator", ["--config", "missing.toml"])


@pytest.mark.parametrize(("process", "name"), FIELDS)
def test_variables_of_other_programs_set_nothing(process: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = [word for key, value in REQUIRED[process].items() for word in flags(key, value)]
    before = started(process, fixed)
    monkeypatch.setenv(name.upper(), str(three_values(PROCESSES[process], name)[0][0]))
    assert started(process, fixed) == before


@pytest.mark.parametrize("variable", ["FEDMOE_REPORT_TO", "FEDMOE_WORKER_REPORT_TO"])
def test_trackers_can_be_named_for_all_runs_or_for_workers(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "mlflow")
    fixed = [word for key, value in REQUIRED["worker"].items() for word in flags(key, value)]
    assert getattr(started("worker", fixed), "report_to") == "mlflow"  # noqa: B009


def test_the_file_in_the_documents_can_be_used(folder: Path) -> None:
    document = Path(__file__).parents[2] / "docs" / "configuration.md"
    block = document.read_text().split("```toml\n")[1].split("```")[0]
    (folder / "fedmoe.toml").write_text(block)
    for process in PROCESSES:
        assert started(process, []).model_fields_set


def test_show_names_the_origin_and_masks_secrets(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "fedmoe.toml"
    file.write_text(f'[coordinator]\nport = 7\nhost = "::1"\ntoken = "{"t" * 20}"\n')
    file.chmod(0o600)
    monkeypatch.setenv("FEDMOE_COORDINATOR_HOST", "127.0.0.2")
    main(["config", "show", "coordinator", "--json"])
    shown = capsys.readouterr().out
    values = json.loads(shown)["processes"]["coordinator"]
    assert values["port"] == {"value": 7, "origin": "file"}
    assert values["host"] == {"value": "127.0.0.2", "origin": "environment FEDMOE_COORDINATOR_HOST"}
    assert values["strategy"]["origin"] == "default"
    assert values["token"]["origin"] == "file"
    assert "t" * 20 not in shown


def test_the_schema_knows_every_key_of_every_section_and_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    main(["config", "schema"])
    sections = json.loads(capsys.readouterr().out)["properties"]
    assert {name: set(section["properties"]) for name, section in sections.items()} == {
        name: set(kind.model_fields) for name, kind in PROCESSES.items()
    }
    assert all(section["additionalProperties"] is False and "required" not in section for section in sections.values())


def test_join_reads_the_section_of_the_worker(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused("[worker]\nlora_r = 0\n", capsys, "join", LINE, "--specialty", "e", "--dataset", "d")
    assert "fedmoe.toml: [worker] lora_r: Input should be greater than or equal to 1" in said
    said = refused("[worker]\nlora_r = 4\n", capsys, "join", LINE)
    assert "Missing option '--specialty'" in said
    said = refused('[worker]\nspecialty = "e"\ndataset = "d"\n', capsys, "join", LINE)
    assert "cannot be reached" in said or "127.0.0.1" in said


#: Of nobody: nothing listens on port 1.
LINE = f"fmj_{'a' * 43}@http://127.0.0.1:1"
