"""`/metrics` of the coordinator: what it counts, who may read it, and that no label has values without end."""

from __future__ import annotations

import re
import urllib.request
from pathlib import Path

from builders import wait_until
from live import ADMIN, JOIN, House, open_house, push_headers, push_parameters
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient
from support import LAYOUT, MANIFEST, CoordinatorProcess, make_body, make_flat

from fedmoe.lora.codec import encode
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.routes.coordinator_metrics import CoordinatorMetrics
from fedmoe.server.routes.request_counts import RequestCounts
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.replicas import OwnerInfo
from fedmoe.wire.http.metrics import metrics_page

ROOT = Path(__file__).parents[2]
PREFIX = "fedmoe_coordinator_"
#: Every label there is. Experts are bounded by --max-experts, the others by the coordinator's source.
LABELS = {"version", "method", "route", "status", "code", "expert", "result", "state", "le", "duty", "replica"}


class Scraped:
    """A page of metrics as Prometheus reads it."""

    def __init__(self, page: str) -> None:
        self.families = list(text_string_to_metric_families(page))
        self.samples = [sample for family in self.families for sample in family.samples]

    def __call__(self, name: str, **labels: str) -> float | None:
        """The value of one series; None where there is none."""
        return next((s.value for s in self.samples if (s.name, s.labels) == (PREFIX + name, labels)), None)

    def total(self, name: str, **labels: str) -> float:
        """The sum of all series with these labels."""
        wanted = labels.items()
        return sum(s.value for s in self.samples if s.name == PREFIX + name and wanted <= s.labels.items())


def scraped(client: TestClient) -> Scraped:
    answer = client.get("/metrics")
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (200, "text/plain")
    return Scraped(answer.text)


def push(client: TestClient, body: bytes, sequence: int, base: int = 0, **others: str) -> int:
    parameters = push_parameters(sequence, base, **others)
    return client.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body)).status_code


def test_a_push_changes_the_numbers_of_what_became_of_it(http: TestClient) -> None:
    body = make_body(1)
    assert push(http, body, 0) == push(http, body, 0) == push(http, make_body(2), 1) == 200
    assert push(http, make_body(3), 1) == push(http, make_body(3), 2, base=7) == 409
    now = scraped(http)
    results = ("landed", "repeated", "refused", "held")
    assert [now("updates_total", expert="python", result=result) for result in results] == [2, 1, 2, None]
    assert now("updates_refused_total", code="sequence_reused") == 1
    assert now("updates_refused_total", code="unknown_version") == 1
    assert now("update_bytes_total") == len(body) + len(make_body(2))
    # One was fresh, one a version behind.
    assert [now("update_staleness_bucket", le=le) for le in ("0.0", "1.0")] == [1, 2]
    assert now("push_duration_seconds_count") == 3
    assert now("requests_total", method="POST", route="/push_expert_update", status="409") == 2
    assert (now("expert_version", expert="python"), now("active_workers", expert="python")) == (2, 1)
    assert (now("experts", state="active"), now("experts", state="retired")) == (1, 0)
    assert (now("uploads"), now("decisions_waiting"), now("storage_failed")) == (0, 0, 0)
    assert now("journal_events") == 3
    newest = now("last_update_timestamp_seconds", expert="python")
    assert newest is not None
    assert newest > 1.7e9


def test_a_held_update_waits_and_counts_neither_as_landed_nor_as_refused(http: TestClient) -> None:
    for sequence in range(6):
        assert push(http, make_body(sequence), sequence, sequence) == 200
    assert push(http, encode(LAYOUT, make_flat(9) * 1e4), 6, 6) == 202
    now = scraped(http)
    assert (now("updates_total", expert="python", result="held"), now("held_updates")) == (1, 1)
    assert (now("updates_total", expert="python", result="landed"), now("update_staleness_count")) == (6, 6)
    assert now.total("updates_total", result="refused") == 0


def test_the_gateway_has_a_version_and_a_time_once_it_was_built(http: TestClient) -> None:
    assert scraped(http)("gateway_build_seconds") is None
    assert push(http, make_body(1), 0) == http.get("/get_gateway_weights").status_code == 200
    seconds, version = (scraped(http)(name) for name in ("gateway_build_seconds", "gateway_version"))
    assert seconds is not None
    assert (seconds > 0, version) == (True, http.get("/get_gateway_info").json()["version"])


def test_an_expert_is_shown_by_its_newest_name_until_it_is_retired(http: TestClient) -> None:
    push(http, make_body(1), 0)
    http.post("/rename_expert", json={"expert": "python", "name": "snakes"})
    now = scraped(http)
    assert now("updates_total", expert="snakes", result="landed") == now("expert_version", expert="snakes") == 1
    assert now("updates_total", expert="python", result="landed") is None
    http.post("/retire_expert", json={"expert": "snakes", "reason": "done"})
    now = scraped(http)
    assert (now("experts", state="active"), now("experts", state="retired")) == (0, 1)
    assert not [sample for sample in now.samples if sample.labels.get("expert")]


