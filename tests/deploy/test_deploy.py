"""What stands in `deploy/` fits the commands, metrics and statuses that there are; scripts do what they say."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import ssl
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import wait_until
from support import CoordinatorProcess, free_port

from fedmoe import __version__
from fedmoe.config import CoordinatorConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "fedmoe"
TEMPLATES = "\n".join(path.read_text() for path in sorted((CHART / "templates").iterdir()))
MANIFESTS = ("single", "replicas")


def documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def manifests(name: str, kind: str) -> list[dict[str, Any]]:
    return [manifest for manifest in documents(DEPLOY / "kubernetes" / f"{name}.yaml") if manifest["kind"] == kind]


def pod_specs(name: str) -> dict[str, dict[str, Any]]:
    """The pods of a rendering, by the component they are of."""
    return {
        manifest["metadata"]["labels"]["app.kubernetes.io/component"]: manifest["spec"]["template"]["spec"]
        for kind in ("StatefulSet", "Deployment", "Job")
        for manifest in manifests(name, kind)
    }


def compose() -> dict[str, Any]:
    document = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
    assert isinstance(document, dict)
    return document


DATA_FILES = {*DEPLOY.rglob("*.yaml"), *DEPLOY.rglob("*.json")} - {*(CHART / "templates").iterdir()}


@pytest.mark.parametrize("path", sorted(DATA_FILES), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_file_of_data_parses(path: Path) -> None:
    assert json.loads(path.read_text()) if path.suffix == ".json" else documents(path)


def command_lines() -> Iterator[list[str]]:
    """Every command line of `fedmoe` in deploy/, without the program."""
    for name, service in compose()["services"].items():
        if name.startswith("coordinator"):
            yield service["command"]
    for name in MANIFESTS:
        for spec in pod_specs(name).values():
            yield spec["containers"][0]["args"]
    for path in (*DEPLOY.glob("systemd/*.service"), *DEPLOY.glob("slurm/*")):
        for line in re.findall(r"(?:^ExecStart=\S*|^)fedmoe (.+?)(?: &)?$", path.read_text(), re.MULTILINE):
            yield shlex.split(line)


def options() -> dict[str, set[str]]:
    """Command -> its options, from the frozen list that a test of the command line compares with the real ones."""
    by_command: dict[str, set[str]] = {}
    for line in (ROOT / "tests" / "cli" / "options.txt").read_text().splitlines():
        command, _, names = line.partition(": ")
        by_command.setdefault(command.removeprefix("fedmoe "), set()).update(names.split())
    return by_command


def test_every_option_of_a_command_in_deploy_exists() -> None:
    by_command, all_used = options(), set()
    for words in command_lines():
        command = " ".join(words[:2]) if words[0] == "gateway" else words[0]
        used = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert used <= by_command[command], words
        all_used |= used
    assert {"--state-dir", "--replica", "--worker-id", "--base-model", "--coordinator-url"} <= all_used


def coordinators() -> Iterator[tuple[list[str], dict[str, str]]]:
    """Command line and environment of every coordinator in deploy/; what a Secret holds is made up."""
    for name, service in compose()["services"].items():
        if name.startswith("coordinator"):
            yield service["command"], service["environment"]
    secret = {"FEDMOE_DATABASE_URL": "postgresql+psycopg://user:password@host/name"}
    for name in MANIFESTS:
        container = pod_specs(name)["coordinator"]["containers"][0]
        names = [entry["name"] for entry in container["env"]]
        values = {entry: secret.get(entry, f"secret-of-32-characters-{entry}") for entry in names}
        yield [word.replace("$(POD_NAME)", "pod-0") for word in container["args"]], values


@pytest.mark.parametrize(("words", "environment"), list(coordinators()))
def test_what_a_coordinator_is_told_fits_together(
    words: list[str], environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    options = [word.removeprefix("--").partition("=") for word in words[1:]]
    config = CoordinatorConfig.model_validate({name.replace("-", "_"): value for name, _, value in options})
    assert (config.replica is None) == (config.database_url is None)


def test_every_environment_variable_of_ours_in_deploy_exists() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "fedmoe").rglob("*.py")) + TEMPLATES
    files = [path.read_text() for path in DEPLOY.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    variables = set(re.findall(r"\bFEDMOE_[A-Z_]*[A-Z]\b", "\n".join(files)))
    of_deploy = {"FEDMOE_IMAGE", "FEDMOE_HEALTH_URL", "FEDMOE_STATE"}
    for name in variables - of_deploy:
        of = re.fullmatch(r"FEDMOE_(COORDINATOR|WORKER)_(\w+)", name)
        option = f"--{of[2].lower().replace('_', '-')}" if of else ""
        assert name in sources or (of and option in options()[of[1].lower()]), name


def documented_metrics() -> dict[str, str]:
    """Metric -> kind, as docs/metrics.md lists them, which tests compare with what is served."""
    text = (ROOT / "docs" / "metrics.md").read_text()
    return dict(re.findall(r"^\| `(fedmoe_\w+)` \| (counter|gauge|histogram) \|", text, re.MULTILINE))


def series(metrics: dict[str, str]) -> set[str]:
    """The names that a query may use."""
    parts = {
        name + end for name, kind in metrics.items() if kind == "histogram" for end in ("_bucket", "_sum", "_count")
    }
    return parts | {name for name, kind in metrics.items() if kind != "histogram"}


def expressions() -> Iterator[str]:
    for group in yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]:
        yield from (rule["expr"] for rule in group["rules"])
    for panel in json.loads((DEPLOY / "grafana" / "dashboards" / "fedmoe.json").read_text())["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def test_every_metric_of_an_alert_or_panel_exists_and_every_metric_is_shown() -> None:
    metrics = documented_metrics()
    queried = set(re.findall(r"\bfedmoe_\w+", " ".join(expressions())))
    assert queried - series(metrics) == set()
    assert set(metrics) - {re.sub(r"_(bucket|sum|count)$", "", name) for name in queried} == set()


def test_what_tests_of_alerts_make_up_exists_too() -> None:
    text = (DEPLOY / "prometheus" / "alerts_test.yaml").read_text()
    assert set(re.findall(r"\bfedmoe_\w+(?=[{,\"'])", text)) - series(documented_metrics()) == set()


def test_every_alert_is_tested_and_says_what_to_do() -> None:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text())["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert {rule["alert"] for rule in rules} == fired
    assert all({"summary", "action"} <= rule["annotations"].keys() for rule in rules)


def leaves(values: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and value and key not in ("resources", "annotations"):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield above + key


def test_every_value_of_the_chart_is_used_and_nothing_else() -> None:
    values = set(leaves(yaml.safe_load((CHART / "values.yaml").read_text())))
    for name in values:
        assert re.search(rf"\.{name.rpartition('.')[2]}\b", TEMPLATES), name
    roots = {name.partition(".")[0] for name in values}
    assert set(re.findall(r"\.Values\.(\w+)", TEMPLATES)) == roots
    for name in MANIFESTS:
        set_there = yaml.safe_load((DEPLOY / "kubernetes" / f"{name}.values.yaml").read_text())
        assert set(leaves(set_there)) <= values, name


def test_chart_and_manifests_are_of_this_version() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    for name in MANIFESTS:
        for spec in pod_specs(name).values():
            assert spec["containers"][0]["image"].endswith(f":{__version__}")


@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_hardened_and_write_to_volumes_only(name: str) -> None:
    for spec in pod_specs(name).values():
        assert spec["securityContext"]["runAsNonRoot"]
        assert not spec["automountServiceAccountToken"]
        assert not spec["enableServiceLinks"], "they would be taken for options: FEDMOE_COORDINATOR_PORT"
        for container in spec["containers"] + spec.get("initContainers", []):
            security = container["securityContext"]
            assert (security["readOnlyRootFilesystem"], security["allowPrivilegeEscalation"]) == (True, False)
            assert security["capabilities"] == {"drop": ["ALL"]}
            volumes = {volume["name"] for volume in spec["volumes"]} | {"state"}
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


@pytest.mark.parametrize("name", MANIFESTS)
def test_no_secret_stands_in_a_manifest(name: str) -> None:
    assert not manifests(name, "Secret")
    for spec in pod_specs(name).values():
        for entry in spec["containers"][0]["env"]:
            secret = re.search("TOKEN|DATABASE|KEY|PASSWORD", entry["name"])
            assert not secret or "secretKeyRef" in entry["valueFrom"], entry


@pytest.mark.parametrize("name", MANIFESTS)
def test_servers_are_probed_where_they_answer(name: str) -> None:
    for component, spec in pod_specs(name).items():
        container = spec["containers"][0]
        if component == "worker":
            continue
        port = container["ports"][0]["containerPort"]
        assert port == {"coordinator": 5000, "gateway": 8080}[component]
        paths = {kind: container[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
        assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
        schemes = {container[f"{kind}Probe"]["httpGet"].get("scheme", "HTTP") for kind in paths}
        assert schemes == {"HTTPS" if "--tls-cert=/run/tls/tls.crt" in container["args"] else "HTTP"}


def test_supervisors_know_the_statuses_that_only_a_person_can_mend() -> None:
    listed = re.findall(r"^\| (\d+) \| ", (ROOT / "docs" / "operations.md").read_text(), re.MULTILINE)
    units = {path.name: path.read_text() for path in DEPLOY.glob("systemd/*.service")}
    final = {
        name: set(re.search(r"^RestartPreventExitStatus=(.+)$", text, re.MULTILINE)[1].split())  # type: ignore[index]
        for name, text in units.items()
    }
    assert {"74", "98"} <= final["fedmoe-coordinator.service"]
    assert all(statuses <= set(listed) for statuses in final.values())
    (job,) = manifests("single", "Job")
    values = job["spec"]["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    assert {str(value) for value in values} == final["fedmoe-worker@.service"]


def test_the_dockerfile_copies_what_is_there_and_not_ignored() -> None:
    text = (DEPLOY / "docker" / "Dockerfile").read_text()
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    copied = [word for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE) for word in line.split()[:-1]]
    assert "requirements*.lock" in copied
    for name in copied:
        assert list(ROOT.glob(name)), name
        assert f"!{name}" in rules, name
    for lock in re.findall(r"-r \"?(requirements[\w-]*)(?:\$PARTS)?\.lock", text):
        assert list(ROOT.glob(f"{lock}*.lock")), lock
    assert re.search(r"^USER \d+$", text, re.MULTILINE)


def test_containers_of_the_compose_file_have_their_secrets_and_their_volumes() -> None:
    document = compose()
    for name, service in document["services"].items():
        for secret in service.get("secrets", ()):
            assert (secret["source"] if isinstance(secret, dict) else secret) in document["secrets"], name
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in document["volumes"] or (DEPLOY / "compose" / source).exists(), volume
    ours = [service for name, service in document["services"].items() if name.startswith("coordinator")]
    assert len(ours) == 3
    assert all(service["read_only"] and service["cap_drop"] == ["ALL"] for service in ours)


@pytest.mark.parametrize("script", ["compose/prepare.sh", "slurm/worker.sbatch"])
def test_a_script_of_deploy_is_well_formed(script: str) -> None:
    subprocess.run(["bash", "-n", str(DEPLOY / script)], check=True)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the script needs openssl")
def test_secrets_are_made_once_and_fit_each_other(tmp_path: Path) -> None:
    folder, script = tmp_path / "secrets", str(DEPLOY / "compose" / "prepare.sh")
    subprocess.run(["bash", script, str(folder)], check=True, capture_output=True)
    again = subprocess.run(["bash", script, str(folder)], check=False, capture_output=True, text=True)
    assert (again.returncode, "there already" in again.stderr) == (1, True)
    needed = {Path(secret["file"]).name for secret in compose()["secrets"].values()}
    needed |= {Path(file).name for service in compose()["services"].values() for file in service.get("env_file", ())}
    made = {path.name: path for path in folder.iterdir()}
    assert needed <= made.keys()
    public = {"ca.crt", "tls.crt"}
    assert not [name for name, path in made.items() if name not in public and stat.S_IMODE(path.stat().st_mode) & 0o077]
    assert f"FEDMOE_ADMIN_TOKEN={made['admin_token'].read_text()}\n" in made["tokens.env"].read_text()
    assert made["pgpass"].read_text().strip().endswith(":" + made["database_password"].read_text())
    assert len(made["replica"].read_text().strip()) >= 32
    trusted = ssl.create_default_context(cafile=str(made["ca.crt"]))
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(made["tls.crt"], made["tls.key"])
    assert handshake(trusted, own, "coordinator-b") is None
    assert "not valid for" in str(handshake(trusted, own, "elsewhere"))


def handshake(client: ssl.SSLContext, server: ssl.SSLContext, name: str) -> ssl.SSLError | None:
    """What the client has against the server under this name, if anything."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = (client.wrap_bio(to_client, to_server, server_hostname=name), server.wrap_bio(to_server, to_client, True))
    for _ in range(6):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                return error
    return None


