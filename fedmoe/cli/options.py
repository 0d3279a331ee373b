"""Options shared by commands or made from a configuration class; opens the client and base model that they name."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Concatenate, ParamSpec, TypeVar, get_args, get_origin

import typer
from pydantic import BeforeValidator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings
from typer.models import OptionInfo

from fedmoe.cli.output import CommandError, importing
from fedmoe.config import PROCESSES
from fedmoe.runtime.config_file import VARIABLE, FileSource, made, using_file
from fedmoe.runtime.logs import quiet_retries
from fedmoe.wire.contract.messages import DEFAULT_PORT

if TYPE_CHECKING:
    from fedmoe.lora.manifest import BaseModel
    from fedmoe.models.base import ChatTemplate, LoadedBase
    from fedmoe.wire.client import CoordinatorClient

P = ParamSpec("P")
ConfigT = TypeVar("ConfigT", bound=BaseSettings)
#: The help of an option, or everything about it.
OptionText = str | OptionInfo

_CONFIG_HELP = "File of options, a section a process. [default: ./fedmoe.toml if there is one]"
DEFAULT_URL = f"http://127.0.0.1:{DEFAULT_PORT}"
CoordinatorUrl = Annotated[
    str, typer.Option("--coordinator-url", envvar="FEDMOE_COORDINATOR_URL", help="Where the coordinator listens.")
]
Token = Annotated[str | None, typer.Option("--token", envvar="FEDMOE_TOKEN", help="Token, where one is asked for.")]
#: Rolling back, retracting and making tokens; the administrator's variable wins over the workers' one.
AdminToken = Annotated[
    str | None,
    typer.Option("--token", envvar=["FEDMOE_ADMIN_TOKEN", "FEDMOE_TOKEN"], help="Admin token, where one is asked for."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
#: Of processes, whose configuration reads the environment.
JOIN_TOKEN = typer.Option(help="Join token; better as FEDMOE_TOKEN.", show_default=False)
# Text, so that one place judges them, the one that loads the base model.
CHAT_TEMPLATE = typer.Option(metavar="FILE", help="Jinja file to use instead of the base model's chat template.")
CHAT_TEMPLATE_KWARGS = typer.Option(
    metavar="JSON", help='Arguments of the chat template, such as {"enable_thinking": false}.'
)
MAP = typer.Option(
    "--map", metavar="COLUMN=NAME", help="Take a column under another name, repeatable: question=prompt."
)
LONG_ROWS = typer.Option(help="Answers beyond --max-length: truncate (default), split into samples, or drop the row.")
ChatTemplateFile = Annotated[str | None, CHAT_TEMPLATE]
ChatTemplateKwargs = Annotated[str | None, CHAT_TEMPLATE_KWARGS]
DataMap = Annotated[list[str] | None, MAP]
LongRows = Annotated[str | None, LONG_ROWS]
#: Of processes that load a base model.
BASE_MODEL_OPTIONS: Mapping[str, OptionText] = {
    "base_model": "Base model: smollm2, tiny, a folder or a hub id. [default: Qwen/Qwen2.5-0.5B-Instruct]",
    "chat_template": CHAT_TEMPLATE,
    "chat_template_kwargs": CHAT_TEMPLATE_KWARGS,
}
DEVICE_OPTIONS: Mapping[str, OptionText] = {
    "device": "Device: cpu, cuda, cuda:1, mps, or auto: the first of CUDA, MPS and CPU that is there. [default: auto]",
    "dtype": (
        "Precision of computing: bf16, fp16, fp32, or auto: bf16 where the device has it, else fp16 on CUDA, fp32. "
        "[default: auto]"
    ),
}


def client(url: str, token: str | None) -> CoordinatorClient:
    """A client for a command: few tries, so that a wrong address is told soon."""
    from fedmoe.wire.client import ConnectionSettingError, CoordinatorClient
    from fedmoe.wire.transport import check_url

    try:
        check_url(url)
    except ConnectionSettingError as error:
        raise typer.BadParameter(str(error), param_hint="--coordinator-url") from error
    quiet_retries()
    return CoordinatorClient(url, token, attempts=2)


def federation_base(api: CoordinatorClient, given: str | None) -> str:
    """The base model to load: `given`, else the federation's, of its revision.

    Raises `CommandError` where the federation has none yet, and `OptionError` where it is a folder of another machine.
    """
    if given is not None:
        return given
    manifest = api.federation().manifest
    if manifest is None:
        raise CommandError("the coordinator has no experts yet, so it names no base model; start a worker first")
    return noted_place(manifest.manifest().base)


def noted_place(base: BaseModel) -> str:
    """Where a federation's base model can be had, which is said on standard error; raises `OptionError`."""
    from fedmoe.worker.terms import place_of

    place = place_of(base)
    print(f"note: the federation's base model is {place}; --base-model names another place of it", file=sys.stderr)
    return place


