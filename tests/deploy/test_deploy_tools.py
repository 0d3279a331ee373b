"""`deploy/` as public programs judge it; scripts/deploy_tools.sh installs them. What is missing skips its tests."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlencode

import pytest
from builders import smollm2_layout, wait_until
from live import push_headers, push_parameters
from prometheus_client.parser import text_string_to_metric_families
from support import MANIFEST, CoordinatorProcess, free_port, make_body

from fedmoe.lora.manifest import Manifest
from fedmoe.wire.client import CoordinatorClient

pytestmark = pytest.mark.scale

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "fedmoe"
TOOLS = Path(os.environ.get("FEDMOE_TOOLS", ROOT / ".venv-tools")) / "bin"
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), *DEPLOY.rglob("*.sh"), *DEPLOY.rglob("*.sbatch")])


def program(name: str) -> str:
    path = shutil.which(name, path=f"{TOOLS}:{os.environ['PATH']}")
    if path is None:
        pytest.skip(f"{name} is not here; run scripts/deploy_tools.sh")
    return path


def checked(name: str, *arguments: str | Path, folder: Path = ROOT) -> str:
    """What a program says that must succeed."""
    command = [program(name), *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def secrets(tmp_path: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not here")
    folder = tmp_path / "secrets"
    subprocess.run(["bash", str(DEPLOY / "compose" / "prepare.sh"), str(folder)], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", ["single", "replicas"])
def test_manifests_are_what_the_chart_renders_and_kubernetes_takes(name: str) -> None:
    manifest = DEPLOY / "kubernetes" / f"{name}.yaml"
    checked("kubernetes-validate", "--strict", manifest)
    values = DEPLOY / "kubernetes" / f"{name}.values.yaml"
    rendered = checked("helm", "template", "fedmoe", CHART, "--namespace", "fedmoe", "--values", values)
    assert rendered == manifest.read_text(), "write it anew with: make manifests"


def test_the_chart_is_well_formed_and_refuses_replicas_without_what_they_share() -> None:
    checked("helm", "lint", "--strict", CHART)
    command = [program("helm"), "template", "fedmoe", str(CHART), "--set", "coordinator.replicas=3"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, "above 1 needs coordinator.databaseSecret" in refused.stderr) == (1, True)


def test_the_compose_file_is_one() -> None:
    checked("check-jsonschema", "--builtin-schema", "vendor.compose-spec", DEPLOY / "compose" / "compose.yaml")


def test_the_dockerfile_has_no_known_faults() -> None:
    checked("hadolint", DEPLOY / "docker" / "Dockerfile")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_has_no_known_faults(script: Path) -> None:
    checked("shellcheck", "-x", script)


def test_prometheus_takes_its_configuration_and_alerts_fire_when_they_should(tmp_path: Path, secrets: Path) -> None:
    folder = tmp_path / "prometheus"
    shutil.copytree(DEPLOY / "prometheus", folder)
    configuration = folder / "prometheus.yaml"
    configuration.write_text(configuration.read_text().replace("/run/secrets", str(secrets)))
    assert "SUCCESS" in checked("promtool", "check", "config", configuration)
    assert "SUCCESS" in checked("promtool", "check", "rules", folder / "alerts.yaml")
    assert "SUCCESS" in checked("promtool", "test", "rules", "alerts_test.yaml", folder=folder)
    # The tests are not passed by any rule.
    rules = folder / "alerts.yaml"
    rules.write_text(rules.read_text().replace("> 900", "> 9000"))
    failed = subprocess.run([program("promtool"), "test", "rules", "alerts_test.yaml"], cwd=folder, capture_output=True)
    assert failed.returncode != 0


@pytest.mark.parametrize(
    ("unit", "exposure"), [("fedmoe-coordinator", 20), ("fedmoe-gateway", 30), ("fedmoe-worker@", 30)]
)
def test_systemd_takes_a_unit_and_finds_it_hardened(tmp_path: Path, unit: str, exposure: int) -> None:
    text = (DEPLOY / "systemd" / f"{unit}.service").read_text()
    file = tmp_path / f"{unit}{'one' if unit.endswith('@') else ''}.service"
    file.write_text(text.replace("/opt/fedmoe/bin/fedmoe", "/usr/bin/env"))
    checked("systemd-analyze", "verify", "--man=no", file, folder=tmp_path)
    checked("systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={exposure}", file)


def balancer(folder: Path, secrets: Path, port: int, coordinator: int) -> Path:
    """The balancer's configuration with one coordinator that is there and two that are away."""
    text = (DEPLOY / "nginx" / "nginx.conf").read_text().replace("/tmp/", f"{folder}/")
    for name, of in (("coordinator-a", free_port()), ("coordinator-b", coordinator), ("coordinator-c", free_port())):
        text = text.replace(f"server {name}:5000", f"server 127.0.0.1:{of}")
    text = text.replace("listen 5000 ssl", f"listen 127.0.0.1:{port} ssl").replace("/run/secrets", str(secrets))
    if os.getuid() == 0:
        text = "user root;\n" + text  # its workers would else not be let into the folders of a test
    file = folder / "nginx.conf"
    file.write_text(text)
    return file


@contextmanager
def running(configuration: Path) -> Iterator[None]:
    command = [program("nginx"), "-c", str(configuration), "-p", str(configuration.parent), "-g", "daemon off;"]
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


class TlsCoordinator(CoordinatorProcess):
    """One that is reached by https; SSL_CERT_FILE has its authority."""

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"


def uploads(url: str, context: ssl.SSLContext) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10, context=context) as answer:
        families = {family.name: family for family in text_string_to_metric_families(answer.read().decode())}
    return float(families["fedmoe_coordinator_uploads"].samples[0].value)


def test_a_large_push_streams_through_the_balancer_to_the_coordinator_that_is_there(
    tmp_path: Path, secrets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(secrets / "ca.crt"))
    tls = ("--tls-cert", str(secrets / "tls.crt"), "--tls-key", str(secrets / "tls.key"))
    coordinator, port = TlsCoordinator(tmp_path / "state", arguments=tls), free_port()
    configuration = balancer(tmp_path, secrets, port, coordinator.port)
    checked("nginx", "-t", "-c", configuration, "-p", tmp_path)
    layout, context = smollm2_layout(16), ssl.create_default_context(cafile=str(secrets / "ca.crt"))
    body = make_body(1, layout)
    assert len(body) > 19_000_000
    coordinator.start()
    try:
        with running(configuration):
            wait_until(lambda: answers(port))
            with CoordinatorClient(f"https://127.0.0.1:{port}") as client:
                client.register("python", "w1", Manifest(MANIFEST.base, layout, MANIFEST.alpha))
            head = {**push_headers(body), "Host": f"127.0.0.1:{port}", "Content-Length": str(len(body))}
            lines = [f"POST /push_expert_update?{urlencode(push_parameters())} HTTP/1.1", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in head.items()]
            raw = socket.create_connection(("127.0.0.1", port), 60)
            with context.wrap_socket(raw, server_hostname="127.0.0.1") as connection:
                connection.sendall("\r\n".join([*lines, "", ""]).encode() + body[: len(body) // 2])
                # The coordinator has the half that was sent: the balancer keeps nothing back.
                wait_until(lambda: uploads(coordinator.url, context) == 1)
                connection.sendall(body[len(body) // 2 :])
                answer = b""
                while piece := connection.recv(1 << 16):
                    answer += piece
    finally:
        coordinator.stop()
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"version":1' in answer


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
