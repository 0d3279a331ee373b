"""What tries to break the page: markup and huge texts everywhere, restarts, a second tab, a clock that jumps."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from live import ADMIN, House, LiveServer, listening, open_house, push_headers, push_parameters
from support import MANIFEST, CoordinatorProcess, make_body

from fedmoe.federation.events import UpdateAccepted
from fedmoe.wire.client import CoordinatorClient

pytestmark = pytest.mark.web

Served = tuple[House, LiveServer]
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>"
HEADERS = {"Authorization": f"Bearer {ADMIN}"}


def has(page: Any, selector: str, text: str) -> None:
    page.locator(selector).filter(has_text=text).first.wait_for(timeout=60_000)


def ask(url: str, path: str, **options: Any) -> httpx2.Response:
    return httpx2.post(url + path, headers=HEADERS | options.pop("headers", {}), trust_env=False, **options)


def push(url: str, sequence: int, **others: str | float) -> httpx2.Response:
    body = make_body(sequence)
    return ask(
        url,
        "/push_expert_update",
        params=push_parameters(sequence, sequence, expert="law", **others),
        content=body,
        headers=push_headers(body),
    )


def beat(url: str, **changes: object) -> None:
    body = {"expert": "law", "worker": "w1", "state": "training", "interval": 1.0} | changes
    assert ask(url, "/heartbeat", json=body).status_code == 204


def log_in(page: Any, url: str, token: str = ADMIN) -> None:
    page.goto(f"{url}/login")
    page.fill("#token", token)
    page.click("button[type=submit]")
    page.wait_for_url(f"{url}/")
    has(page, "#live", "live")


def register(url: str, worker: str = "w1") -> None:
    with CoordinatorClient(url, ADMIN) as client:
        client.register("law", worker, MANIFEST)


def test_markup_and_huge_texts_stay_text_wherever_somebody_can_write_one(guarded: Served, page: Any) -> None:
    house, server = guarded
    register(server.url)
    house.gate.add("a-viewer-who-only-looks", "viewer", label=MARKUP)
    assert push(server.url, 0, loss=1.0).status_code == 200
    beat(server.url, state="loading", phase=MARKUP, device="W" * 200, lines=[MARKUP, "x" * 500])
    house.service.activity.refused("law", "w1", MARKUP + "y" * 5000)
    assert ask(server.url, "/rollback", json={"expert": "law", "to_version": 0, "reason": MARKUP}).status_code == 200
    page.on("dialog", lambda dialog: pytest.fail("a script of somebody else ran"))
    page.set_viewport_size({"width": 390, "height": 800})
    log_in(page, server.url)
    for table in ("#workers", "#events"):
        has(page, table, MARKUP)
    page.click("#tokens-details summary")
    has(page, "#tokens", MARKUP)
    page.get_by_role("button", name="Revoke").last.click()
    has(page, "#dialog-title", MARKUP)
    page.click("#dialog-cancel")
    page.get_by_role("button", name="Log", exact=True).click()
    has(page, "#log-lines", MARKUP)
    page.keyboard.press("Escape")
    assert page.locator("main img, main script, dialog img, dialog script").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_what_a_page_does_without_the_rights_is_refused_in_words(guarded: Served, page: Any) -> None:
    house, server = guarded
    register(server.url)
    house.gate.add("a-viewer-who-only-looks", "viewer")
    log_in(page, server.url, "a-viewer-who-only-looks")
    # As if somebody had put the administrator's buttons there.
    page.evaluate("ask('retire', 'law', '/retire_expert', { expert: 'law' })")
    page.click("#dialog-confirm")
    has(page, "#dialog-answer", "a viewer's token does not open /retire_expert")
    assert not house.service.coordinator.expert("law").retired
    page.errors.clear()


def test_a_workers_token_shows_its_own_expert_and_worker_only(guarded: Served, page: Any) -> None:
    house, server = guarded
    register(server.url)
    with CoordinatorClient(server.url, ADMIN) as client:
        client.register("medicine", "w2", MANIFEST)
    house.gate.add("the-token-of-worker-1-alone", "worker", worker="w1", experts=["law"])
    for worker in ("w1", "w2"):
        beat(server.url, worker=worker, lines=[f"a line of {worker}"])
    beat(server.url, expert="medicine", worker="w2")
    log_in(page, server.url, "the-token-of-worker-1-alone")
    has(page, "#workers", "w1")
    assert page.locator("#experts tbody tr").all_inner_texts()[0].startswith("law")
    assert page.locator("#experts tbody tr").count() == page.locator("#workers tbody tr").count() == 1
    assert page.locator("#tokens-section").is_hidden()
    other = page.evaluate("async () => (await fetch('/worker_log?worker=w2&expert=law')).status")
    assert other == 403
    page.errors.clear()


def test_ten_thousand_updates_are_drawn_as_few_points(guarded: Served, page: Any) -> None:
    house, server = guarded
    register(server.url)
    now = house.service.now
    events = [
        UpdateAccepted(
            *("law", "w1", "e1", number, number, "0" * 64, 0, 1.0, number + 1, now - 10_000 + number),
            info={"loss": 1000 / (number + 1)},
        )
        for number in range(10_000)
    ]
    house.service.activity.observe(events)
    log_in(page, server.url)
    page.locator("#chart .scatterlayer .trace").first.wait_for(timeout=60_000)
    points = page.evaluate("document.getElementById('chart').data[0].x.length")
    assert 100 <= points <= 240
    assert page.locator("#events li").count() == 50


def test_the_page_lives_through_a_restart_with_its_login(
    page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMOE_ADMIN_TOKEN", ADMIN)
    coordinator = CoordinatorProcess(tmp_path / "state")
    coordinator.start()
    try:
        register(coordinator.url)
        log_in(page, coordinator.url)
        has(page, "#experts", "law")
        coordinator.kill()
        has(page, "#live", "no connection")
        coordinator.start()
        assert push(coordinator.url, 0, loss=1.0).status_code == 200
        has(page, "#live", "live")
        has(page, "#experts tbody td:nth-child(2)", "1")
        assert page.url == f"{coordinator.url}/"
        page.get_by_role("button", name="Retire").click()
        page.click("#dialog-confirm")
        has(page, "#experts", "law (retired)")
        page.goto("about:blank")
        page.errors.clear()
    finally:
        coordinator.kill()


def test_who_logs_out_in_one_tab_is_logged_out_in_the_other(guarded: Served, page: Any) -> None:
    _, server = guarded
    register(server.url)
    log_in(page, server.url)
    other = page.context.new_page()
    other.goto(server.url)
    has(other, "#experts", "law")
    page.click("#log-out")
    page.wait_for_url("**/login")
    other.wait_for_url("**/login")


def test_a_clock_that_was_set_back_hides_no_dead_worker(tmp_path: Path, page: Any) -> None:
    with open_house(tmp_path) as house, listening(house.app) as server:
        register(server.url)
        beat(server.url)
        page.goto(server.url)
        has(page, "#workers", "training")
        house.service.committer.clock = lambda: time.time() - 3600
        has(page, "#workers", "silent")
        assert "-" not in page.locator("#workers tbody td").nth(7).inner_text()
        house.app.state.parts.live.close()
