"""Configuration of every process: flag, else environment variable, else `fedmoe.toml`, else default."""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal, cast

from pydantic import (
    AfterValidator,
    AliasChoices,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from fedmoe.federation import plug_ins
from fedmoe.lora.codec import WireDtype
from fedmoe.runtime.config_file import FileSource
from fedmoe.runtime.trackers import REPORT_TO, usable_trackers
from fedmoe.runtime.urls import usable_blobs, usable_coordinator, usable_database, usable_url
from fedmoe.wire.contract.messages import DEFAULT_PORT, MAX_PARAMETERS, ExpertName, StartFrom, WorkerName

_TOKEN = re.compile(r"[\x21-\x7e]{16,4096}")
# The commands' own variable, and what Kubernetes announces of a service called fedmoe-coordinator.
_OF_OTHERS = re.compile(r"^FEDMOE_COORDINATOR_URL$|_SERVICE_(HOST|PORT)|_PORT_\d+_")
#: Seconds between two pushes of a worker; 5 to 30 are recommended, up to an hour is accepted.
DEFAULT_SYNC_INTERVAL = 10.0
MIN_SYNC_INTERVAL = 0.01
MAX_SYNC_INTERVAL = 3600.0
#: What a coordinator advises where no interval is configured.
ADVISED_SYNC_INTERVAL = 1.0
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _seconds(value: object) -> float:
    """A sync interval, or an error that names the range; NaN is in no range."""
    try:
        seconds = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except ValueError:
        seconds = math.nan
    if not MIN_SYNC_INTERVAL <= seconds <= MAX_SYNC_INTERVAL:
        raise ValueError(
            f"expected seconds from {MIN_SYNC_INTERVAL:g} to {MAX_SYNC_INTERVAL:g} (5 to 30 recommended), got {value!r}"
        )
    return seconds


def _factor(value: float) -> float:
    """A multiple of the usual norm; below 2 every second update would be held."""
    if not (value == 0 or 2 <= value <= 1e9):
        raise ValueError(f"expected 0 (hold nothing) or a multiple from 2 to 1e9, got {value!r}")
    return value


def _usable_token(value: SecretStr) -> SecretStr:
    """Never shows the value: the message ends up in logs and terminals."""
    if not _TOKEN.fullmatch(value.get_secret_value()):
        raise ValueError(
            "a token needs at least 16 characters, printable ASCII without spaces; "
            "unset the variable or the flag to use none"
        )
    return value


SyncInterval = Annotated[float, BeforeValidator(_seconds)]
Token = Annotated[SecretStr, AfterValidator(_usable_token)]
DatabaseUrl = Annotated[SecretStr, AfterValidator(usable_database)]


class _ProcessConfig(BaseSettings):
    """What the parameters of all processes have in common: a misspelt environment variable is an error too."""

    # Errors do not show inputs: one of them could be a token.
    model_config = SettingsConfigDict(extra="forbid", frozen=True, populate_by_name=True, hide_input_in_errors=True)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: type[BaseSettings], *sources: PydanticBaseSettingsSource, **named: PydanticBaseSettingsSource
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, else environment, else the file's section."""
        environment = cast(EnvSettingsSource, named["env_settings"])
        # Names of fields are aliases, which pydantic would read as variables: TOKEN, DATABASE_URL.
        environment.env_vars = {
            name: value for name, value in environment.env_vars.items() if name.startswith("fedmoe_")
        }
        return named["init_settings"], named["env_settings"], FileSource(settings_cls, PROCESSES)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_variable(cls, values: object) -> object:
        prefix = str(cls.model_config["env_prefix"])
        variables = [prefix + name.upper() for name in cls.model_fields]
        for variable in os.environ:
            if variable.startswith(prefix) and variable not in variables and not _OF_OTHERS.search(variable):
                close = difflib.get_close_matches(variable, variables, 1)
                hint = f"did you mean {close[0]}?" if close else "unset it."
                raise ValueError(f"the environment variable {variable} is not known; {hint}")
        return values


class CoordinatorConfig(_ProcessConfig):
    """Parameters of a coordinator; environment variables are `FEDMOE_COORDINATOR_...`, and `FEDMOE_TOKEN`.

    Also `FEDMOE_ADMIN_TOKEN` and `FEDMOE_DATABASE_URL`, which may be secrets too.
    """

    model_config = SettingsConfigDict(env_prefix="FEDMOE_COORDINATOR_")

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = DEFAULT_PORT
    state_dir: str = "runs/coordinator"
    blobs: Annotated[str, AfterValidator(usable_blobs)] | None = None
    database_url: DatabaseUrl | None = Field(
        default=None, validation_alias=AliasChoices("database_url", "FEDMOE_DATABASE_URL")
    )
    replica: WorkerName | None = None
    advertise: Annotated[str, AfterValidator(usable_url)] | None = None
    replica_secret_file: str | None = None
    lease_seconds: Annotated[float, Field(ge=0.5, le=60, allow_inf_nan=False)] = 2.0
    enable_gateway: bool = True
    strategy: str = "weighted_average"
    gateway_rank: Annotated[int, Field(ge=1, le=4096)] | None = None
    evaluation_gate: bool = False
    gate_tolerance: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.01
    gate_seconds: Annotated[float, Field(ge=1, le=86_400, allow_inf_nan=False)] = 300.0
    start_from: StartFrom = "initial"
    merge_after: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    fold_staleness: str = "constant"
    server_learning_rate: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = 1.0
    server_optimizer: str = "sgd"
    buffer_size: Annotated[int, Field(ge=1, le=1024)] = 1
    clip_norm: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = None
    hold_norm: Annotated[float, AfterValidator(_factor)] = 50.0
    staleness: str = "polynomial"
    max_staleness: Annotated[int, Field(ge=0)] | None = None
    keep_updates: Annotated[int, Field(ge=1)] | None = None
    max_parameters: Annotated[int, Field(ge=1, le=MAX_PARAMETERS)] = 1 << 28
    max_experts: Annotated[int, Field(ge=1, le=100_000)] = 1024
    keep_gb: Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)] | None = None
    min_sync_interval: Annotated[float, Field(ge=0, le=MAX_SYNC_INTERVAL, allow_inf_nan=False)] | None = None
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] | None = None
    requests_per_second: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 100.0
    json_limit: Annotated[int, Field(ge=0)] = 8_000_000
    token: Token | None = Field(default=None, validation_alias=AliasChoices("token", "FEDMOE_TOKEN"))
    admin_token: Token | None = Field(default=None, validation_alias=AliasChoices("admin_token", "FEDMOE_ADMIN_TOKEN"))
    insecure: bool = False
    accept_older_journal: bool = False
    skip_damaged: bool = False
    allow_network_fs: bool = False
    accept_database_loss: bool = False
    tls: Literal["auto"] | None = None
    tls_cert: str | None = None
    tls_key: str | None = None

    @field_validator("strategy", "server_optimizer", "staleness", "fold_staleness")
    @classmethod
    def _check_choice(cls, value: str, info: ValidationInfo) -> str:
        option = str(info.field_name)
        if not plug_ins.load(option, value):
            raise ValueError(f"unknown value {value!r}; choose one of {', '.join(plug_ins.names(option))}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> CoordinatorConfig:
        named, from_gateway = self.model_fields_set, self.start_from == "gateway"
        if self.evaluation_gate and not self.enable_gateway:
            raise ValueError("--evaluation-gate decides on the gateway, which --no-enable-gateway switches off")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both --tls-cert and --tls-key")
        if self.tls is not None and self.tls_cert is not None:
            raise ValueError("--tls auto makes a certificate, --tls-cert names one; give one of them")
        if from_gateway and not self.enable_gateway:
            raise ValueError("--start-from gateway needs the gateway; drop --no-enable-gateway")
        if from_gateway and named & {"strategy", "gateway_rank"}:
            raise ValueError(
                "with --start-from gateway the gateway is merged at the experts' rank; "
                "drop --strategy and --gateway-rank"
            )
        if not from_gateway and named & {"merge_after", "fold_staleness"}:
            raise ValueError(
                "--merge-after and --fold-staleness are for experts that are rebased onto the gateway; "
                "add --start-from gateway"
            )
        if self.accept_database_loss and self.database_url is None:
            raise ValueError("--accept-database-loss is for a journal in PostgreSQL; add --database-url")
        if self.token is not None and self.token == self.admin_token:
            raise ValueError("the join token and the admin token are the same: every worker would be an administrator")
        self._check_replica()
        return self

    def _check_replica(self) -> None:
        needed = {
            "--advertise": self.advertise,
            "--replica-secret-file": self.replica_secret_file,
            "--database-url": self.database_url,
            "--blobs": self.blobs,
        }
        if self.replica is None:
            alone = [name for name in ("--advertise", "--replica-secret-file") if needed[name] is not None]
            if alone or "lease_seconds" in self.model_fields_set:
                raise ValueError(
                    f"{(alone or ['--lease-seconds'])[0]} is for one of several coordinators; add --replica"
                )
            return
        if self.tls is not None:
            raise ValueError(
                "--tls auto is for one coordinator: each replica would have a key of its own, and a join line pins "
                "one. Give the replicas certificates of one authority with --tls-cert and --tls-key"
            )
        missing = [name for name, value in needed.items() if value is None]
        if missing:
            raise ValueError(f"--replica needs {', '.join(missing)}: what the coordinators of a federation share")


class _CallerConfig(_ProcessConfig):
    """What processes that call a coordinator have in common."""

    coordinator_url: Annotated[str, AfterValidator(usable_coordinator)]
    token: Token | None = Field(default=None, validation_alias=AliasChoices("token", "FEDMOE_TOKEN"))


class EvaluatorConfig(_CallerConfig):
    """Parameters of an evaluator; environment variables are `FEDMOE_EVALUATOR_...`, and `FEDMOE_TOKEN`."""

    model_config = SettingsConfigDict(env_prefix="FEDMOE_EVALUATOR_")

    evaluator_id: WorkerName
    expert: ExpertName
    held_out: str
    map: tuple[str, ...] = ()
    held_out_blocks: Annotated[int, Field(ge=1, le=1 << 20)] = 16
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 4
    poll_interval: SyncInterval = DEFAULT_SYNC_INTERVAL
    base_model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    chat_template: str | None = None
    chat_template_kwargs: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"


class WorkerConfig(_CallerConfig):
    """Parameters of a worker; environment variables are `FEDMOE_WORKER_...`, `FEDMOE_TOKEN` and `FEDMOE_REPORT_TO`.

    Training parameters carry the names of Hugging Face's TrainingArguments and LoraConfig.
    """

    model_config = SettingsConfigDict(env_prefix="FEDMOE_WORKER_")

    worker_id: WorkerName
    specialty: ExpertName
    dataset: str
    sync_interval: SyncInterval = DEFAULT_SYNC_INTERVAL
    base_model: str = "Qwen/Qwen2.5-0.5B-Instruct"
    chat_template: str | None = None
    chat_template_kwargs: str | None = None
    state_dir: str | None = None
    allow_changed_data: bool = False
    map: tuple[str, ...] = ()
    long_rows: Literal["truncate", "split", "drop"] = "truncate"
    eval_dataset: str | None = None
    eval_split: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = None
    eval_steps: Annotated[int, Field(ge=1)] = 50
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    early_stopping_threshold: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_steps: Annotated[int, Field(ge=0)] = 0
    num_train_epochs: Positive | None = None
    max_unsynced: Positive = 600.0
    wire_dtype: WireDtype = "fp32"
    start_from: StartFrom | None = None
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    max_length: Annotated[int, Field(ge=8, le=1 << 20)] | None = None
    per_device_train_batch_size: Annotated[int, Field(ge=1)] = 1
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 1
    gradient_checkpointing: bool = False
    learning_rate: Positive = 1e-3
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Annotated[int, Field(ge=0)] = 5
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    max_grad_norm: Positive = 1.0
    lora_r: Annotated[int, Field(ge=1, le=1024)] = 16
    lora_alpha: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 32.0
    lora_dropout: Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False)] = 0.0
    target_modules: tuple[Annotated[str, Field(min_length=1)], ...] = Field(default=("all-linear",), min_length=1)
    seed: Annotated[int, Field(ge=0)] = 0
    send_statistics: bool = True
    report_to: Annotated[str, AfterValidator(usable_trackers)] = Field(
        default="", validation_alias=AliasChoices("report_to", "FEDMOE_WORKER_REPORT_TO", REPORT_TO)
    )

    @model_validator(mode="after")
    def _schedule_has_an_end(self) -> WorkerConfig:
        scheduler = f"--lr-scheduler-type {self.lr_scheduler_type}"
        if self.max_steps and self.num_train_epochs is not None:
            raise ValueError("--max-steps and --num-train-epochs both say when training ends; give one of them")
        if self.lr_scheduler_type == "constant" or self.num_train_epochs is not None:
            return self
        if self.max_steps == 0:
            raise ValueError(f"{scheduler} needs --max-steps or --num-train-epochs, the length of the schedule")
        if self.max_steps <= self.warmup_steps:
            raise ValueError(
                f"{scheduler} falls after the warm-up, but --warmup-steps {self.warmup_steps} leaves nothing of "
                f"--max-steps {self.max_steps}; give --warmup-steps at most {self.max_steps - 1}, or more --max-steps"
            )
        return self

    @model_validator(mode="after")
    def _held_out_data(self) -> WorkerConfig:
        named = self.model_fields_set
        if self.eval_dataset is not None and self.eval_split is not None:
            raise ValueError("--eval-dataset and --eval-split both say what is held out; give one of them")
        if self.early_stopping_patience is None and "early_stopping_threshold" in named:
            raise ValueError("--early-stopping-threshold needs --early-stopping-patience")
        if self.eval_dataset is not None and os.path.realpath(self.eval_dataset) == os.path.realpath(self.dataset):
            raise ValueError(
                "--eval-dataset is the file of --dataset: its loss would not be of held-out data; give another file, "
                "or --eval-split FRACTION"
            )
        held_out = self.eval_dataset is not None or self.eval_split is not None
        for name in ("early_stopping_patience", "eval_steps"):
            if not held_out and name in named and getattr(self, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} needs held-out data: --eval-dataset FILE or --eval-split FRACTION")
        return self