def test_what_callers_invent_makes_no_series(http: TestClient) -> None:
    scraped(http)
    before = {(sample.name, *sample.labels) for sample in scraped(http).samples}
    for number in range(20):
        http.get(f"/invented/{number}")
        http.request(f"VERB{number}", "/federation")
        push(http, make_body(1), number, expert=f"invented{number}")
        push(http, make_body(1), 0, worker=f"w{number}", epoch=f"e{number}")
    now = scraped(http)
    assert now("requests_total", method="GET", route="other", status="404") == 20
    assert now("requests_total", method="other", route="/federation", status="405") == 20
    assert now("updates_total", expert="", result="refused") == 20
    assert {label for sample in now.samples for label in sample.labels} <= LABELS
    after = {(sample.name, *sample.labels) for sample in now.samples}
    values = {value for sample in now.samples for value in sample.labels.values()}
    assert len(after) <= len(before) + 3
    assert not [value for value in values if re.search(r"invented|^w\d|^e\d|VERB", value)]


def test_only_administrators_read_it(locked_house: House) -> None:
    with locked_house.client() as client:
        assert client.get("/metrics").status_code == 401
    with locked_house.client(JOIN) as client:
        assert (client.get("/metrics").status_code, client.get("/metrics").json()["code"]) == (403, "forbidden")
    with locked_house.client(ADMIN) as client:
        now = scraped(client)
    assert now("requests_total", method="GET", route="/metrics", status="401") == 1
    assert now("requests_total", method="GET", route="/metrics", status="403") == 2


def test_failed_storage_is_seen(tmp_path: Path) -> None:
    with open_house(tmp_path) as house, house.client() as client:
        house.service.committer.fail("the disk is gone")
        assert scraped(client)("storage_failed") == 1


def test_the_owner_of_several_replicas_has_a_term_and_none_is_no_reason_to_show_nothing(house: House) -> None:
    owner = OwnerInfo(duty="federation", replica="a", url="https://a", term=4, seconds_left=2.0)

    def away() -> list[OwnerInfo]:
        raise RefusedError("no_owner", "the database is away.")

    page = metrics_page(CoordinatorMetrics(house.service, RequestCounts(()), lambda: [owner]).collect())
    assert Scraped(bytes(page.body).decode())("owner_term", duty="federation", replica="a") == 4
    page = metrics_page(CoordinatorMetrics(house.service, RequestCounts(()), away).collect())
    assert Scraped(bytes(page.body).decode())("storage_failed") == 0


def test_workers_of_before_a_restart_count_once_they_push_again(tmp_path: Path) -> None:
    with open_house(tmp_path) as house, house.client() as client:
        house.register("python")
        push(client, make_body(1), 0)
        assert scraped(client)("active_workers", expert="python") == 1
    with open_house(tmp_path) as house, house.client() as client:
        assert scraped(client)("active_workers", expert="python") == 0
        push(client, make_body(2), 1, 1)
        assert scraped(client)("active_workers", expert="python") == 1


def test_the_document_lists_every_metric_by_its_kind(http: TestClient) -> None:
    push(http, make_body(1), 0)
    push(http, make_body(2), 0)
    http.get("/get_gateway_info")
    text = (ROOT / "docs" / "metrics.md").read_text()
    listed = set(re.findall(r"^\| `fedmoe_coordinator_(\w+?)(?:_total)?` \| (\w+)", text, re.MULTILINE))
    shown = {(family.name.removeprefix(PREFIX), family.type) for family in scraped(http).families}
    # Those of the disk are there where the coordinator bounds it, see below.
    assert listed == shown | {("stored_bytes", "gauge"), ("disk_free_bytes", "gauge")}


def test_a_coordinator_process_is_scraped(tmp_path: Path) -> None:
    coordinator = CoordinatorProcess(tmp_path / "state")
    coordinator.start()
    try:
        with CoordinatorClient(coordinator.url) as client:
            client.register("python", "w1", MANIFEST)
        body = make_body(1)
        _post(coordinator.url, body)
        wait_until(lambda: _read(coordinator.url)("stored_bytes") == len(body))
        now = _read(coordinator.url)
    finally:
        coordinator.stop()
    assert now("updates_total", expert="python", result="landed") == 1
    free = now("disk_free_bytes")
    assert free is not None
    assert free > len(body)


def _read(url: str) -> Scraped:
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        return Scraped(answer.read().decode())


def _post(url: str, body: bytes) -> None:
    query = "&".join(f"{name}={value}" for name, value in push_parameters().items())
    request = urllib.request.Request(f"{url}/push_expert_update?{query}", body, push_headers(body), method="POST")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200
