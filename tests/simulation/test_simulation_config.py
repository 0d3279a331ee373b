from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedmoe.simulation.config import (
    AsynchronousScheme,
    Fleet,
    RecordedWork,
    ReportSection,
    RoundScheme,
    SimulationConfig,
    SimulationConfigError,
    TrainingWork,
    read_config,
)

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "sets nothing; begin with a copy of demo/simulation.toml"),
        ("sekonds = 3\n", "sekonds: there is no such key; did you mean seconds"),
        ("[fleet]\nworkres = 3\n", "fleet.workres: there is no such key; did you mean workers"),
        ("[fleet.outages]\nevery = 3\nlenght = 3\n", "lenght: there is no such key; did you mean length"),
        ('[work]\nkind = "training"\nrnak = 3\n', "rnak: there is no such key; did you mean rank"),
        (
            '[[schemes]]\nname = "a"\nkind = "asynchronous"\nbufer_size = 3\n',
            "bufer_size: there is no such key; did you mean buffer_size",
        ),
        (
            '[[schemes]]\nname = "a"\nkind = "asynchronous"\nstaleness = "old"\n',
            "unknown staleness 'old'; known: constant",
        ),
        (
            '[[schemes]]\nname = "a"\nkind = "asynchronous"\nwire_dtype = "fp8"\n',
            "Input should be 'fp32', 'bf16' or 'int8'",
        ),
        ('[[schemes]]\nname = "a"\nkind = "rounds"\nbuffer_size = 3\n', "buffer_size: there is no such key"),
        ('[[schemes]]\nname = "a"\n[[schemes]]\nname = "a"\n', "kind"),
        (
            '[[schemes]]\nname = "a"\nkind = "rounds"\n[[schemes]]\nname = "a"\nkind = "rounds"\n',
            "every scheme needs a name of its own",
        ),
        ('[report]\nbaseline = "b"\n', "report.baseline names no scheme: 'b'"),
        ('[report]\nrobustness = ["b"]\n', "report.robustness names no scheme: 'b'"),
        ("[fleet]\nup_mbit = [10, 1]\n", "the lower bound comes first"),
        ("[fleet]\nworkers = 2\nexperts = 3\n", "3 experts need at least as many workers, got 2"),
        ("[fleet]\nslowness = []\n", "fleet.slowness"),
        ('[fleet]\nworkers = 500\n[work]\nkind = "training"\n', 'at most 200 can train; set work.kind = "recorded"'),
        ("[work]\nkind = 'recorded'\nparameters = 20000\n", "less than or equal to 10000"),
        ("seconds = inf\n", "seconds"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_where_and_what_to_do(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "simulation.toml"
    file.write_text(content)
    with pytest.raises(SimulationConfigError) as refused:
        read_config(file)
    assert says in str(refused.value)


def test_the_example_is_read() -> None:
    config = read_config(ROOT / "demo" / "simulation.toml")
    assert config.work.kind == "training"
    assert config.fleet.slowness == (1, 1, 2, 4, 8)
    assert config.baseline == "rounds"


def test_the_defaults_make_a_simulation(tmp_path: Path) -> None:
    file = tmp_path / "simulation.toml"
    file.write_text("seed = 3\n")
    config = read_config(file)
    assert (config.work.kind, config.fleet.workers, config.baseline) == ("recorded", 100, "asynchronous")


def test_every_key_stands_in_the_document() -> None:
    text = (ROOT / "docs" / "scale.md").read_text().partition("## Simulation")[2]
    sections = (RecordedWork, TrainingWork, Fleet, AsynchronousScheme, RoundScheme, ReportSection, SimulationConfig)
    keys = {key for section in sections for key in section.model_fields} - {"work", "fleet", "schemes", "report"}
    assert [key for key in sorted(keys) if not re.search(rf"`(\w+ = \{{ )?{key}\b", text)] == []
