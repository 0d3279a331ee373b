"""How often prompts find their expert: real text of 3, 6 and 12 domains, by prompt length, and what it costs.

    fedmoe data build               # the demonstration's three domains
    python benchmarks/bench_routing.py [--data data/demo] [--train 500] [--test 200] [--base smollm2]

No expert is trained: routing needs the base model's features only. Each domain gives up to `--train` texts, of which
the statistics of one worker are made as it makes them (their first 8 to 128 tokens, at most 64,000 tokens of a domain),
and up to `--test` texts of other files, routed by their first 8 to 256 tokens, or all there are. Two more domains
(`lib.prompt_domains.RESERVED`), which no decision was based on, are added to the twelve.

Routers: `sequence` is the gateway's; `sequence, few texts` has statistics of 96 texts; `linear`, softmax regression,
sees every single feature; `token pairs` is naive Bayes on tokens and pairs of neighbours of all texts: how far words
alone tell the domains apart, no router of ours, since it would disclose them.

`accuracy` is the mean over domains of the likeliest expert being right; `confidence` is what the router thinks it is;
`taken` is the share of which it is sure (0.9) and `accuracy_of_taken` how often it is right there; `foreign_taken` is
the share of which it is sure of the prompts of domains that have no expert; `confused` counts the
commonest mistakes. `chat` routes the same prompts as a chat template renders them, with its frame taken off and not.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lib.harness import pin_threads, write_result
from lib.prompt_domains import NAMES, RESERVED, PromptDomain, load_domains

pin_threads(1)

import numpy as np  # noqa: E402  # threads are pinned first
from lib.routing_baselines import likeliest, linear_router  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from fedmoe.gateway.routers import SequenceRouter  # noqa: E402
from fedmoe.lora.adapter import FloatMatrix  # noqa: E402
from fedmoe.lora.prompt_statistics import PromptStatistics  # noqa: E402
from fedmoe.models.base import LoadedBase, load_base  # noqa: E402
from fedmoe.models.chat_frame import ChatFrame  # noqa: E402
from fedmoe.models.prompt_features import features_width, prefix_features, prompt_features, routing_depths  # noqa: E402
from fedmoe.runtime.device import pin_threads as pin_torch  # noqa: E402
from fedmoe.worker.statistics import PROMPT_LENGTHS, StatisticsBudget  # noqa: E402

LENGTHS = (*PROMPT_LENGTHS, 256)
COUNTS = (3, 6, 12, 14)
FEW = 96
#: What counts as sure.
SURE = 0.9
_CHAT_LENGTH = 32


@dataclass(frozen=True)
class Domain:
    """Tokens of one domain's texts, and features of their beginnings; those to learn from with the text of each row."""

    train_tokens: list[list[int]]
    test_tokens: list[list[int]]
    train: FloatMatrix
    train_texts: list[int]
    test: Mapping[int, FloatMatrix]

    def statistics(self, texts: int) -> PromptStatistics:
        """What a worker with the first `texts` of the texts would send."""
        rows = [row for row, text in enumerate(self.train_texts) if text < texts]
        return PromptStatistics.of(self.train[rows], [self.train_texts[row] for row in rows])


def domain_of(base: LoadedBase, texts: PromptDomain) -> Domain:
    """A text to test with counts at the lengths it has; at the last length all count, the shorter ones whole."""
    train, test = (tokens_of(base, of) for of in (texts.train, texts.test))
    used, left = 0, StatisticsBudget().prompt_tokens
    while used < len(train) and left > 0:
        left -= min(len(train[used]), PROMPT_LENGTHS[-1])
        used += 1
    lengths = [[length for length in PROMPT_LENGTHS if length <= len(row)] or [len(row)] for row in train[:used]]
    rows = prefix_features(base, train[:used], lengths)
    cut = [[min(length, len(row)) for length in LENGTHS] for row in test]
    tested = prefix_features(base, test, cut).reshape(len(test), len(LENGTHS), -1)
    return Domain(
        train,
        test,
        rows,
        [place for place, wanted in enumerate(lengths) for _ in wanted],
        {length: tested[has(test, length), place] for place, length in enumerate(LENGTHS)},
    )


