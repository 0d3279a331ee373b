"""The process of one AReaL learner, started by `learner` with one end of a socket."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fedmoe.areal.batch import ExampleBatch, Sequences
from fedmoe.areal.config import ArealConfig, ArealError
from fedmoe.areal.rpc import Frame, Value, receive, send
from fedmoe.lora.adapter import Adapter, ShapeError

if TYPE_CHECKING:
    from fedmoe.areal.actor import ArealActor

_Kind = TypeVar("_Kind", str, int, float)


def serve(channel: socket.socket) -> None:
    """Make the actor that the first request describes, then answer request after request until the other end closes.

    A request that is refused before it changed anything is answered `refused`; any other failure `failed`, and ends
    the process: what is left of the actor cannot be trusted.
    """
    actor: ArealActor | None = None
    while (request := receive(channel)) is not None:
        try:
            if actor is None:
                actor, answer = _start(request)
            else:
                answer = _OPERATIONS[request.kind](actor, request)
        except ArealError as error:
            answer = Frame("refused", {"error": str(error), "type": type(error).__name__})
        except Exception as error:
            traceback.print_exc()
            send(channel, Frame("failed", {"error": f"{type(error).__name__}: {error}"}))
            raise SystemExit(1) from error
        send(channel, answer)
    if actor is not None:
        actor.close()


def _start(request: Frame) -> tuple[ArealActor, Frame]:
    if request.kind != "start":
        raise ArealError(f"the first request is `start`, got {request.kind!r}")
    try:
        from fedmoe.areal.actor import ArealActor
    except ImportError as error:
        raise ArealError(
            f"{sys.executable} has no usable AReaL ({error}); make its environment with scripts/setup_areal.sh FOLDER "
            "and give FOLDER/bin/python"
        ) from error
    actor = ArealActor(ArealConfig.from_json(_value(request, "config", str)), _value(request, "version", int))
    modules = actor.adapter().layout.modules
    lines = (f"{module.name} {module.in_features} {module.out_features}" for module in modules)
    return actor, Frame("started", {"modules": "\n".join(lines)})


def _update(actor: ArealActor, request: Frame) -> Frame:
    summary: Mapping[str, Value] = asdict(actor.update(ExampleBatch.from_arrays(request.arrays)))
    return Frame("updated", {**summary, "new_version": actor.version})


def _score(actor: ArealActor, request: Frame) -> Frame:
    scores = actor.score(Sequences.from_arrays(request.arrays))
    return Frame("scored", arrays={"logprobs": np.concatenate(scores)})


def _save(actor: ArealActor, request: Frame) -> Frame:
    folder = Path(tempfile.mkdtemp(prefix=f"adapter-{actor.version}-", dir=_value(request, "folder", str)))
    actor.save(folder)
    return Frame("saved", {"folder": folder.name})


def _load(actor: ArealActor, request: Frame) -> Frame:
    try:
        flat = np.asarray(request.arrays["flat"], np.float32)
        adapter = Adapter(actor.adapter().layout, _value(request, "alpha", float), flat)
    except ShapeError as error:
        raise ArealError(str(error)) from error
    actor.load(adapter, _value(request, "version", int))
    return Frame("loaded")


def _set_learning_rate(actor: ArealActor, request: Frame) -> Frame:
    actor.set_learning_rate(_value(request, "rate", float))
    return Frame("set")


def _restore(actor: ArealActor, request: Frame) -> Frame:
    actor.restore({name: np.asarray(array, np.float32) for name, array in request.arrays.items()})
    return Frame("restored")


_OPERATIONS: Mapping[str, Callable[[ArealActor, Frame], Frame]] = {
    "update": _update,
    "score": _score,
    "save": _save,
    "load": _load,
    "set_learning_rate": _set_learning_rate,
    "state": lambda actor, request: Frame("state", arrays=actor.state()),
    "restore": _restore,
}


def _value(request: Frame, name: str, kind: type[_Kind]) -> _Kind:
    value = request.values.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ArealError(f"the request {request.kind!r} needs {name} as {kind.__name__}, got {value!r}")
    return value


def main() -> None:
    """Serve the socket that was handed over as a file descriptor."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--socket", type=int, required=True, help="an open socket's file descriptor")
    descriptor = parser.parse_args().socket
    os.set_inheritable(descriptor, False)
    with socket.socket(fileno=descriptor) as channel:
        serve(channel)


if __name__ == "__main__":
    main()
