"""What it gives to rank the likely experts and the gateway again by how well each explains the prompt: SmolLM2-135M.

    python benchmarks/bench_rerank.py --work FOLDER [--prompts 24] [--half test|choice]

The experts of `bench_merge_quality.py` (seed 0), all thirteen; the first 3, 6, 10 or 12 of them have an expert and are
merged by `regmean`, the others are foreign. A text's first 8 to 64 tokens are the prompt. It goes to an expert or to
the merged adapter, once by the router alone (the likeliest expert, the merged adapter below a confidence of 0.9), once
as the server does it, and whoever got it is scored on the rest of the text, up to 128 tokens.

`right` is the share of prompts whose own expert is the best of the experts, by the router, by likelihood alone and by
both; `to_gateway` the share that the merged
adapter gets; `kept` the share of the own expert's gain on the rest, (base - chosen) / (base - own), worst and mean over
domains; `gain` of foreign prompts is base - choose in nats a token. Held-out texts of `--half choice` are those that
`TRUST` and `MERGED_PRIOR` were choose on; those of `test`, between them, were used for nothing else. All token losses
stay in `--work`. `milliseconds` is the processor time of the likelihoods of one prompt, by its tokens and candidates.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.harness import pin_threads, write_result

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
import torch  # noqa: E402
from bench_merge_quality import BLOCKS, TOKENS  # noqa: E402
from lib.merge_domains import DEMO, FURTHER, UNSEEN  # noqa: E402
from lib.trained_experts import Work  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from fedmoe.gateway.losses import BASE  # noqa: E402
from fedmoe.gateway.routers import (  # noqa: E402
    LEAST,
    MERGED_PRIOR,
    TRUST,
    SequenceRouter,
    candidates,
    choose,
)
from fedmoe.lora.adapter import Adapter  # noqa: E402
from fedmoe.lora.prompt_statistics import PromptStatistics  # noqa: E402
from fedmoe.lora.regmean import regmean  # noqa: E402
from fedmoe.models.base import load_base  # noqa: E402
from fedmoe.models.final_logits import selected_logprobs  # noqa: E402
from fedmoe.models.multilora import MultiLora  # noqa: E402
from fedmoe.models.policy_logprobs import log_likelihoods  # noqa: E402
from fedmoe.models.prompt_features import prefix_features  # noqa: E402
from fedmoe.runtime.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.worker.statistics import StatisticsBudget, prompt_statistics, sample_prompts  # noqa: E402

Array = NDArray[np.float64]
NAMES = (*DEMO, *FURTHER, *UNSEEN)
COUNTS = (3, 6, 10, 12)
LENGTHS = (8, 16, 32, 64)
WHOLE = 128
SURE = 0.9
GATEWAY = "gateway"


def held_out_texts(work: Work, domain: str, count: int, half: str) -> list[list[int]]:
    """The first `WHOLE` tokens of `count` texts, evenly spread; those of the two halves lie between each other."""
    lines = (work.folder / "data" / domain / "test.jsonl").read_text("utf-8").splitlines()
    ids = [work.base.tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"] for line in lines]
    long = [row[:WHOLE] for row in ids if len(row) >= WHOLE]
    places = sorted({place * len(long) // (2 * count) for place in range(half == "test", 2 * count, 2)})
    return [long[place] for place in places]


def token_losses(work: Work, adapter: Adapter, texts: Sequence[Sequence[int]]) -> Array:
    """(texts, WHOLE - 1) in nats; kept in the work folder."""
    key = hashlib.sha256(adapter.flat.tobytes() + json.dumps([list(row) for row in texts]).encode())
    key.update(str(adapter.scale).encode())
    file = work.folder / "losses" / f"{key.hexdigest()[:32]}.npy"
    if not file.exists():
        multi = MultiLora(work.base.model, [module.name for module in adapter.layout.modules])
        multi.add("it", adapter)
        found = [_losses_of(work, multi, texts[start : start + 8]) for start in range(0, len(texts), 8)]
        multi.detach()
        file.parent.mkdir(exist_ok=True)
        np.save(file, np.concatenate(found), allow_pickle=False)
    losses: Array = np.load(file, allow_pickle=False).astype(np.float64)
    return losses


def _losses_of(work: Work, multi: MultiLora, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    ids = torch.tensor([list(row) for row in texts])
    with torch.inference_mode(), multi.rows(["it"] * len(texts)):
        hidden = work.base.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        targets = ids[:, 1:].reshape(-1).numpy()
        flat = hidden.reshape(-1, hidden.shape[-1])
        logprobs, _ = selected_logprobs(work.base.model, flat, np.arange(len(targets)), targets)
    losses: NDArray[np.float32] = -logprobs.view(len(texts), -1).numpy()
    return losses


@dataclass(frozen=True)
class Measured:
    """Token losses of every model on all texts, their features by length, and whose they are."""

    losses: Mapping[str, Array]
    features: Mapping[int, NDArray[np.float32]]
    owners: Sequence[str]


def decisions(measured: Measured, router: SequenceRouter, length: int) -> dict[str, list[str]]:
    """Way -> who gets each text; `experts only` is the best expert as the server ranks them, without the gateway."""
    probabilities = router.probabilities(measured.features[length])
    found: dict[str, list[str]] = {"router": [], "reranked": [], "likeliest": [], "experts only": [], "likelihood": []}
    for place, row in enumerate(probabilities):
        top = router.names[int(row.argmax())]
        found["likeliest"].append(top)
        found["router"].append(top if row.max() >= SURE else GATEWAY)
        likely = candidates((0,), router.names, row)
        heard = {
            name: -float(measured.losses[name][place, : length - 1].sum()) for name in (*likely.log_priors, GATEWAY)
        }
        found["reranked"].append(choose(likely, heard, GATEWAY))
        found["likelihood"].append(min(router.names, key=lambda name: measured.losses[name][place, : length - 1].sum()))
        found["experts only"].append(choose(likely, {name: heard[name] for name in likely.log_priors}, GATEWAY))
    return found


def kept(measured: Measured, names: Sequence[str], choices: Sequence[str], length: int) -> dict[str, float]:
    """What the chosen ones keep of the own experts' gains on the rest."""
    shares = []
    for domain in names:
        places = [place for place, owner in enumerate(measured.owners) if owner == domain]
        bare, own, got = (
            np.mean([measured.losses[who[place]][place, length - 1 :].mean() for place in places])
            for who in ([BASE] * len(choices), [domain] * len(choices), choices)
        )
        shares.append(float((bare - got) / (bare - own)))
    return {"worst": round(min(shares), 4), "mean": round(float(np.mean(shares)), 4)}