def tokens_of(base: LoadedBase, texts: Sequence[str]) -> list[list[int]]:
    found = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [row for row in found if len(row) > 1]


def has(rows: Sequence[Sequence[int]], length: int) -> list[bool]:
    return [length == LENGTHS[-1] or len(row) >= length for row in rows]


Scores = Callable[[Domain, int], FloatMatrix]


def by_features(router: SequenceRouter) -> Scores:
    return lambda domain, length: router.probabilities(domain.test[length]).astype(np.float32)


def sequence(domains: Mapping[str, Domain], texts: int) -> Scores:
    return by_features(SequenceRouter.fit({name: found.statistics(texts) for name, found in domains.items()}))


def linear(domains: Mapping[str, Domain]) -> Scores:
    """On every second beginning: what it takes is time."""
    return by_features(linear_router({name: found.train[::2] for name, found in domains.items()}))


def token_pairs(base: LoadedBase, domains: Mapping[str, Domain]) -> Scores:
    """Naive Bayes with 0.01 added to every count; pairs are hashed to 2^18 numbers."""
    size = len(base.tokenizer)

    def terms(row: Sequence[int]) -> NDArray[np.int64]:
        ids = np.asarray(row, np.int64)
        return np.concatenate([ids, size + (ids[:-1] * 1_000_003 + ids[1:] * 7_919) % (1 << 18)])

    names = sorted(domains)
    counts = np.full((size + (1 << 18), len(names)), 0.01)
    for column, name in enumerate(names):
        for row in domains[name].train_tokens:
            np.add.at(counts[:, column], terms(row), 1)
    logs = np.log(counts / counts.sum(axis=0))

    def scores(domain: Domain, length: int) -> FloatMatrix:
        kept = [row for row, has_it in zip(domain.test_tokens, has(domain.test_tokens, length), strict=True) if has_it]
        sums = np.stack([logs[terms(row[:length])].sum(axis=0) for row in kept])
        powers = np.exp(sums - sums.max(axis=1, keepdims=True))
        return np.asarray(powers / powers.sum(axis=1, keepdims=True), np.float32)

    return scores


def measured(
    scores: Scores, own: Mapping[str, Domain], foreign: Mapping[str, Domain], length: int
) -> dict[str, object]:
    """The numbers of one router at one prompt length."""
    names = sorted(own)
    right: dict[str, float] = {}
    sure, hit = [], []
    mistakes: Counter[str] = Counter()
    for name, found in own.items():
        probabilities = scores(found, length)
        best = [names[place] for place in probabilities.argmax(axis=1)]
        hits = np.array([other == name for other in best])
        mistakes.update(f"{name} to {other}" for other in best if other != name)
        right[name] = round(float(hits.mean()), 4)
        sure.append(probabilities.max(axis=1))
        hit.append(hits)
    confidence, hits = np.concatenate(sure), np.concatenate(hit)
    taken = confidence >= SURE
    strange = [scores(found, length).max(axis=1) for found in foreign.values()]
    return {
        "accuracy": round(float(np.mean(list(right.values()))), 4),
        "prompts": len(hits),
        "confidence": round(float(confidence.mean()), 4),
        "taken": round(float(taken.mean()), 4),
        "accuracy_of_taken": round(float(hits[taken].mean()), 4) if taken.any() else None,
        "foreign_taken": round(float((np.concatenate(strange) >= SURE).mean()), 4) if strange else None,
        "accuracy_by_domain": right,
        "confused": dict(mistakes.most_common(5)),
    }


