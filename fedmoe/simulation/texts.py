"""Texts of the workers that train, drawn from a seed: an expert has topics, a worker a mix of them of its own."""

from __future__ import annotations

import numpy as np

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS = 6
_SENTENCE = 8


def topic_words(seed: int, expert: int, topic: int) -> list[str]:
    """The words of a topic."""
    random = np.random.default_rng([seed, expert, topic, 4])
    return ["".join(random.choice(list(_LETTERS), random.integers(3, 6))) for _ in range(_WORDS)]


def topic_shares(seed: int, worker: int, topics: int, concentration: float) -> list[float]:
    """How much of a worker's texts is of each topic: drawn from a Dirichlet distribution."""
    random = np.random.default_rng([seed, worker, 5])
    return [float(share) for share in random.dirichlet([concentration] * topics)]


def texts(seed: int, expert: int, shares: list[float], count: int, stream: int) -> list[str]:
    """So many sentences, each of one topic: its words in a fixed order from a word that is drawn on."""
    random = np.random.default_rng([seed, expert, stream, 6])
    words = [topic_words(seed, expert, topic) for topic in range(len(shares))]
    lines = []
    for topic, start in zip(
        random.choice(len(shares), count, p=shares), random.integers(_WORDS, size=count), strict=True
    ):
        lines.append(" ".join(words[topic][(start + place) % _WORDS] for place in range(_SENTENCE)) + ".")
    return lines
