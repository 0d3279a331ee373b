from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from fedmoe.config import MAX_SYNC_INTERVAL, MIN_SYNC_INTERVAL, CoordinatorConfig, WorkerConfig
from fedmoe.models.training_config import TrainingConfig
from fedmoe.worker.preparation import training_config

NEEDED = {"coordinator_url": "http://127.0.0.1:5000", "worker_id": "w1", "specialty": "python", "dataset": "a.jsonl"}
SECRET = "a-token-that-nobody-may-read-0001"


def worker(**parameters: object) -> WorkerConfig:
    return WorkerConfig(**(NEEDED | parameters))  # type: ignore[arg-type]


def coordinator(**parameters: object) -> CoordinatorConfig:
    return CoordinatorConfig(**parameters)  # type: ignore[arg-type]


def test_the_defaults_are_the_documents_ones_a1_a2_c7() -> None:
    assert worker().sync_interval == 10.0
    assert (coordinator().port, coordinator().host, coordinator().strategy) == (5000, "127.0.0.1", "weighted_average")
    assert coordinator().enable_gateway


@pytest.mark.parametrize(
    "value", [0, -1, float("nan"), float("inf"), 1e-9, "5m", "", 10 * 365 * 86400, True, None, [5]]
)
def test_a_sync_interval_out_of_range_is_an_error_with_the_range_58(value: object) -> None:
    with pytest.raises(ValidationError, match=r"expected seconds from 0\.01 to 3600 \(5 to 30 recommended\), got"):
        worker(sync_interval=value)


@pytest.mark.parametrize("value", [MIN_SYNC_INTERVAL, 5, "7.5", 30.0, MAX_SYNC_INTERVAL])
def test_a_sync_interval_in_range_is_taken_58(value: object) -> None:
    assert worker(sync_interval=value).sync_interval == float(value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"port": 70000}, "65535"),
        ({"port": -1}, "0"),
        ({"strategy": "average"}, "weighted_average, sum, concat, scaled, regmean"),
        ({"server_optimizer": "adamw"}, "sgd, nesterov, adam"),
        ({"staleness": "none"}, "constant, polynomial, hinge, exponential"),
        ({"server_learning_rate": 0}, "greater than 0"),
        ({"server_learning_rate": float("nan")}, "finite"),
        ({"server_learning_rate": 1e9}, "1000"),
        ({"max_staleness": -1}, "greater than or equal to 0"),
        ({"min_sync_interval": float("inf")}, "finite"),
        ({"gateway_rank": 0}, "greater than or equal to 1"),
        ({"tls_cert": "a.pem"}, "both --tls-cert and --tls-key"),
        ({"tls_key": "a.pem"}, "both --tls-cert and --tls-key"),
        ({"token": SECRET, "admin_token": SECRET}, "every worker would be an administrator"),
        ({"prot": 1}, "prot"),
    ],
)
def test_parameters_out_of_range_are_errors_that_name_the_range(parameters: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(word)):
        coordinator(**parameters)


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"start_from": "scratch"}, "'initial' or 'gateway'"),
        ({"start_from": "gateway", "merge_after": 0}, "greater than or equal to 1"),
        ({"start_from": "gateway", "enable_gateway": False}, "drop --no-enable-gateway"),
        ({"start_from": "gateway", "strategy": "sum"}, "drop --strategy"),
        ({"start_from": "gateway", "gateway_rank": 8}, "drop --strategy and --gateway-rank"),
        ({"start_from": "gateway", "fold_staleness": "linear"}, "choose one of constant"),
        ({"merge_after": 10}, "add --start-from gateway"),
        ({"fold_staleness": "hinge"}, "add --start-from gateway"),
    ],
)
def test_a_gateway_that_lives_excludes_what_is_for_one_that_is_merged(parameters: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(word)):
        coordinator(**parameters)


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"coordinator_url": "127.0.0.1:5000"}, "http://192.168.1.100:5000"),
        ({"coordinator_url": "http://"}, "http://192.168.1.100:5000"),
        ({"coordinator_url": "ftp://host"}, "http://192.168.1.100:5000"),
        ({"coordinator_url": "http://host:99999"}, "http://192.168.1.100:5000"),
        ({"coordinator_url": "http://user:pass@host"}, "http://192.168.1.100:5000"),
        ({"coordinator_url": "http://ho st"}, "http://192.168.1.100:5000"),
        ({"coordinator_url": f"http://host:1#{'a' * 64}"}, "https://HOST:PORT#FINGERPRINT"),
        ({"coordinator_url": "https://host:1#abc"}, "https://HOST:PORT#FINGERPRINT"),
        ({"specialty": "../x"}, "pattern"),
        ({"worker_id": "a b"}, "pattern"),
        ({"wire_dtype": "fp8"}, "'fp32', 'bf16' or 'int8'"),
        ({"learning_rate": float("nan")}, "finite"),
        ({"lora_dropout": 1}, "less than 1"),
        ({"lora_alpha": 1e7}, "less than or equal to 1000000"),
        ({"target_modules": ()}, "at least 1"),
        ({"target_modules": ("",)}, "at least 1"),
        ({"max_length": 4}, "greater than or equal to 8"),
        ({"lr_scheduler_type": "cosine"}, "--max-steps or --num-train-epochs"),
        ({"lr_scheduler_type": "linear", "max_steps": 3}, "give --warmup-steps at most 2, or more --max-steps"),
        ({"lr_scheduler_type": "cosine", "max_steps": 9, "warmup_steps": 9}, "--warmup-steps at most 8"),
        ({"max_steps": 3, "num_train_epochs": 1}, "--max-steps and --num-train-epochs both"),
        ({"num_train_epochs": 0}, "greater than 0"),
        ({"num_train_epochs": float("inf")}, "finite"),
        ({"eval_split": 0}, "greater than 0"),
        ({"eval_split": 1}, "less than 1"),
        ({"eval_split": 0.1, "eval_dataset": "b.jsonl"}, "--eval-dataset and --eval-split both"),
        ({"eval_dataset": "./a.jsonl"}, "--eval-dataset is the file of --dataset"),
        ({"eval_steps": 5}, "--eval-steps needs held-out data: --eval-dataset FILE or --eval-split FRACTION"),
        ({"early_stopping_patience": 3}, "--early-stopping-patience needs held-out data"),
        (
            {"eval_split": 0.1, "early_stopping_threshold": 0.1},
            "--early-stopping-threshold needs --early-stopping-patience",
        ),
        ({"sync_intervall": 3}, "sync_intervall"),
    ],
)
def test_a_workers_parameters_are_checked_too(parameters: dict[str, object], word: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(word)):
        worker(**parameters)