def compare(base: LoadedBase, domains: Mapping[str, Domain], count: int) -> dict[str, object]:
    """Every router on the first `count` domains."""
    own = dict(list(domains.items())[:count])
    foreign = {name: found for name, found in domains.items() if name not in own}
    makers: dict[str, Callable[[], Scores]] = {
        "sequence": lambda: sequence(own, 1 << 30),
        f"sequence, {FEW} texts": lambda: sequence(own, FEW),
        "linear": lambda: linear(own),
        "token pairs": lambda: token_pairs(base, own),
    }
    found: dict[str, object] = {}
    for label, make in makers.items():
        started = time.process_time()
        scores = make()
        fit = time.process_time() - started
        by_length = {str(length): measured(scores, own, foreign, length) for length in LENGTHS}
        found[label] = {"fit_seconds": round(fit, 3), "prompt_tokens": by_length}
        print(count, label, {length: result["accuracy"] for length, result in by_length.items()}, flush=True)
    return found


def chat(base: LoadedBase, domains: Mapping[str, Domain], count: int) -> dict[str, float]:
    """Accuracy on the first `_CHAT_LENGTH` tokens of texts as the only message of a conversation."""
    own = dict(list(domains.items())[:count])
    router = SequenceRouter.fit({name: found.statistics(1 << 30) for name, found in own.items()})
    frame = ChatFrame.of(base.tokenizer)
    right: dict[str, list[float]] = {"frame taken off": [], "frame left": []}
    for name, found in own.items():
        rows = [row[:_CHAT_LENGTH] for row in found.test_tokens if len(row) >= _CHAT_LENGTH][:60]
        prompts = [[*frame.before, *row, *frame.after] for row in rows]
        for label, asked in (
            ("frame taken off", [frame.removed(prompt) for prompt in prompts]),
            ("frame left", prompts),
        ):
            best = router.probabilities(prompt_features(base, asked)).argmax(axis=1)
            right[label].append(float(np.mean([router.names[place] == name for place in best])))
    return {label: round(float(np.mean(shares)), 4) for label, shares in right.items()}


def microseconds_a_token(base: LoadedBase, domains: Mapping[str, Domain]) -> dict[str, int]:
    """Processor time of one prompt's features and of comparing them with all experts, by the prompt's length."""
    router = SequenceRouter.fit({name: found.statistics(FEW) for name, found in domains.items()})
    rows = [row for found in domains.values() for row in found.test_tokens if len(row) >= LENGTHS[-1]][:20]
    found = {}
    for length in LENGTHS:
        started = time.process_time()
        for row in rows:
            likeliest(router, prompt_features(base, [row[:length]]))
        found[str(length)] = round((time.process_time() - started) / len(rows) / length * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/demo"), help="what `fedmoe data build` wrote")
    parser.add_argument("--train", type=int, default=500)
    parser.add_argument("--test", type=int, default=200)
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--name", default="routing", help="of the result's file")
    chosen = parser.parse_args()
    pin_torch(1)
    base = load_base(chosen.base, "cpu")
    texts = load_domains(chosen.data, (*NAMES, *RESERVED), chosen.train, chosen.test)
    domains = {found.name: domain_of(base, found) for found in texts}
    results: dict[str, object] = {
        "domains": {
            name: {"train": len(set(found.train_texts)), "test": len(found.test_tokens)}
            for name, found in domains.items()
        },
        "depths": routing_depths(base),
        "features": features_width(base),
        "bytes_of_statistics": len(next(iter(domains.values())).statistics(FEW).to_bytes()),
        "microseconds_per_token": microseconds_a_token(base, domains),
        "chat, 6 domains, 32 tokens": chat(base, domains, 6),
    }
    for count in COUNTS:
        results[f"{count} domains"] = compare(base, domains, count)
    arguments = {name: str(value) for name, value in vars(chosen).items()}
    print(write_result(chosen.name, results, {**arguments, "dtype": str(base.dtype)}))


if __name__ == "__main__":
    main()
