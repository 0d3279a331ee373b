"""Reasoning tasks: problems of reasoning-gym's data sets; every seat answers once, a team answers by vote."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import math
import random
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType, ModuleType
from typing import Protocol, cast

import numpy as np

from fedmoe.arena.tasks.committee import CommitteeTask
from fedmoe.arena.tasks.content import ContentRule
from fedmoe.arena.tasks.task import HELD_OUT, PromptMessage, TaskError

Option = int | float | str | bool
NO_OPTIONS: Mapping[str, Option] = MappingProxyType({})

#: Data sets that run the text of an answer as a program (Python's `eval`, sympy's `parse_expr`) to score it.
EXECUTES_ANSWERS = frozenset(
    {
        "binary_matrix",
        "countdown",
        "intermediate_integration",
        "n_queens",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
        "spiral_matrix",
        "string_insertion",
    }
)

# One content in five is held out, chosen by itself: then no training seed can ever draw it, however it is put.
_HELD_OUT_SHARE = 5
_ATTEMPTS = 200
#: Without an example a small model explains itself at length; with four it answers in the form asked for.
_EXAMPLES = 4
_SAMPLE = 4
#: So many draws say what of a question is its content, and how long answers are; a quarter more is left as room.
_SURVEY = 512
#: Fewer draws of data sets that take a fifth of a second to five seconds for one.
_SLOW: Mapping[str, int] = {"futoshiki": 16, "knight_swap": 16, "sokoban": 16, "sudoku": 64, "zebra_puzzles": 16}
_MARGIN = 1.25
_MOST_TOKENS = 32768
# Room for an end-of-sequence token, a leading line break and <answer></answer> around the answer.
_SLACK_TOKENS = 12
_NONSENSE = "(nothing)"
# Scorers that compute with exact fractions would write out all digits of 1e999999999.
_HUGE = re.compile(r"e[+-]?[\d_]{3}", re.IGNORECASE)
_OWN_OPTIONS = ("examples", "max_answer_tokens")
_lock = threading.Lock()


class _Dataset(Protocol):
    seed: int

    def __getitem__(self, index: int) -> Mapping[str, object]: ...

    def score_answer(self, answer: str | None, entry: Mapping[str, object]) -> float: ...


@contextmanager
def _undisturbed() -> Iterator[None]:
    """One caller at a time, process-wide random states given back, and no warning of a data file left open."""
    with _lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        ours, numpys = random.getstate(), np.random.get_state()
        try:
            yield
        finally:
            random.setstate(ours)
            np.random.set_state(numpys)


def _module(name: str) -> ModuleType:
    # Imported on first use: it takes seconds.
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise TaskError(f"reasoning tasks need the package reasoning-gym ({error}); install fedmoe[arena]") from error


@dataclasses.dataclass(frozen=True, slots=True)
class ReasoningProblem:
    """A problem of reasoning-gym; `score` is its own scorer (partial credit and all), 0 where that cannot parse."""

    question: str
    answer: str
    content: str
    dataset: _Dataset
    entry: Mapping[str, object]

    def score(self, answer: str) -> float:
        """In [0, 1]."""
        if _HUGE.search(answer) and answer != self.answer:
            return 0.0
        with _undisturbed():
            try:
                value = float(self.dataset.score_answer(answer, self.entry))
            except Exception:  # scorers raise anything at all on text that they cannot parse: it is not an answer
                return 0.0
        return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class _Survey:
    """Properties of a data set taken from many problems: the rule of its content, and the form of its answers.

    `longest`: the bytes of the longest answer. `multiline`: whether any has several lines.
    """

    rule: ContentRule
    longest: int
    multiline: bool


_surveys: dict[tuple[str, tuple[tuple[str, Option], ...]], _Survey] = {}


class ReasoningProblems:
    """The problems of one reasoning-gym data set; `options` are the fields of its configuration, and two more.

    `examples` (4 unless given) training problems are shown with their answers before every question.
    `max_answer_tokens`: how many tokens an answer may have; else a quarter more than the bytes of the longest answer
    of 512 problems (fewer where one takes long), and 12: no tokenizer makes more tokens than bytes.
    """

    def __init__(self, dataset: str, options: Mapping[str, Option] = NO_OPTIONS) -> None:
        """Raises TaskError: no such data set or option, or one whose own answers do not score as right."""
        with _undisturbed():
            _module("reasoning_gym")
            datasets = sorted(_module("reasoning_gym.factory").DATASETS)
        if dataset not in datasets:
            raise TaskError(f"reasoning-gym has no data set {dataset!r}; it has: {', '.join(datasets)}")
        if dataset in EXECUTES_ANSWERS:
            raise TaskError(f"{dataset} runs an answer's text as a program to score it, so it is no task for a model")
        self.name = dataset
        self._options = dict(options)
        shown = _whole("examples", self._options.pop("examples", _EXAMPLES), 0, 32)
        room = self._options.pop("max_answer_tokens", None)
        if room is not None:
            room = _whole("max_answer_tokens", room, 1, _MOST_TOKENS)
        self._check_options()
        self._shared = self._shareable()
        survey = self._surveyed()
        self._rule, self.multiline = survey.rule, survey.multiline
        self._check_scores([self.draw(seed) for seed in (*range(_SAMPLE), HELD_OUT)])
        # The last training seeds.
        problems = [self.draw(HELD_OUT - 1 - index) for index in range(shown)]
        self.examples = tuple(
            message
            for problem in problems
            for message in (PromptMessage("user", problem.question.strip()), PromptMessage("assistant", problem.answer))
        )
        self.max_answer_tokens = room or math.ceil(survey.longest * _MARGIN) + _SLACK_TOKENS

    def _surveyed(self) -> _Survey:
        """Known for the rest of the process, since it takes seconds."""
        key = (self.name, tuple(sorted(self._options.items())))
        if key not in _surveys:
            seeds = np.random.SeedSequence(_SURVEY).generate_state(_SLOW.get(self.name, _SURVEY))
            drawn = [self._entry(int(seed))[1] for seed in seeds]
            answers = [_answer(entry) for entry in drawn]
            _surveys[key] = _Survey(
                ContentRule.of([str(entry["question"]) for entry in drawn]),
                max(len(answer.encode()) for answer in answers),
                any("\n" in answer for answer in answers),
            )
        return _surveys[key]

    def _shareable(self) -> _Dataset | None:
        """One data set object for all seeds, where a new seed afterwards is as good as a new object; found by trying.

        Making an object can mean reading a word list.
        """
        with _undisturbed():
            shared = self._made(0)
            for seed in range(1, 1 + _SAMPLE):
                shared.seed = seed
                ours, fresh = shared[0], self._made(seed)[0]
                if (ours["question"], ours["answer"]) != (fresh["question"], fresh["answer"]):
                    return None
        return shared

    def _check_scores(self, sample: Sequence[ReasoningProblem]) -> None:
        for problem in sample:
            if problem.score(problem.answer) < 0.99:
                raise TaskError(
                    f"{self.name} scores its own answer {problem.answer!r} as wrong, so nothing can be learned from it;"
                    " take another data set"
                )
        if any(problem.score(_NONSENSE) > 0.99 for problem in sample):
            raise TaskError(f"{self.name} scores {_NONSENSE!r} as right, so it verifies nothing; take another data set")

    def _check_options(self) -> None:
        fields = {field.name for field in dataclasses.fields(_module("reasoning_gym.factory").DATASETS[self.name][1])}
        allowed = sorted(fields - {"seed", "size"})
        for option in self._options:
            if option not in allowed:
                raise TaskError(f"{self.name} has no option {option!r}; it has: {', '.join([*_OWN_OPTIONS, *allowed])}")

    def draw(self, seed: int) -> ReasoningProblem:
        """The problem of `seed`; raises TaskError where the options leave too few different problems."""
        if seed < 0:
            raise TaskError(f"a seed is 0 or more, got {seed}")
        for attempt in range(_ATTEMPTS):
            dataset, entry = self._entry(int(np.random.SeedSequence([seed, attempt]).generate_state(1)[0]))
            question = str(entry["question"])
            content = self._rule.key(question)
            held_out = hashlib.sha256(content.encode()).digest()[0] % _HELD_OUT_SHARE == 0
            if held_out == (seed >= HELD_OUT):
                return ReasoningProblem(question, _answer(entry), content, dataset, entry)
        raise TaskError(
            f"{self.name} with {self._options or 'its defaults'} has too few different problems to hold some out;"
            " widen its options"
        )

    def _entry(self, seed: int) -> tuple[_Dataset, Mapping[str, object]]:
        with _undisturbed():
            dataset = self._shared or self._made(seed)
            dataset.seed = seed
            return dataset, dataset[0]

    def _made(self, seed: int) -> _Dataset:
        create = _module("reasoning_gym").create_dataset
        try:
            # A data set of one, for each seed its own: in larger ones neighbouring seeds share problems.
            return cast(_Dataset, create(self.name, seed=seed, size=1, **self._options))
        except (AssertionError, TypeError, ValueError) as error:
            raise TaskError(f"{self.name} refuses the options {self._options}: {error}") from error

    def guess(self, rng: np.random.Generator) -> str:
        """The right answer of another problem, drawn at random."""
        return self.draw(int(rng.integers(HELD_OUT))).answer


def _whole(option: str, value: Option, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise TaskError(f"{option} must be a whole number from {least} to {most}, got {value!r}")
    return value


def _answer(entry: Mapping[str, object]) -> str:
    answer = entry["answer"]
    return "" if answer is None else str(answer)


class ReasoningTask(CommitteeTask):
    """Every seat answers the same problem by itself, once; a team's answer is its vote.

    `seat_scores` are the data set's own (some give partial credit, 0.01 or so, for any text); `without` is the vote
    without that seat. How an answer is read: `problems.read_answer`. `valid` is 1 for an answer that is not empty.
    """

    kind = "reasoning"
    strategies = ()

    def __init__(self, dataset: str, options: Mapping[str, Option] = NO_OPTIONS) -> None:
        """`options` are the fields of the data set's configuration; raises TaskError where it cannot be used."""
        super().__init__(ReasoningProblems(dataset, options))
