"""For schemathesis: bodies in safetensors, which no JSON schema describes, with the digest that they are sent with."""

import base64
import hashlib
import json
import struct
import urllib.request

import schemathesis
from hypothesis import strategies as st
from schemathesis.transport.serialization import Binary

SAFETENSORS = "application/vnd.safetensors"
#: The federation's tensors by base URL, asked for once.
_layouts: dict[str, list[tuple[str, list[int]]]] = {}


def encoded(tensors: list[tuple[str, list[int]]], number: float) -> bytes:
    """Float32 tensors that hold one number everywhere."""
    header, parts, offset = {}, [], 0
    for name, shape in tensors:
        size = 4 * shape[0] * shape[1]
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [offset, offset + size]}
        parts.append(struct.pack("<f", number) * (size // 4))
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(parts)


def layout_at(url: str, headers: dict[str, str]) -> list[tuple[str, list[int]]]:
    """Names and shapes of an update's tensors, none before the first expert."""
    if not _layouts.get(url):
        asked = urllib.request.Request(url + "/federation", headers=headers)  # noqa: S310
        with urllib.request.urlopen(asked, timeout=10) as answer:  # noqa: S310
            manifest = json.load(answer)["manifest"] or {"rank": 1, "modules": []}
        rank, found = manifest["rank"], []
        for name, n_in, n_out in manifest["modules"]:
            found += [(f"{name}.lora_A", [rank, n_in]), (f"{name}.lora_B", [n_out, rank])]
        _layouts[url] = found
    return _layouts[url]


# What is drawn only marks where an update belongs; `before_call` knows the federation.
schemathesis.openapi.media_type(SAFETENSORS, st.binary(min_size=1, max_size=64))


@schemathesis.hook
def before_call(context, case, kwargs):  # type: ignore[no-untyped-def]
    """Make a request that is meant to be right one that can be: an update of the federation, and its digest."""
    if case.media_type != SAFETENSORS or case.meta is None or not case.meta.generation.mode.is_positive:
        return
    url = kwargs.get("base_url") or case.operation.base_url
    sent = {**(kwargs.get("headers") or {}), **(case.headers or {}), **(case.operation.schema.config.headers or {})}
    token = {name: value for name, value in sent.items() if name.lower() == "authorization"}
    body = encoded(layout_at(url.rstrip("/"), token), 0.001)
    case.body = Binary(body)
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    case.headers["Content-Digest"] = f"sha-256=:{digest}:"