def template_of(file: str | None, kwargs: str | Mapping[str, object] | None) -> ChatTemplate:
    """What --chat-template and --chat-template-kwargs say; raises BaseModelError for what cannot be used."""
    with importing("worker"):
        from fedmoe.models.base import ChatTemplate
    return ChatTemplate.from_options(file, kwargs)


def loaded(base_model: str, device: str, chat: ChatTemplate, dtype: str = "auto") -> LoadedBase:
    """The base model; what users should know of it goes to standard error."""
    from fedmoe.models.base import load_base

    base = load_base(base_model, device, dtype, chat)
    for note in base.notes:
        print(f"note: {note}", file=sys.stderr)
    return base


def with_client(
    token_option: object = Token,
) -> Callable[[Callable[Concatenate[CoordinatorClient, P], None]], Callable[..., None]]:
    """Give a command the options --coordinator-url and --token, before --json, and call it with a client made of them.

    `token_option` is `Token` or `AdminToken`.
    """

    def decorate(command: Callable[Concatenate[CoordinatorClient, P], None]) -> Callable[..., None]:
        @wraps(command)
        def decorated(coordinator_url: str, token: str | None, *args: P.args, **kwargs: P.kwargs) -> None:
            with client(coordinator_url, token) as api:
                command(api, *args, **kwargs)

        _, *own = inspect.signature(command, eval_str=True).parameters.values()
        own += [_option("coordinator_url", CoordinatorUrl, DEFAULT_URL), _option("token", token_option)]
        _set_options(decorated, sorted(own, key=lambda option: option.name == "as_json"))
        return decorated

    return decorate


def configured(
    kind: type[ConfigT], options: Mapping[str, OptionText]
) -> Callable[[Callable[Concatenate[ConfigT, P], None]], Callable[..., None]]:
    """Give a command an option for each entry of `options`, named and typed as the field of the configuration `kind`.

    The command is called with the configuration: options that were given, else environment variables, else the file
    of --config, else defaults. Further parameters are options of the command alone.
    """

    def from_file(context: typer.Context, file: Path | None) -> Path | None:
        # What is required may stand in the file.
        with using_file(file):
            values = FileSource(kind, PROCESSES).toml_data
        context.default_map = {name: value for name, value in values.items() if kind.model_fields[name].is_required()}
        return file

    def decorate(command: Callable[Concatenate[ConfigT, P], None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()

        @wraps(command)
        def decorated(context: typer.Context, config: Path | None, **values: object) -> None:
            further = {option.name: values.pop(option.name, option.default) for option in own}
            given = {
                name: value
                for name, value in values.items()
                if value is not None and _source_of(context, name) != "DEFAULT_MAP"
            }
            with using_file(config):
                configuration = made(kind, given, PROCESSES)
            command(configuration, **further)  # type: ignore[call-arg, arg-type]

        prefix = str(kind.model_config["env_prefix"])
        fields = kind.model_fields
        file = typer.Option(
            "--config", metavar="FILE", envvar=VARIABLE, callback=from_file, is_eager=True, help=_CONFIG_HELP
        )
        parameters = [_option_of(name, fields[name], text, prefix) for name, text in options.items()]
        parameters += [
            _option("context", typer.Context, Parameter.empty),
            _option("config", Annotated[Path | None, file]),
            *own,
        ]
        _set_options(decorated, parameters)
        return decorated

    return decorate


def _source_of(context: typer.Context, name: str) -> str:
    """COMMANDLINE, ENVIRONMENT, DEFAULT_MAP (the file) or DEFAULT."""
    source = context.get_parameter_source(name)
    return source.name if source is not None else ""


def _option_of(name: str, field: FieldInfo, text: OptionText, prefix: str) -> Parameter:
    """Optional and without a default, which the configuration has; but required where the field is."""
    option = typer.Option(help=text) if isinstance(text, str) else text
    types = {field.annotation, *get_args(field.annotation)}
    types |= {get_args(part)[0] for part in types if get_origin(part) is Annotated}
    kind: object = next((number for number in (bool, int, float) if number in types), str)
    if any(isinstance(check, BeforeValidator) for check in field.metadata):
        kind = str  # so that this check judges whatever was given, and names the range
    if get_origin(field.annotation) is tuple:
        kind = list[str]
    if not field.is_required():
        return _option(name, Annotated[kind | None, option])  # type: ignore[operator]
    option.envvar = option.envvar or [prefix + name.upper()]
    return _option(name, Annotated[kind, option], Parameter.empty)


def _option(name: str, annotation: object, default: object = None) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _set_options(command: Callable[..., None], options: Iterable[Parameter]) -> None:
    """Let typer, which reads signatures, see these parameters instead of the function's own."""
    keywords = [option.replace(kind=Parameter.KEYWORD_ONLY) for option in options]
    vars(command)["__signature__"] = Signature(keywords)
