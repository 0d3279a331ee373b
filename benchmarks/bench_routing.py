"""How often prompts find their expert: routers on real text of 3, 6 and 12 domains, by prompt length, and the cost.

    fedmoe data build               # the demonstration's three domains
    python benchmarks/bench_routing.py [--data data/demo] [--domains 3] [--train 96] [--test 60] [--base smollm2]

No expert is trained: routing needs the base model's features only. Each domain gives `--train` texts, of which a
worker's statistics are made (their first 8, 16, 32 and 64 tokens), and `--test` texts of other files, routed by their
first 8 to 64 tokens. Routers: `sequence` is the default, on a quarter of the layers; `sequence, all layers`; `linear`,
softmax regression that sees every single feature; `centroid`, the nearest mean with each feature scaled, which is
`sequence` at shrinkage 1. `SpectralRouter` needs trained adapters and is not measured here.

`accuracy` is the mean over domains of the likeliest expert being right; `confidence` is what the router thinks it is;
`taken` is the share above the default threshold (the others go to the merged adapter) and `accuracy_of_taken` how often
those are right; `foreign_taken` is the share taken of the prompts of the domains that have no expert.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from harness import pin_threads, write_result
from prompt_domains import NAMES, PromptDomain, load_domains

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first

from fedmoe.gateway.prompt_statistics import PromptStatistics  # noqa: E402
from fedmoe.gateway.route import THRESHOLD, LinearRouter, Router, SequenceRouter  # noqa: E402
from fedmoe.lora.adapter import FloatMatrix  # noqa: E402
from fedmoe.models.base import LoadedBase, load_base  # noqa: E402
from fedmoe.models.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.models.prompt_features import ALL_LAYERS, prefix_features, routing_layer  # noqa: E402

LENGTHS = (8, 16, 32, 64)
COUNTS = (3, 6, 12)


@dataclass(frozen=True)
class Features:
    """Prompt features of one domain: (texts, lengths, hidden), and processor seconds and tokens of the passes."""

    train: FloatMatrix
    test: FloatMatrix
    seconds: float
    tokens: int


def features_of(base: LoadedBase, domain: PromptDomain, layer: int) -> Features:
    found, tokens, started = [], 0, time.process_time()
    for texts in (domain.train, domain.test):
        ids = [base.tokenizer(text, add_special_tokens=False)["input_ids"][: LENGTHS[-1]] for text in texts]
        ids = [row for row in ids if len(row) == LENGTHS[-1]]
        rows = prefix_features(base, ids, [LENGTHS] * len(ids), layer)
        found.append(rows.reshape(len(ids), len(LENGTHS), -1))
        tokens += len(ids) * LENGTHS[-1]
    return Features(found[0], found[1], time.process_time() - started, tokens)


def statistics_of(features: Features) -> PromptStatistics:
    texts, lengths, width = features.train.shape
    return PromptStatistics.of(features.train.reshape(-1, width), np.repeat(np.arange(texts), lengths).tolist())


def sequence(domains: Mapping[str, Features], shrinkage: float | None = None) -> Router:
    return SequenceRouter.fit({name: statistics_of(found) for name, found in domains.items()}, shrinkage)


def linear(domains: Mapping[str, Features]) -> Router:
    return LinearRouter.fit({name: found.train.reshape(-1, found.train.shape[2]) for name, found in domains.items()})


def measured(
    router: Router, own: Mapping[str, Features], foreign: Mapping[str, Features], place: int
) -> dict[str, float | None]:
    """The numbers of one router at one prompt length."""
    right, sure, hit = [], [], []
    for name, found in own.items():
        probabilities = router.probabilities(found.test[:, place])
        hits = np.asarray(router.names)[probabilities.argmax(axis=1)] == name
        right.append(float(hits.mean()))
        sure.append(probabilities.max(axis=1))
        hit.append(hits)
    confidence, hits = np.concatenate(sure), np.concatenate(hit)
    taken = confidence >= THRESHOLD
    strange = [router.probabilities(found.test[:, place]).max(axis=1) for found in foreign.values()]
    return {
        "accuracy": round(float(np.mean(right)), 4),
        "confidence": round(float(confidence.mean()), 4),
        "taken": round(float(taken.mean()), 4),
        "accuracy_of_taken": round(float(hits[taken].mean()), 4) if taken.any() else None,
        "foreign_taken": round(float((np.concatenate(strange) >= THRESHOLD).mean()), 4) if strange else None,
    }


def compare(quarter: Mapping[str, Features], full: Mapping[str, Features], count: int) -> dict[str, object]:
    """Every router on the first `count` domains."""
    names = list(quarter)[:count]
    makers: dict[str, tuple[Callable[[Mapping[str, Features]], Router], Mapping[str, Features]]] = {
        "sequence": (sequence, quarter),
        "sequence, all layers": (sequence, full),
        "linear": (linear, quarter),
        "centroid": (lambda domains: sequence(domains, 1.0), quarter),
    }
    found: dict[str, object] = {}
    for label, (make, features) in makers.items():
        own = {name: features[name] for name in names}
        foreign = {name: features[name] for name in features if name not in own}
        started = time.process_time()
        router = make(own)
        fit = time.process_time() - started
        by_length = {str(length): measured(router, own, foreign, place) for place, length in enumerate(LENGTHS)}
        found[label] = {"fit_seconds": round(fit, 3), "prompt_tokens": by_length}
        print(count, label, {length: result["accuracy"] for length, result in by_length.items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="what `fedmoe data build` wrote")
    parser.add_argument("--domains", type=int, default=len(NAMES))
    parser.add_argument("--train", type=int, default=96)
    parser.add_argument("--test", type=int, default=60)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--name", default="routing", help="of the result's file")
    chosen = parser.parse_args()
    pin_torch(1)
    domains = load_domains(chosen.data, NAMES[: chosen.domains], chosen.train, chosen.test)
    base = load_base(chosen.base, "cpu")
    passes = {"quarter": routing_layer(base), "all": ALL_LAYERS}
    features = {
        label: {domain.name: features_of(base, domain, layer) for domain in domains} for label, layer in passes.items()
    }
    results: dict[str, object] = {
        "domains": {domain.name: {"train": len(domain.train), "test": len(domain.test)} for domain in domains},
        "layers": {**passes, "of": len(base.model.base_model.layers)},
        "bytes_of_statistics": len(statistics_of(features["quarter"][domains[0].name]).to_bytes()),
        "microseconds_per_token": {
            label: round(sum(f.seconds for f in made.values()) / sum(f.tokens for f in made.values()) * 1e6)
            for label, made in features.items()
        },
    }
    for count in (count for count in COUNTS if count <= len(domains)):
        results[f"{count} domains"] = compare(features["quarter"], features["all"], count)
    arguments = {name: str(value) for name, value in vars(chosen).items()}
    print(write_result(chosen.name, results, {**arguments, "dtype": str(base.dtype)}))


if __name__ == "__main__":
    main()
