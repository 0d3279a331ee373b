"""Every code block of the documents is run, or read by the program that it is for."""

from __future__ import annotations

import ast
import asyncio
import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import yaml
from builders import write_rows
from code_blocks import DOCUMENTS, ROOT, Block, blocks, command_lines, own_command, parse
from live import LiveServer, listening, open_house
from structlog.testing import capture_logs
from support import make_push

from fedmoe.arena.config import ArenaConfig
from fedmoe.arena.config import read_config as read_arena
from fedmoe.cli import main
from fedmoe.config import PROCESSES
from fedmoe.lora.codec import encode
from fedmoe.lora.manifest import Manifest
from fedmoe.runtime.config_file import made, using_file

#: `text` is what a program prints or a picture; `nginx` is another program's configuration.
LANGUAGES = {"bash", "python", "toml", "json", "yaml", "text", "nginx"}
#: Run here, against a federation of the tiny model.
RUN_HERE = {
    "fedmoe config schema",
    "fedmoe data check",
    "fedmoe gateway export",
    "fedmoe gateway evaluate",
    "fedmoe gateway generate",
    "fedmoe quarantine",
    "fedmoe retract",
    "fedmoe rollback",
    "fedmoe arena check",
    "fedmoe state backup",
    "fedmoe state restore",
    "fedmoe token create",
    "fedmoe token list",
    "get_gateway_model.py",
}
#: Programs that are no part of FedMoE: the shell's, the system's, or of services that no test has.
OTHERS = {"export", "cd", "tail", "grep", "free", "df", "nvidia-smi", "ps", "echo", "mv", "chmod", "curl", "openssl"}
OTHERS |= {"sha256sum", "createdb", "mkdir", "head", "git"}


def test_every_block_says_its_language() -> None:
    found = blocks()
    assert len(found) > 70
    assert [str(block) for block in found if block.language not in LANGUAGES] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_code_is_set_by_indentation_alone(document: Path) -> None:
    """It would escape the tests here."""
    outside = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert re.findall(r"(?<=\n\n)    \S.*", outside) == []


COMMANDS = [(block, words) for block in blocks("bash") for words in command_lines(block)]


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_every_command_is_one_that_its_program_takes(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in command_lines(block):
        own = own_command(words)
        if own is not None:
            parse(*own)
        else:
            check_other(words)


def check_other(words: list[str]) -> None:
    """A command that is no command of `fedmoe`: a target, a script, an extra that there is, or a program of others."""
    program = words[0].removeprefix("./")
    if program == "make":
        targets = [word for word in words[1:] if "=" not in word]
        makefile = (ROOT / "Makefile").read_text()
        assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets), words
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\[([\w,]+)\]", " ".join(words))
        assert {extra for group in named for extra in group.split(",")} <= extras.keys(), words
    elif program == "python" and words[1] == "-c":
        compile(words[2], "<document>", "exec")
    elif program == "python" or program.endswith(".sh"):
        script = ROOT / (words[1] if program == "python" else program)
        assert script.is_file(), words
        options = [word for word in words if word.startswith("--")]
        # The scripts in the background hand everything on to the command.
        text = script.read_text() + "".join(path.read_text() for path in (ROOT / "fedmoe" / "cli").glob("*.py"))
        known = {option.replace("_", "-") for option in re.findall(r"[a-z][a-z_-]+", text)}
        assert all(option[2:] in known for option in options), words
    else:
        assert program in OTHERS, f"{words}: name the program in OTHERS if it is not ours"


