"""Prompts of experts as clouds of features, and their statistics."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedmoe.gateway.routers import SequenceRouter
from fedmoe.lora.adapter import FloatMatrix
from fedmoe.lora.prompt_statistics import PromptStatistics

NAMES = ("art", "law", "music")
WIDTH = 12


def prompts(place: int, count: int, seed: int, apart: float = 6.0, width: int = WIDTH) -> FloatMatrix:
    """Prompts of the expert at `place`: a normal cloud around a centre of its own."""
    draws = np.random.default_rng([seed, place])
    centre = np.random.default_rng(place).standard_normal(width)
    centre *= apart / np.linalg.norm(centre)
    return (centre + draws.standard_normal((count, width))).astype(np.float32)


def clouds(count: int = 40, seed: int = 1, apart: float = 6.0, width: int = WIDTH) -> dict[str, FloatMatrix]:
    return {name: prompts(place, count, seed, apart, width) for place, name in enumerate(NAMES)}


def statistics(data: Mapping[str, FloatMatrix]) -> dict[str, PromptStatistics]:
    return {name: PromptStatistics.of(rows) for name, rows in data.items()}


def likeliest(router: SequenceRouter, features: FloatMatrix) -> tuple[str, ...]:
    """The likeliest expert of every prompt, however unsure."""
    return tuple(router.names[place] for place in router.probabilities(features).argmax(axis=1))