class GatewayConfig(_ProcessConfig):
    """Parameters of `fedmoe gateway serve`, `evaluate` and `generate`; environment variables are `FEDMOE_GATEWAY_...`.

    Also `FEDMOE_COORDINATOR_URL`, `FEDMOE_TOKEN` and `FEDMOE_VLLM_TOKEN`. Each takes what it has a use for.
    """

    model_config = SettingsConfigDict(env_prefix="FEDMOE_GATEWAY_")

    coordinator_url: Annotated[str, AfterValidator(usable_coordinator)] = f"http://127.0.0.1:{DEFAULT_PORT}"
    token: Token | None = Field(default=None, validation_alias=AliasChoices("token", "FEDMOE_TOKEN"))
    base_model: str | None = None
    chat_template: str | None = None
    chat_template_kwargs: str | None = None
    device: str = "auto"
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    api_keys: str | None = None
    insecure: bool = False
    poll_interval: Annotated[float, Field(ge=0.05, allow_inf_nan=False)] = 2.0
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 1024
    max_output_tokens: Annotated[int, Field(ge=1)] = 1024
    max_batch: Annotated[int, Field(ge=1, le=1024)] = 16
    max_queue: Annotated[int, Field(ge=0)] = 128
    backend: Literal["transformers", "vllm"] = "transformers"
    vllm_url: str | None = None
    replicas: tuple[str, ...] = ()
    vllm_model: str = "base"
    vllm_adapters: str = "runs/serve/vllm_adapters"
    vllm_token: SecretStr | None = Field(default=None, validation_alias=AliasChoices("vllm_token", "FEDMOE_VLLM_TOKEN"))
    tls_cert: str | None = None
    tls_key: str | None = None
    map: tuple[str, ...] = ()
    blocks: Annotated[int, Field(ge=2)] = 32
    max_length: Annotated[int, Field(ge=8)] | None = None
    batch_size: Annotated[int, Field(ge=1)] = 4
    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 64


#: The processes that have a section in the configuration file.
PROCESSES: Mapping[str, type[BaseSettings]] = {
    "coordinator": CoordinatorConfig,
    "worker": WorkerConfig,
    "evaluator": EvaluatorConfig,
    "gateway": GatewayConfig,
}