def test_commands_that_are_not_run_here_are_run_by_other_tests() -> None:
    """What runs until it is stopped, trains for minutes, or needs what a test here lacks."""
    named = {own[0] for _, words in COMMANDS if (own := own_command(words))}
    assert named >= RUN_HERE
    others = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    tests = "".join(path.read_text() for path in [*others, ROOT / "tests" / "arena" / "arena_process.py"])
    for command in named - RUN_HERE:
        words = '", "'.join(command.split()[1:])
        assert re.search(rf'[(\[]"{words}"|"fedmoe", "{words}"', tests), f"no test runs {command}"


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, LiveServer]]:
    """The experts that the documents speak of, on the tiny model, with updates of Worker-7; its state directory."""
    from fedmoe.models.base import load_base
    from fedmoe.models.lora_layers import ALL_LINEAR, attach

    with pytest.MonkeyPatch.context() as patch, capture_logs():
        patch.setenv("FEDMOE_CACHE", str(tmp_path_factory.mktemp("cache")))
        base = load_base("tiny", "cpu", "fp32")
        manifest = Manifest(base.identity, attach(base.model, ALL_LINEAR, 2, 4.0).layout, 4.0)
        body = encode(manifest.layout, np.full(manifest.layout.size, 1e-3, np.float32))
        with open_house(tmp_path_factory.mktemp("house")) as house:
            house.register("python_expert", "sql_expert", manifest=manifest)
            for sequence in range(4):
                name = ("python_expert", "sql_expert")[sequence % 2]
                push = make_push(body, sequence // 2, sequence, "Worker-7", expert=name)
                asyncio.run(house.service.intake.push(*push))
            with listening(house.app) as server:
                yield house.folder.parent, server


@pytest.fixture
def example(
    federation: tuple[Path, LiveServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], str]:
    """A folder with what the examples name in it; makes of their text one with our addresses and files for theirs."""
    state, server = federation
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEDMOE_COORDINATOR_URL", server.url)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "coordinator").symlink_to(state)
    for name in ("FILE", "python_dataset", "python_test", "sql_test"):
        write_rows(tmp_path / f"{name}.jsonl", *({"text": f"a row of text, number {number}"} for number in range(80)))
    theirs = {
        r"https?://(192\.168\.1\.100|127\.0\.0\.1):5000": server.url,
        r"(?<![\w./])demo/": f"{ROOT}/demo/",
        r"/backups/": f"{tmp_path}/",
        r"\bsmollm2\b": "tiny",
        r"\bFILE(?=\s|$)": "FILE.jsonl",
        r"\bCONFIG(?=\s|$)": f"{ROOT}/demo/arena.toml",
        r"(?<=rollback python_expert )120": "1",
    }

    def ours(text: str) -> str:
        for pattern, replacement in theirs.items():
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        return text

    return ours


WITH_OWN = [
    block
    for block in blocks("bash")
    if any((own := own_command(words)) and own[0] in RUN_HERE for words in command_lines(block))
]


@pytest.mark.parametrize("block", WITH_OWN, ids=str)
def test_commands_that_end_in_seconds_do_what_the_documents_say(
    block: Block, example: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    for words in command_lines(Block(block.document, block.line, block.language, example(block.text))):
        own = own_command(words)
        if own is None or own[0] not in RUN_HERE:
            continue
        (name, arguments), status = own, None
        if name == "get_gateway_model.py":
            from fedmoe.cli.gateway import tool

            tool(arguments, standalone_mode=False)
            continue
        try:
            main([*name.split()[1:], *arguments])
        except SystemExit as left:
            status = left.code
        assert not status, f"{' '.join(words)}: {capsys.readouterr().err}"


#: Python that needs a gateway server: tests/gateway/serve has the client of the block.
SERVED = "from openai import OpenAI"


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(block: Block, example: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    code = compile(example(block.text), str(block), "exec")
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            assert all(__import__(alias.name) for alias in node.names)
    if SERVED not in block.text:
        if "gateway_model.npz" in block.text:
            main(["gateway", "save", "gateway_model.npz"])
        exec(code, {"__name__": "__main__"})
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("block", blocks("toml"), ids=str)
def test_toml_is_read_by_the_process_it_is_for(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "fedmoe.toml"
    file.write_text(block.text)
    sections = tomllib.loads(block.text).keys()
    if sections <= PROCESSES.keys():
        with using_file(file):
            for name in sections:
                made(PROCESSES[name], {}, PROCESSES)
    elif "project" not in sections:  # else it is a package's own file
        assert sections <= ArenaConfig.model_fields.keys()
        assert isinstance(read_arena(file), ArenaConfig)


@pytest.mark.parametrize("block", [*blocks("json"), *blocks("yaml")], ids=str)
def test_json_and_yaml_are_such(block: Block) -> None:
    assert cast(object, json.loads(block.text) if block.language == "json" else yaml.safe_load(block.text))
