"""Probes of a remote engine: from the first held-out prompts that fit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from letters import LettersTask

from fedmoe.arena.run.weight_check import make_probes
from fedmoe.arena.tasks.task import PromptMessage, TaskError
from fedmoe.inference.engine import Sample, SampleRequest


class Likeliest:
    """Answers with eight tokens."""

    context = 64

    def sample(self, requests: Sequence[SampleRequest]) -> list[Sample]:
        return [Sample((1,) * 8, np.zeros(8, np.float32), False) for _ in requests]


class LongForOdd:
    """Prompts that end in an odd digit are refused as too long."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def prompt(self, messages: Sequence[PromptMessage]) -> tuple[int, ...]:
        if int(messages[-1].text[-2]) % 2:
            raise TaskError("a prompt has 4000 tokens, the limit is 1024")
        return tuple(map(ord, messages[-1].text))[-self.tokens :]

    def text(self, tokens: Sequence[int]) -> str:
        raise NotImplementedError


def test_prompts_that_do_not_fit_are_passed_over() -> None:
    probes = make_probes(LettersTask(), Likeliest(), LongForOdd(20))  # type: ignore[arg-type]
    assert [chr(probe.prompt[-2]) for probe in probes] == ["0", "2"]


def test_where_no_prompt_fits_it_is_told() -> None:
    engine = Likeliest()
    engine.context = 20
    with pytest.raises(TaskError, match=r"none of 100 first prompts .* takes 20 tokens"):
        make_probes(LettersTask(), engine, LongForOdd(20))  # type: ignore[arg-type]