def foreign(measured: Measured, places: Sequence[int], choices: Sequence[str], length: int) -> dict[str, float]:
    """How many prompts of no expert's domain the gateway gets, and what whoever gets them gains."""
    gains = [
        (measured.losses[BASE][place] - measured.losses[choices[place]][place])[length - 1 :].mean() for place in places
    ]
    given = np.mean([choices[place] == GATEWAY for place in places])
    return {"to_gateway": round(float(given), 4), "gain": round(float(np.mean(gains)), 4)}


def compared(measured: Measured, statistics: Mapping[str, PromptStatistics], names: Sequence[str]) -> dict[str, object]:
    """All numbers with experts for `names`."""
    router = SequenceRouter.fit({name: statistics[name] for name in names})
    own = [place for place, owner in enumerate(measured.owners) if owner in names]
    strange = [place for place, owner in enumerate(measured.owners) if owner not in names]
    found: dict[str, object] = {}
    for length in LENGTHS:
        ways = decisions(measured, router, length)
        merged = [GATEWAY] * len(measured.owners)
        found[str(length)] = {
            "right": {
                way: round(float(np.mean([ways[of][place] == measured.owners[place] for place in own])), 4)
                for way, of in (("router", "likeliest"), ("likelihood", "likelihood"), ("reranked", "experts only"))
            },
            "to_gateway": {
                way: round(float(np.mean([ways[way][place] == GATEWAY for place in own])), 4)
                for way in ("router", "reranked")
            },
            "kept": {
                way: kept(measured, names, choices, length)
                for way, choices in (("gateway", merged), ("router", ways["router"]), ("reranked", ways["reranked"]))
            },
            "foreign": {
                way: foreign(measured, strange, choices, length)
                for way, choices in (("gateway", merged), ("router", ways["router"]), ("reranked", ways["reranked"]))
            },
        }
        print(len(names), length, json.dumps(found[str(length)]), flush=True)
    return found


