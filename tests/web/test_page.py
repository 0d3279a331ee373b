"""The page in a real browser: what happens shows at once, administrators act, others do not, text stays text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from live import ADMIN, House, LiveServer, listening, open_house, push_headers, push_parameters
from support import MANIFEST, make_body

from fedmoe.coordinator import Aggregation
from fedmoe.server.gate.verdict import judge
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.experts import GatewayScores

pytestmark = pytest.mark.web

Served = tuple[House, LiveServer]


def push(server: LiveServer, sequence: int, base: int, token: str | None = None) -> None:
    body = make_body(sequence)
    headers = push_headers(body) | ({"Authorization": f"Bearer {token}"} if token else {})
    parameters = push_parameters(sequence, base, expert="law", loss=3.0 / (sequence + 1))
    answer = httpx2.post(
        f"{server.url}/push_expert_update", params=parameters, content=body, headers=headers, trust_env=False
    )
    assert answer.status_code == 200, answer.text


def beat(server: LiveServer, **changes: object) -> None:
    body = {"expert": "law", "worker": "w1", "state": "training", "interval": 1.0, "step": 7, "steps": 10} | changes
    assert httpx2.post(f"{server.url}/heartbeat", json=body, trust_env=False).status_code == 204


def register(server: LiveServer, token: str | None = None) -> None:
    # Not by the house: Playwright runs an event loop in this thread.
    with CoordinatorClient(server.url, token) as client:
        client.register("law", "w1", MANIFEST)


def cells(page: Any, table: str) -> list[list[str]]:
    rows = page.locator(f"#{table} tbody tr")
    return [rows.nth(number).locator("td").all_inner_texts() for number in range(rows.count())]


def has(page: Any, selector: str, text: str, seconds: float = 20.0) -> None:
    page.locator(selector).filter(has_text=text).first.wait_for(timeout=1000 * seconds)


def log_in(page: Any, server: LiveServer, token: str) -> None:
    page.goto(server.url)
    page.wait_for_url("**/login")
    page.fill("#token", token)
    page.click("button[type=submit]")
    page.wait_for_url(f"{server.url}/")
    has(page, "#live", "live")


def test_a_push_shows_without_a_reload_and_the_chart_is_drawn(opened: Served, page: Any) -> None:
    _, server = opened
    register(server)
    page.goto(server.url)
    has(page, "#live", "live")
    assert [row[:3] for row in cells(page, "experts")] == [["law", "0", "0"]]
    for number in range(3):
        push(server, number, number)
    has(page, "#experts tbody", "1.000")
    assert cells(page, "experts")[0][:3] == ["law", "3", "1"]
    has(page, "#events", "landed")
    page.locator("#chart .scatterlayer .trace").first.wait_for(timeout=20_000)
    has(page, "#gateway", "law 3")


def test_a_dead_worker_turns_silent(opened: Served, page: Any) -> None:
    _, server = opened
    register(server)
    beat(server, tokens_per_second=120.0)
    page.goto(server.url)
    has(page, "#workers", "training")
    assert cells(page, "workers")[0][:5] == ["w1", "law", "training", "7 / 10", "120"]
    has(page, "#workers", "silent", 30)
    beat(server, state="left")
    has(page, "#workers", "left")


def test_an_administrator_acts_after_a_confirmation_that_says_what_will_happen(guarded: Served, page: Any) -> None:
    house, server = guarded
    register(server, ADMIN)
    push(server, 0, 0, ADMIN)
    log_in(page, server, ADMIN)
    page.get_by_role("button", name="Retire").click()
    assert "leaves the gateway" in page.inner_text("#dialog-text")
    page.click("#dialog-cancel")
    assert not house.service.coordinator.expert("law").retired
    page.get_by_role("button", name="Retire").click()
    page.fill("#dialog-reason", "tried")
    page.click("#dialog-confirm")
    has(page, "#experts", "law (retired)")
    assert house.service.coordinator.expert("law").retired
    page.get_by_role("button", name="Bring back").click()
    page.click("#dialog-confirm")
    page.get_by_role("button", name="Roll back").click()
    page.fill("#dialog-version", "0")
    page.click("#dialog-confirm")
    has(page, "#events", "expert rolled back")
    assert house.service.coordinator.expert("law").version == 2


def test_a_viewer_sees_everything_and_changes_nothing(guarded: Served, page: Any) -> None:
    house, server = guarded
    register(server, ADMIN)
    house.gate.add("a-viewer-who-only-looks", "viewer")
    log_in(page, server, "a-viewer-who-only-looks")
    has(page, "#role", "viewer")
    assert cells(page, "experts")[0][0] == "law"
    assert page.get_by_role("button", name="Retire").count() == 0
    refused = page.evaluate(
        """async () => (await fetch("/retire_expert", {method: "POST", headers: {"Content-Type": "application/json"},
        body: JSON.stringify({expert: "law"})})).status"""
    )
    assert refused == 403
    assert not house.service.coordinator.expert("law").retired
    assert len(page.errors) == 1  # Chromium tells of the refused request
    page.errors.clear()


def test_a_wrong_token_is_told_and_a_revoked_one_leads_back_to_the_login(guarded: Served, page: Any) -> None:
    house, server = guarded
    page.goto(server.url)
    page.fill("#token", "a-token-of-nobody-at-all")
    page.click("button[type=submit]")
    has(page, "#answer", "not known here")
    page.errors.clear()
    token = house.gate.add("a-viewer-who-only-looks", "viewer")
    log_in(page, server, "a-viewer-who-only-looks")
    house.gate.revoke(token.hash)
    page.wait_for_url("**/login?ended", timeout=60_000)
    has(page, "#answer", "Your login has ended")
    page.errors.clear()


def test_text_of_others_is_shown_as_text(opened: Served, page: Any) -> None:
    _, server = opened
    register(server)
    beat(server, state="loading", phase="<img src=x onerror=alert(1)>", device="<script>alert(2)</script>")
    page.on("dialog", lambda dialog: pytest.fail("a script of somebody else ran"))
    page.goto(server.url)
    has(page, "#workers", "<img src=x onerror=alert(1)>")
    assert page.locator("#workers img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_moves_sideways_in_both_languages(opened: Served, browser: Any, scheme: str) -> None:
    _, server = opened
    register(server)
    push(server, 0, 0)
    beat(server)
    context = browser.new_context(locale="zh-CN", viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(server.url)
    has(page, "#workers", "训练中")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.get_by_role("button", name="English").click()
    has(page, "#workers", "training")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate("document.documentElement.lang") == "en"
    context.close()


def scored(published: float | None) -> GatewayScores:
    losses = {"base": 3.0, "own": 2.0}
    return GatewayScores(
        set="0" * 16, evaluator="e", expert="law", tokens=9, **losses, published=published, candidates={"sum": 2.5}
    )


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (
            judge([scored(2.2)], ["sum"], "version 3").reason,
            "sum 在最差领域 law 上保留 50.0 % 的增益，但 版本 3 在其最差领域 law 上保留 80.0 %：低出超过 1.0 %",
        ),
        (judge([scored(None)], ["sum"]).reason, "sum 在最差领域 law 上保留 50.0 % 的增益；没有可比较的已发布网关"),
        ("the last try failed: disk $1 {1} full", "上次尝试失败：disk $1 {1} full"),
        ("what a later version says", "what a later version says"),
    ],
)
def test_what_the_gate_says_has_chinese_words_with_the_same_values(
    said: str, shown: str, opened: Served, page: Any
) -> None:
    page.goto(opened[1].url)
    has(page, "#gateway", "evaluation gate")
    assert page.evaluate("text => gateText(text)", said) == said
    assert page.evaluate("text => { language = 'zh'; return gateText(text); }", said) == shown


def test_on_the_chinese_page_the_gate_speaks_chinese(tmp_path: Path, browser: Any) -> None:
    context = browser.new_context(locale="zh-CN")
    page = context.new_page()
    with open_house(tmp_path, Aggregation(evaluation_gate=True)) as house, listening(house.app) as server:
        register(server)
        page.goto(server.url)
        has(page, "#gateway", "最近 300 秒内没有评估器询问；请用 'fedmoe evaluator' 启动一个")
        page.get_by_role("button", name="English").click()
        has(page, "#gateway", "no evaluator has asked in the last 300 s; start one with 'fedmoe evaluator'")
        context.close()
        house.app.state.parts.live.close()


def test_all_that_can_be_done_can_be_done_by_keyboard(guarded: Served, page: Any) -> None:
    _, server = guarded
    register(server, ADMIN)
    log_in(page, server, ADMIN)
    button = page.get_by_role("button", name="Retire")
    for _ in range(20):
        page.keyboard.press("Tab")
        if button.evaluate("node => node === document.activeElement"):
            break
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    has(page, "#experts", "law (retired)")


def test_a_coordinator_that_was_away_is_live_again(opened: Served, page: Any) -> None:
    _, server = opened
    register(server)
    page.goto(server.url)
    has(page, "#live", "live")
    page.context.set_offline(True)
    page.evaluate("() => new Promise((resolve) => setTimeout(resolve, 50))")
    page.context.set_offline(False)
    push(server, 0, 0)
    deadline = time.monotonic() + 20
    while cells(page, "experts")[0][1] != "1":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    page.errors.clear()
