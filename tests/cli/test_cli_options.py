"""Options do not grow by accident, and the command line and the parameters of the processes are the same list."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Command, commands, option_lines
from pydantic import BaseModel

from fedmoe.config import CoordinatorConfig, WorkerConfig

COMMANDS = dict(commands())


def options_of(command: Command) -> set[str]:
    return {parameter.name for parameter in command.params} - {"help"}


#: Options that are no parameter of the process.
OF_THE_COMMAND = {"config", "dry_run", "as_json"}


def test_the_list_of_options_is_frozen() -> None:
    frozen = (Path(__file__).parent / "options.txt").read_text().splitlines()
    assert option_lines() == frozen, "meant? then run: python tests/cli/command.py > tests/cli/options.txt"


@pytest.mark.parametrize(
    ("command", "config"), [("fedmoe coordinator", CoordinatorConfig), ("fedmoe worker", WorkerConfig)]
)
def test_every_parameter_has_an_option_and_every_option_a_parameter(command: str, config: type[BaseModel]) -> None:
    assert options_of(COMMANDS[command]) - OF_THE_COMMAND == {*config.model_fields}


@pytest.mark.parametrize("command", ["fedmoe coordinator", "fedmoe worker"])
def test_an_option_is_spelt_like_its_parameter(command: str) -> None:
    for parameter in COMMANDS[command].params:
        assert parameter.opts == ["--" + parameter.name.removeprefix("as_").replace("_", "-")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_what_it_does(name: str) -> None:
    assert (COMMANDS[name].help or "").strip()


def test_options_of_the_specification_are_there() -> None:
    """A1 to A5, B6."""
    assert {"host", "port", "enable_gateway"} <= options_of(COMMANDS["fedmoe coordinator"])
    worker = {"coordinator_url", "worker_id", "specialty", "dataset", "sync_interval"}
    assert worker <= options_of(COMMANDS["fedmoe worker"])
    tool = {"coordinator_url", "save_gateway", "list_experts"}
    assert tool <= options_of(COMMANDS["get_gateway_model.py"])


def test_defaults_are_those_of_the_specification() -> None:
    """A1: port 5000; A2: a push every 10 seconds; D4: weighted_average; B6: with a gateway."""
    coordinator, worker = CoordinatorConfig.model_fields, WorkerConfig.model_fields
    assert (coordinator["port"].default, coordinator["strategy"].default) == (5000, "weighted_average")
    assert coordinator["enable_gateway"].default is True
    assert worker["sync_interval"].default == 10.0