def test_the_health_check_ends_with_what_the_coordinator_says(tmp_path: Path) -> None:
    coordinator = CoordinatorProcess(tmp_path / "state")
    program = [sys.executable, str(DEPLOY / "docker" / "health.py")]
    environment = os.environ | {"FEDMOE_HEALTH_URL": f"{coordinator.url}/healthz"}
    coordinator.start()
    try:
        assert subprocess.run(program, env=environment, check=False).returncode == 0
    finally:
        coordinator.stop()
    after = subprocess.run(program, env=environment, check=False, capture_output=True, text=True)
    assert (after.returncode, "no answer" in after.stderr) == (1, True)


class Node:
    """A compute node with programs of ours in the places of `fedmoe` and `scontrol`."""

    def __init__(self, folder: Path, worker: str) -> None:
        self.folder = folder
        programs = folder / "bin"
        programs.mkdir()
        for name, text in (("fedmoe", worker), ("scontrol", 'echo "$@" >>"$HOME/requeued"')):
            (programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "HOME": str(folder),
            "FEDMOE_WORKER_COORDINATOR_URL": f"http://127.0.0.1:{free_port()}",
            "SLURM_JOB_ID": "77",
            "SLURM_ARRAY_TASK_ID": "3",
        }

    def start(self) -> subprocess.Popen[bytes]:
        command = ["bash", str(DEPLOY / "slurm" / "worker.sbatch"), "--dataset", "/data/{id}.jsonl"]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.DEVNULL)

    def requeued(self) -> str:
        path = self.folder / "requeued"
        return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("status", [0, 1, 71])
def test_a_worker_under_slurm_that_ends_by_itself_is_not_queued_again(tmp_path: Path, status: int) -> None:
    node = Node(tmp_path, f'echo "$@" >"$HOME/arguments"; exit {status}')
    assert node.start().wait(30) == status
    state = tmp_path / "fedmoe" / "fedmoe-worker-3"
    arguments = f"worker --worker-id fedmoe-worker-3 --state-dir {state} --dataset /data/3.jsonl\n"
    assert ((tmp_path / "arguments").read_text(), node.requeued(), state.is_dir()) == (arguments, "", True)


def test_a_worker_under_slurm_that_is_stopped_finishes_and_is_queued_again(tmp_path: Path) -> None:
    delivers = 'trap "sleep 0.3; touch $HOME/delivered; exit 0" TERM'
    node = Node(tmp_path, f'{delivers}; touch "$HOME/runs"; while true; do sleep 0.1; done')
    job = node.start()
    wait_until((tmp_path / "runs").exists)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 0
    assert ((tmp_path / "delivered").exists(), node.requeued()) == (True, "requeue 77\n")
