"""Requests about experts as a worker and an administrator send them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from live import House, push_headers, push_parameters
from starlette.testclient import TestClient
from support import MANIFEST, make_body

from fedmoe.lora.adapter import Layout, ModuleShape

LARGE = replace(MANIFEST, layout=Layout((ModuleShape("layers.0.q", 60_000, 40_000),), 2))


def push(client: TestClient, expert: str, sequence: int, base: int, status: int = 200) -> dict[str, object]:
    body = make_body(sequence)
    parameters = push_parameters(sequence, base, expert=expert)
    answer = client.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def change(client: TestClient, what: str, status: int = 200, **body: str) -> dict[str, object]:
    answer = client.post(f"/{what}_expert", json=body)
    assert answer.status_code == status, answer.text
    return dict(answer.json())


def listed(client: TestClient, **parameters: str | float | None) -> dict[str, dict[str, Any]]:
    answer = client.get("/list_experts", params=parameters).json()
    return {expert["name"]: expert for expert in answer["experts"]}


def settle(house: House) -> None:
    house.service.committer.submit(lambda transaction: None).result(10)