def prompts_of(work: Work, count: int, half: str) -> tuple[list[list[int]], list[str]]:
    """Texts and whose they are."""
    texts = {name: held_out_texts(work, name, count, half) for name in NAMES}
    return [row for name in NAMES for row in texts[name]], [name for name in NAMES for _ in texts[name]]


def features_of(work: Work, rows: Sequence[Sequence[int]]) -> dict[int, NDArray[np.float32]]:
    """What the router sees, by the length of the prompt."""
    found = prefix_features(work.base, rows, [LENGTHS] * len(rows)).reshape(len(rows), len(LENGTHS), -1)
    return {length: found[:, place] for place, length in enumerate(LENGTHS)}


def merged_of(work: Work, names: Sequence[str]) -> Adapter:
    """Their gateway."""
    moments = {name: work.moments(name, 64, TOKENS) for name in names}
    rank = min(16 * len(names), 128)
    return regmean({name: work.expert(name) for name in names}, moments, 1.3, rank=rank).adapter


def results(work: Work, count: int, half: str) -> dict[str, object]:
    """All numbers with each count of experts."""
    rows, owners = prompts_of(work, count, half)
    budget = StatisticsBudget().prompt_tokens
    statistics = {
        name: prompt_statistics(work.base, sample_prompts(work.base, work.training_blocks(name, BLOCKS), budget))
        for name in NAMES
    }
    features = features_of(work, rows)
    first = work.expert(NAMES[0])
    losses = {BASE: token_losses(work, Adapter.zeros(first.layout, first.alpha), rows)}
    losses |= {name: token_losses(work, work.expert(name), rows) for name in NAMES}
    found: dict[str, object] = {"milliseconds": milliseconds(work, rows)}
    for experts in COUNTS:
        names = NAMES[:experts]
        measured = Measured({**losses, GATEWAY: token_losses(work, merged_of(work, names), rows)}, features, owners)
        found[f"{experts} experts"] = compared(measured, statistics, names)
    return found


def milliseconds(work: Work, rows: Sequence[Sequence[int]]) -> dict[str, float]:
    """The median of eight prompts."""
    adapters = {name: work.expert(name) for name in NAMES[:4]}
    multi = MultiLora(work.base.model, [module.name for module in adapters[NAMES[0]].layout.modules])
    for name, adapter in adapters.items():
        multi.add(name, adapter)
    found: dict[str, float] = {}
    for length, count in ((32, 2), (32, 4), (WHOLE, 2), (WHOLE, 4)):
        times = []
        for row in rows[:8]:
            started = time.process_time()
            log_likelihoods(work.base.model, multi, [(row[:length], name) for name in NAMES[:count]])
            times.append(time.process_time() - started)
        found[f"{length} tokens, {count} candidates"] = round(1e3 * float(np.median(times)))
    multi.detach()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of bench_merge_quality.py")
    parser.add_argument("--prompts", type=int, default=24, help="of each domain")
    parser.add_argument("--half", choices=("test", "choice"), default="test")
    asked = parser.parse_args()
    pin_torch(1)
    work = Work(asked.work, load_base("smollm2", "cpu"))
    work.build(NAMES)
    found = results(work, asked.prompts, asked.half)
    settings = {"trust": str(TRUST), "merged_prior": str(MERGED_PRIOR), "least": str(LEAST), "half": asked.half}
    print(write_result("rerank", found, {**settings, "prompts": str(asked.prompts), "dtype": str(work.base.dtype)}))


if __name__ == "__main__":
    main()
