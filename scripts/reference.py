"""Writes the reference pages of the site: commands, keys of configuration files, routes with their schemas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin
from unittest.mock import MagicMock

import typer

from fedmoe.arena.config import ArenaConfig
from fedmoe.cli.commands import app
from fedmoe.cli.config import file_schema
from fedmoe.config import PROCESSES
from fedmoe.runtime.config_file import is_secret, variables_of
from fedmoe.server.routes.routes import create_app
from fedmoe.simulation.config import SimulationConfig

_WORDS = {"bool": "", "int": "NUMBER", "float": "NUMBER", "str": "TEXT", "Path": "PATH", "list": "TEXT..."}


def write(folder: Path) -> list[Path]:
    """Write the pages into a folder; returns their places."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"cli.md": command_page(), "configuration.md": configuration_page(), "http.md": http_page()}
    for name, text in pages.items():
        (folder / name).write_text(text)
    return [folder / name for name in pages]


def command_page() -> str:
    """Every command, as `--help` has it."""
    parts = ["# Commands", "Written from the commands themselves. Every command answers `--help`."]
    for name, command in _commands("fedmoe", typer.main.get_command(app)):
        parts += [f"## {name}", _plain(command.help or "")]
        arguments = [item for item in command.params if item.param_type_name == "argument"]
        options = [item for item in command.params if item.param_type_name == "option" and not item.hidden]
        if inner := getattr(command, "commands", {}):
            parts.append("Commands: " + ", ".join(f"[{word}](#{_anchor(f'{name} {word}')})" for word in inner) + ".")
        else:
            words = [item.name.upper() if item.required else f"[{item.name.upper()}]" for item in arguments]
            parts.append("```text\n" + " ".join([name, *words, *(["[OPTIONS]"] if options else [])]) + "\n```")
        rows = [(f"`{item.name.upper()}`", "yes" if item.required else "", _text(item)) for item in arguments]
        rows += [(f"`{_spelt(item)}`", "yes" if item.required else "", _text(item)) for item in options]
        if rows:
            parts.append(_table(("option", "required", "what it says"), rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def configuration_page() -> str:
    """Every key of `fedmoe.toml`, of an arena run's file and of a simulation's."""
    root: Any = typer.main.get_command(app)
    sections = file_schema()["properties"]
    assert isinstance(sections, dict)
    parts = [
        "# Configuration keys",
        "Written from the JSON Schemas. How files, variables and options go together: "
        "[Configuration](../configuration.md).",
    ]
    for name, kind in PROCESSES.items():
        command = root.commands[name]
        processes = getattr(command, "commands", {name: command}).values()
        texts = {item.name: _plain(item.help or "") for process in processes for item in process.params}
        parts.append(f"## [{name}] of fedmoe.toml")
        rows = []
        for key, entry in sections[name]["properties"].items():
            text = texts.get(key, "")
            if default := _default(entry):
                text = text.partition(" [default:")[0]
            secret = "A secret." if is_secret(kind.model_fields[key]) else ""
            variables = ", ".join(f"`{variable}`" for variable in variables_of(kind, key))
            rows.append((f"`{key}`", _kind(entry), default, " ".join(filter(None, (text, secret, variables)))))
        parts.append(_table(("key", "value", "default", "meaning, variable"), rows))
    for title, model in (("An arena run's file", ArenaConfig), ("A simulation's file", SimulationConfig)):
        parts += [f"## {title}", *_model_tables(model.model_json_schema())]
    return "\n\n".join(parts) + "\n"


def http_page() -> str:
    """Every route of a coordinator, as its `/openapi.json` has it."""
    # No route is called, so nothing behind them is needed.
    document = create_app(MagicMock(), MagicMock(required=True)).openapi()
    parts = [
        "# HTTP routes",
        "Written from the coordinator's `/openapi.json`. What the routes are for: [HTTP API](../http-api.md).",
    ]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts += [f"## {method.upper()} {path}", _plain(operation.get("description", ""))]
            rows = [
                (f"`{item['name']}`", item["in"], _kind(item["schema"])) for item in operation.get("parameters", ())
            ]
            for kind, content in operation.get("requestBody", {}).get("content", {}).items():
                rows.append((f"`{kind}`", "body", _kind(content.get("schema", {}))))
            if rows:
                parts.append(_table(("what is sent", "where", "value"), rows))
            answers = [(status, _answer(answer)) for status, answer in operation["responses"].items()]
            parts.append(_table(("answer", "content, or code of the problem"), answers))
    return "\n\n".join([*filter(None, parts), "## Schemas", *_schema_tables(document["components"]["schemas"])]) + "\n"


def _answer(answer: Mapping[str, Any]) -> str:
    """What an answer holds: the codes of problems, else types with their schemas."""
    parts = []
    for kind, content in answer.get("content", {}).items():
        codes = _codes(content) if "problem" in kind else set()
        parts.append(", ".join(f"`{code}`" for code in sorted(codes)) or f"`{kind}` {_kind(content.get('schema', {}))}")
    return " or ".join(part.strip() for part in parts)


def _codes(part: object) -> set[str]:
    """Every problem code that part of the document names."""
    if isinstance(part, dict):
        own = set(part["code"].get("enum", ())) if isinstance(part.get("code"), dict) else set()
        return own.union(*map(_codes, part.values()))
    return set().union(*map(_codes, part)) if isinstance(part, list) else set()


def _model_tables(schema: Mapping[str, Any]) -> Iterator[str]:
    """A table of the outermost keys, then one of each kind of section that they name."""
    yield from _schema_tables({"": schema, **schema.get("$defs", {})})


def _schema_tables(schemas: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for title, section in schemas.items():
        if "properties" in section:
            rows = [(f"`{key}`", _kind(entry), _default(entry)) for key, entry in section["properties"].items()]
            text = section.get("description", "").partition("\n\n")[0].replace("\n", " ")
            table = _table(("key", "value", "default"), rows)
            yield "\n\n".join(filter(None, (f"### {title}" if title else "", text, table)))


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from _commands(f"{name} {word}", inner)


def _spelt(option: Any) -> str:
    names = ", ".join([*option.opts, *option.secondary_opts])
    kind = option.type_descriptor.annotation
    word = option.metavar or _WORDS.get(getattr(get_origin(kind) or kind, "__name__", ""), "TEXT")
    return f"{names} {word}".strip()


def _text(option: Any) -> str:
    """The help of an option, with its default and the variables that it is read from."""
    text = _plain(option.help or "")
    if option.default not in (None, False, [], ()) and "default" not in text and option.show_default is True:
        text += f" [default: {option.default}]"
    variables = [option.envvar] if isinstance(option.envvar, str) else option.envvar or []
    return f"{text} {', '.join(f'`{variable}`' for variable in variables)}".strip()


def _kind(entry: Mapping[str, Any]) -> str:
    """What a value may be, in words: type, choices, limits."""
    if "enum" in entry or "const" in entry:
        return ", ".join(f"`{value}`" for value in entry.get("enum", [entry.get("const")]))
    if "$ref" in entry:
        return f"section {entry['$ref'].rpartition('/')[2]}"
    choices = entry.get("anyOf") or entry.get("oneOf")
    if choices:
        return " or ".join(dict.fromkeys(_kind(choice) for choice in choices if choice.get("type") != "null"))
    if entry.get("type") == "array":
        return f"list of {_kind(entry.get('items', {})) or 'values'}"
    limits = [
        f"{sign} {entry[name]}"
        for name, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if name in entry
    ]
    return " ".join([str(entry.get("type", "")), *limits]).strip()


def _default(entry: Mapping[str, Any]) -> str:
    value = entry.get("default")
    return "" if value is None or isinstance(value, dict | list) else f"`{json.dumps(value)}`"


def _plain(text: str) -> str:
    """Help without the escapes of what draws it on a terminal."""
    return " ".join(text.split())


def _anchor(heading: str) -> str:
    return heading.replace(" ", "-")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


if __name__ == "__main__":
    import sys

    print(*write(Path(sys.argv[1])), sep="\n")
