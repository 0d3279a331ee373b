"""This build beside an earlier one, in one run: processor seconds of an update, an arena step, merges, starts.

    python benchmarks/bench_against.py --against REV [--pairs 5] [--parts update list step merge help start]

REV is unpacked into a temporary folder and run in the same environment, found through PYTHONPATH. Both builds take
turns, pair by pair and in alternating order, so that a change of the machine meets both; one pair before them warms up.

- `update`: a coordinator process of each build takes `--updates` durable fp32 updates of SmolLM2-135M at rank 16 (19.5
  MB) over loopback, from one worker as workers ask: for the newest weights, or the short answer where its own update is
  all that is new. Its processor seconds an update; both must hold the same weights in the end.
- `list`: the list of 50 experts of that size and the gateway's facts, asked for after an update: its processor seconds.
- `step`: a whole arena step (sample 8 x 32 tokens a policy, learn, publish) of `--policies` policies in process.
- `merge`: ten adapters of rank 16 with the shapes of SmolLM2-135M merged by default (weighted average, 20 times) and by
  `regmean` (once), exactly; `--layers` of its 30 layers.
- `help`: `fedmoe --help`, from start to end, 5 times.
- `start`: `fedmoe worker` on SmolLM2 and the text of Python's library, in a new folder, until its first step is done.

Steps and merges are those of each revision's own benchmarks, which know its modules; that both gave the same bits is
reported as `same_result`. Ratios are of pairs: below 1 this build takes less.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

from lib.harness import ROOT, pin_threads, write_result

pin_threads(1)

import psutil  # noqa: E402  # threads are pinned first
from bench_coordinator import MANIFEST, Prepared, prepare, running_coordinator  # noqa: E402
from lib.coordinator_process import coordinator_process  # noqa: E402

from fedmoe.wire.client import CoordinatorClient  # noqa: E402
from fedmoe.wire.contract.messages import SAFETENSORS  # noqa: E402

PARTS = ("update", "list", "step", "merge", "help", "start")
#: Name -> way, and how often one measurement does it: a second of work at least, or page faults decide.
WAYS = {"merge, default": ("weighted_average, exact", 20), "merge, regmean": ("regmean, exact", 1)}
HELPS = 5
LISTED = 50
WORK = Path(__file__).parent / "lib" / "against_work.py"
#: A micro-batch holds the samples of one policy, as in `bench_arena_throughput.py`.
MICRO_BATCH_TOKENS = 320

#: Does the work once and gives the processor seconds it took.
Once = Callable[[], float]
Digest = Callable[[], str | None]
Side = tuple[Once, Digest]


def unpack(revision: str, folder: Path) -> str:
    """The package and the benchmarks of a revision, laid into `folder`; gives its commit."""
    command = ["git", "rev-parse", "--verify", f"{revision}^{{commit}}"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if commit.returncode != 0:
        raise SystemExit(f"--against {revision}: {commit.stderr.strip()}; name a commit of this repository")
    name = commit.stdout.strip()
    archive = subprocess.run(
        ["git", "archive", name, "fedmoe", "benchmarks"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    return name


def environment(source: Path) -> dict[str, str]:
    """In which `fedmoe` is that of `source`."""
    return os.environ | {"PYTHONPATH": str(source), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def check_source(source: Path) -> None:
    """Refuse to measure another package than that of `source`."""
    command = [sys.executable, "-P", "-c", "import fedmoe; print(fedmoe.__file__)"]
    done = subprocess.run(command, env=environment(source), capture_output=True, text=True, check=True)
    if not Path(done.stdout.strip()).is_relative_to(source):
        raise SystemExit(f"fedmoe is imported from {done.stdout.strip()}, not from {source}")


@contextmanager
def updates(source: Path, count: int, prepared: Prepared) -> Iterator[Side]:
    """A coordinator of this build or of the other: `count` updates of one worker after one another."""
    with tempfile.TemporaryDirectory(prefix="against-") as state, running_coordinator(state, source) as running:
        seen = psutil.Process(running.pid)
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=120)
        sequence = 0

        def once() -> float:
            nonlocal sequence
            before = sum(seen.cpu_times()[:2])
            for _ in range(count):
                push(connection, prepared, sequence)
                sequence += 1
            return float(sum(seen.cpu_times()[:2]) - before) / count

        def digest() -> str:
            with CoordinatorClient(running.url) as api:
                pulled = api.pull_expert("expert-0")
                assert pulled is not None
                return pulled.digest

        yield once, digest
        connection.close()


@contextmanager
def listings(source: Path, prepared: Prepared) -> Iterator[Side]:
    """A coordinator of this build or of the other with `LISTED` experts that have learned something."""
    with tempfile.TemporaryDirectory(prefix="against-") as state, running_coordinator(state, source) as running:
        seen = psutil.Process(running.pid)
        connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=600)
        with CoordinatorClient(running.url) as api:
            for number in range(LISTED):
                api.register(f"expert-{number}", "bench", MANIFEST)
                push(connection, prepared, 0, f"expert-{number}")
        sequence = 0

        def once() -> float:
            nonlocal sequence
            sequence += 1
            push(connection, prepared, sequence)
            before = sum(seen.cpu_times()[:2])
            for path in ("/list_experts", "/get_gateway_info"):
                connection.request("GET", path)
                answer = connection.getresponse()
                assert answer.status == 200, answer.read()[:300]
                answer.read()
            return float(sum(seen.cpu_times()[:2]) - before)

        yield once, lambda: None
        connection.close()


def push(connection: http.client.HTTPConnection, prepared: Prepared, sequence: int, expert: str = "expert-0") -> None:
    """One durable update on the newest version."""
    parts, headers = prepared.unique(sequence)
    fields = {"expert": expert, "worker": expert, "epoch": "bench", "sequence": sequence, "base_version": sequence}
    query = urlencode({**fields, "answer": "weights"})
    wishes = {"Accept": SAFETENSORS, "Prefer": "return=minimal"}
    connection.request("POST", f"/push_expert_update?{query}", parts, headers | wishes)
    response = connection.getresponse()
    answer = response.read()
    if response.status != 200:
        raise RuntimeError(f"push answered {response.status}: {answer[:300]!r}")


@contextmanager
def work(source: Path, kind: str, options: Mapping[str, object]) -> Iterator[Side]:
    """A process that does one of the works of `lib/against_work.py` whenever it is asked to."""
    command = [sys.executable, "-P", str(WORK), str(source), kind, json.dumps(options)]
    with subprocess.Popen(
        command, env=environment(source), cwd=source, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        commands, answers = process.stdin, process.stdout

        def ask(line: str) -> dict[str, object]:
            print(line, file=commands, flush=True)
            answer = answers.readline()
            if not answer:
                raise SystemExit(f"{kind} of {source} ended with {process.wait(60)}; its output is above")
            return dict(json.loads(answer))

        yield lambda: float(str(ask("run")["cpu"])), lambda: str(ask("end")["digest"])
        commands.close()


@contextmanager
def help_text(source: Path) -> Iterator[Side]:
    """`fedmoe --help`; its text may have changed, so it has no digest."""

    def once() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-P", "-m", "fedmoe", "--help"]
        for _ in range(HELPS):
            subprocess.run(command, env=environment(source), stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    yield once, lambda: None


@contextmanager
def worker_start(source: Path) -> Iterator[Side]:
    """A worker of this build or of the other from its start to its first step; it is ended then."""
    with tempfile.TemporaryDirectory(prefix="against-") as name, coordinator_process(name, source=source) as running:
        folder = Path(name)
        texts = sorted(Path(json.__file__).parents[1].glob("*.py"))
        rows = (json.dumps({"text": text.read_text(encoding="utf-8")[:4000]}) for text in texts)
        (folder / "text.jsonl").write_text("\n".join(rows), encoding="utf-8")

        def once() -> float:
            state = Path(tempfile.mkdtemp(dir=folder))
            options = {
                "--coordinator-url": running.url,
                "--worker-id": "bench",
                "--specialty": "text",
                "--dataset": str(folder / "text.jsonl"),
                "--base-model": "smollm2",
                "--max-length": "256",
                "--state-dir": str(state),
            }
            words = [word for pair in options.items() for word in pair]
            command = [sys.executable, "-P", "-m", "fedmoe", "worker", *words]
            cache = environment(source) | {"XDG_CACHE_HOME": str(state / "cache")}
            with subprocess.Popen(command, env=cache, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as worker:
                try:
                    return _until_first_step(psutil.Process(worker.pid), state / "metrics.jsonl")
                finally:
                    worker.kill()

        yield once, lambda: None


def _until_first_step(worker: psutil.Process, metrics: Path) -> float:
    """Processor seconds of a worker and its own children at its first step."""
    while not (metrics.exists() and '"step"' in metrics.read_text(encoding="utf-8")):
        if worker.status() == psutil.STATUS_ZOMBIE:
            raise SystemExit("the worker ended before its first step; try its command by hand")
        time.sleep(0.05)
    return float(sum(worker.cpu_times()[:4]))


def compared(sides: Mapping[str, Side], pairs: int) -> dict[str, object]:
    """Processor seconds of both sides and of each pair's ratio."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(pairs + 1):
        for name in list(sides) if number % 2 else reversed(list(sides)):
            taken = sides[name][0]()
            if number:
                seconds[name].append(taken)
    digests = [digest() for _, digest in sides.values()]
    ratios = [now / before for before, now in zip(seconds["before"], seconds["now"], strict=True)]
    return {
        **{name: spread(values) for name, values in seconds.items()},
        "ratio": spread(ratios),
        "pairs": pairs,
        "same_result": None if None in digests else digests[0] == digests[1],
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "minimum": min(values), "maximum": max(values)}