def test_a_fingerprint_may_stand_behind_the_coordinators_url() -> None:
    pinned = f"https://host:1#{'AB' * 32}"
    assert worker(coordinator_url=pinned).coordinator_url == pinned.lower()


@pytest.mark.parametrize(
    ("parameters", "word"),
    [
        ({"tls": "yes"}, "'auto'"),
        ({"tls_cert": "c.pem", "tls_key": "k.pem"}, "give one of them"),
        (
            {
                "replica": "a",
                "advertise": "https://h:1",
                "replica_secret_file": "s",
                "database_url": "postgresql://h/d",
                "blobs": "s3://b/p",
            },
            "each replica would have a key of its own",
        ),
    ],
)
def test_a_certificate_of_its_own_is_for_one_coordinator_without_another(
    parameters: dict[str, object], word: str
) -> None:
    with pytest.raises(ValidationError, match=re.escape(word)):
        coordinator(**({"tls": "auto"} | parameters))


def test_what_is_refused_together_goes_once_the_advice_is_followed() -> None:
    assert worker(lr_scheduler_type="linear", max_steps=3, warmup_steps=2)
    assert worker(lr_scheduler_type="linear", num_train_epochs=0.5)
    assert worker(max_steps=3).warmup_steps == 5
    assert worker(eval_split=0.1, early_stopping_patience=3, early_stopping_threshold=0.01, eval_steps=7)
    assert worker(eval_dataset="b.jsonl", early_stopping_patience=3)


@pytest.mark.parametrize("scheduler", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [0, 1, 5, 6, 50])
def test_what_training_would_refuse_is_refused_as_a_parameter(scheduler: str, steps: int) -> None:
    """The rules of TrainingConfig, which is made long after the base model is loaded."""
    try:
        accepted = worker(lr_scheduler_type=scheduler, max_steps=steps)
    except ValidationError:
        with pytest.raises(ValueError):
            TrainingConfig(lr_scheduler_type=scheduler, max_steps=steps)
    else:
        assert training_config(accepted, 10).max_steps == steps


def test_environment_variables_stand_in_for_flags_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOE_COORDINATOR_PORT", "6000")
    monkeypatch.setenv("FEDMOE_WORKER_SYNC_INTERVAL", "7.5")
    monkeypatch.setenv("FEDMOE_TOKEN", SECRET)
    assert (coordinator().port, coordinator(port=7000).port) == (6000, 7000)
    assert worker().sync_interval == 7.5
    token = worker().token
    assert token is not None
    assert token.get_secret_value() == SECRET


def test_a_misspelt_variable_is_an_error_with_a_suggestion_59(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOE_COORDINATOR_STATEDIR", "x")
    with pytest.raises(ValidationError, match="did you mean FEDMOE_COORDINATOR_STATE_DIR"):
        coordinator()
    assert worker()


@pytest.mark.parametrize(
    "variable", ["FEDMOE_COORDINATOR_URL", "FEDMOE_COORDINATOR_SERVICE_HOST", "FEDMOE_COORDINATOR_PORT_5000_TCP_ADDR"]
)
def test_variables_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "x")
    assert coordinator()


@pytest.mark.parametrize(
    "value",
    [
        "",
        " ",
        "short",
        "a" * 15,
        "with a space in the middle of it",
        "line\nbreak-and-more-text",
        "ümlaut-and-more-text-here",
    ],
)
def test_a_token_that_is_empty_or_unusable_is_an_error_and_never_shown_60(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("FEDMOE_TOKEN", value)
    for config in (coordinator, worker):
        with pytest.raises(ValidationError, match="at least 16 characters") as told:
            config()
        assert len(value) < 3 or value not in str(told.value)


def test_errors_elsewhere_do_not_show_a_token_60(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDMOE_TOKEN", SECRET)
    with pytest.raises(ValidationError) as told:
        coordinator(admin_token=SECRET, tls_cert="a.pem")
    assert SECRET not in str(told.value)
    assert SECRET not in repr(coordinator())


def test_a_config_is_a_value() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        coordinator().port = 1