def cases(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[Path], AbstractContextManager[Side]]]]:
    """What is compared: its name, and how a side of it is opened."""
    if "update" in options.parts:
        yield "update", partial(updates, count=options.updates, prepared=prepare("fp32"))
    if "list" in options.parts:
        yield f"list and gateway's facts, {LISTED} experts", partial(listings, prepared=prepare("fp32"))
    if "step" in options.parts:
        step = {"base": options.base, "policies": options.policies, "micro_batch_tokens": MICRO_BATCH_TOKENS}
        yield f"arena step, {options.policies} policies", partial(work, kind="step", options=step)
    if "merge" in options.parts:
        for name, (way, times) in WAYS.items():
            merge = {"model": "smollm2-135m", "layers": options.layers, "count": options.experts}
            merge |= {"way": way, "times": times}
            yield name, partial(work, kind="merge", options=merge)
    if "help" in options.parts:
        yield "fedmoe --help", help_text
    if "start" in options.parts:
        yield "worker until its first step", worker_start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, metavar="REV", help="the earlier revision, as git names it")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", type=int, default=5, help="measured pairs, after one to warm up")
    parser.add_argument("--updates", type=int, default=20, help="updates of one measurement")
    parser.add_argument("--base", default="smollm2", help="base model of the arena step (smollm2, tiny)")
    parser.add_argument("--policies", type=int, default=2)
    parser.add_argument("--layers", type=int, default=30, help="of SmolLM2's 30, in a merge")
    parser.add_argument("--experts", type=int, default=10, help="adapters in a merge")
    parser.add_argument("--name", default="against", help="name of the result file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedmoe-before-") as folder:
        sources = {"before": Path(folder), "now": ROOT}
        results: dict[str, object] = {"before": unpack(options.against, sources["before"])}
        for source in sources.values():
            check_source(source)
        measured: dict[str, object] = {}
        for name, opened in cases(options):
            with ExitStack() as stack:
                sides = {side: stack.enter_context(opened(source)) for side, source in sources.items()}
                measured[name] = compared(sides, options.pairs)
            print(name, json.dumps(measured[name]), flush=True)
    print(write_result(options.name, {**results, "measured": measured}, vars(options), [0]))


if __name__ == "__main__":
    main()
