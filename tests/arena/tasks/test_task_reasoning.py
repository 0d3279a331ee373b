"""Reasoning-gym problems: drawn by the seed, read strictly, scored by the data set, voted by teams."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmoe.arena.tasks.problems import Ballot, elect, quote, read_answer
from fedmoe.arena.tasks.reasoning import EXECUTES_ANSWERS, ReasoningProblems, ReasoningTask
from fedmoe.arena.tasks.task import HELD_OUT, Lineup, TaskError, Team

EXECUTORS = {"eval", "exec", "parse_expr", "sympify", "S"}
SMALL = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("5", "5"),
        ("  5 \n so it is", "5"),
        ("\n\n5", "5"),
        ("I think <answer> 7 </answer>", "7"),
        ("<answer>6</answer> no, <ANSWER>7</ANSWER>", "7"),
        ("<answer>7", "<answer>7"),
        ("The answer is 5.", "The answer is 5."),
        ("<answer></answer>", ""),
        ("", ""),
    ],
)
def test_an_answer_is_read_strictly(text: str, answer: str) -> None:
    assert read_answer(text, multiline=False) == answer


def test_an_answer_of_several_lines_is_read_whole_where_the_problems_have_such() -> None:
    assert read_answer(" 1 2\n2 1\n", multiline=True) == "1 2\n2 1"
    assert ReasoningProblems("mini_sudoku").multiline
    assert not ReasoningProblems("chain_sum").multiline


@given(st.text(max_size=60), st.integers(1, 40))
def test_quoting_keeps_to_one_line_and_lets_no_template_token_through(text: str, limit: int) -> None:
    shown = quote(f"{text}<|im_end|>{text}", limit)
    assert len(shown) <= limit
    assert "<|" not in shown
    assert "\n" not in shown


def test_the_vote_takes_the_most_frequent_answer_whatever_its_case() -> None:
    assert elect((0, 1, 2), {0: "4", 1: "Paris ", 2: "paris"}) == 1


def test_a_tie_goes_to_the_first_speaker_among_the_tied() -> None:
    answers = {0: "1", 1: "2", 2: "2", 3: "1", 4: "3"}
    assert elect((4, 2, 0, 1, 3), answers) == 2
    assert elect((4, 3, 0, 1, 2), answers) == 3


def test_empty_answers_do_not_vote() -> None:
    assert elect((0, 1, 2), {0: "", 1: "", 2: "7"}) == 2
    assert elect((0, 1), {0: "", 1: ""}) is None


def sum_of(question: str) -> int:
    left, right = question.split(":")[1].removesuffix("=").replace("-", "+ -").replace("- ", "-").split("+")
    return int(left) + int(right)


@pytest.mark.parametrize("seed", [0, 1, HELD_OUT])
def test_right_answers_score_one_and_teams_win_by_vote(seed: int) -> None:
    task = ReasoningTask("chain_sum", SMALL)
    episode = task.start(seed, Lineup((Team((2, 0, 1)), Team((3, 4)), Team((5,)))))
    right = str(sum_of(episode.observe(0)[-1].text))
    wrong = str(int(right) + 100)
    episode.act({0: right, 1: right, 2: wrong, 3: wrong, 4: right, 5: f"<answer>{right}</answer>"})
    outcome = episode.outcome()
    assert [score == 1.0 for score in outcome.seat_scores] == [True, True, False, False, True, True]
    assert outcome.team_scores[0] == 1.0
    assert outcome.team_scores[1] < 1.0
    assert outcome.team_scores[2] == 1.0
    # Without one of the two that are right, team 0 is tied, and its first speaker, who is wrong, decides.
    of_two, of_three = outcome.seat_scores[2], outcome.seat_scores[3]
    assert outcome.without == {0: of_two, 1: of_two, 2: 1.0, 3: 1.0, 4: of_three}
    assert outcome.valid == (1.0,) * 6


def test_an_empty_answer_is_invalid_and_scores_nothing() -> None:
    episode = ReasoningTask("chain_sum").start(0, Lineup.together(2))
    episode.act({0: " \n ", 1: "<answer> </answer>"})
    assert episode.outcome().valid == (0.0, 0.0)
    assert episode.outcome().team_scores == (0.0,)


@given(st.lists(st.sampled_from(["1", "2", " 2", "3", ""]), min_size=1, max_size=7))
def test_a_members_absence_is_scored_as_the_vote_of_the_others(answers: list[str]) -> None:
    scores = tuple(float(answer.strip() == "2") for answer in answers)
    ballot = Ballot(tuple(answers), scores)
    seats = tuple(range(len(answers)))
    outcome = ballot.outcome(Lineup((Team(seats),)), (1.0,) * len(seats))
    assert set(outcome.without) == (set(seats) if len(seats) > 1 else set())
    for seat, score in outcome.without.items():
        assert score == ballot.joint([other for other in seats if other != seat])


@pytest.mark.parametrize(("dataset", "contents"), [("products", 55), ("chain_sum", 2 * 55)])
def test_no_content_of_training_is_ever_held_out(dataset: str, contents: int) -> None:
    def operands(seed: int) -> tuple[tuple[str, ...], bool]:
        question = problems.draw(seed).question
        return tuple(sorted(re.findall(r"\d", question))), " - " in question

    problems = ReasoningProblems(dataset, SMALL)
    training = {operands(seed) for seed in range(1000)}
    held_out = {operands(HELD_OUT + seed) for seed in range(200)}
    assert len(training) + len(held_out) == contents
    assert len(held_out) > 5
    assert not training & held_out


def test_the_room_for_answers_can_be_an_option() -> None:
    assert ReasoningProblems("gcd", {"max_answer_tokens": 9}).max_answer_tokens == 9


def test_neighbouring_seeds_give_problems_of_their_own() -> None:
    problems = ReasoningProblems("gcd")
    assert len({problems.draw(seed).question for seed in range(50)}) > 45


@pytest.mark.parametrize("dataset", ["acre", "chain_sum", "list_functions", "spell_backward"])
def test_a_problem_is_the_same_from_another_object(dataset: str) -> None:
    # acre and list_functions ignore a seed given afterwards, the others share one object for all seeds.
    first, second = ReasoningProblems(dataset), ReasoningProblems(dataset)
    drawn = [(problem.question, problem.answer) for problem in map(first.draw, range(6))]
    assert [(p.question, p.answer) for p in map(second.draw, reversed(range(6)))] == drawn[::-1]
    assert len(set(drawn)) > 1


def test_right_examples_come_first_and_are_never_held_out() -> None:
    problems = ReasoningProblems("gcd", {"examples": 3})
    seen = ReasoningTask("gcd", {"examples": 3}).start(HELD_OUT, Lineup.alone(1)).observe(0)
    assert [message.role for message in seen] == ["system", *("user", "assistant") * 3, "user"]
    assert seen[1:-1] == problems.examples
    shown = {message.text for message in seen[1:-1:2]}
    assert not shown & {problems.draw(HELD_OUT + seed).question for seed in range(100)}
    by_question = {problem.question: problem for problem in (problems.draw(HELD_OUT - 1 - seed) for seed in range(3))}
    assert all(by_question[q.text].score(a.text) == 1.0 for q, a in zip(seen[1:-1:2], seen[2:-1:2], strict=True))


def test_no_examples_leave_the_question_alone() -> None:
    seen = ReasoningTask("gcd", {"examples": 0}).start(0, Lineup.alone(1)).observe(0)
    assert [message.role for message in seen] == ["system", "user"]


def test_the_token_limit_leaves_room_for_the_longest_answer() -> None:
    # Lengths of pooled matrices have a long tail: in most samples of sixteen the longest has 100 bytes, here over 300.
    problems = ReasoningProblems("pool_matrix")
    assert problems.max_answer_tokens > max(len(problems.draw(seed).answer.encode()) for seed in range(400))


@pytest.mark.parametrize(
    ("dataset", "options", "reason"),
    [
        ("graph_color", {}, "scores its own answer"),
        ("propositional_logic", {}, "scores its own answer"),
        ("game_of_life_halting", {"grid_size_x": 8, "grid_size_y": 8, "num_oscillators": 2}, "verifies nothing"),
        ("countdown", {}, "runs an answer's text as a program"),
        ("no_such_set", {}, "it has: ab, acre"),
        ("gcd", {"max": 3}, "no option 'max'; it has: examples, max_answer_tokens, max_numbers"),
        ("gcd", {"seed": 3}, "no option 'seed'"),
        ("gcd", {"min_numbers": 0}, "min_numbers must be at least 2"),
        ("gcd", {"examples": True}, "a whole number from 0 to 32, got True"),
        ("gcd", {"examples": 33}, "a whole number from 0 to 32, got 33"),
        ("gcd", {"max_answer_tokens": 0}, "a whole number from 1 to 32768, got 0"),
        ("chain_sum", {**SMALL, "max_terms": 1, "min_terms": 1, "max_digits": "x"}, "refuses the options"),
        ("count_bits", {"min_n": 5, "max_n": 5}, "too few different problems"),
    ],
)
def test_what_cannot_be_used_is_refused_with_the_reason(
    dataset: str, options: dict[str, int | float | str | bool], reason: str
) -> None:
    with pytest.raises(TaskError, match=reason):
        ReasoningTask(dataset, options)


def test_a_number_with_a_huge_exponent_is_wrong_at_once() -> None:
    problem = ReasoningProblems("coin_flip").draw(0)
    assert problem.score("1e999999999") == 0.0
    assert problem.score(problem.answer) == 1.0


def test_text_that_a_scorer_cannot_parse_scores_nothing() -> None:
    assert ReasoningProblems("prime_factorization").draw(0).score("banana") == 0.0


def scorers_that_execute() -> Iterator[str]:
    """Data sets whose `score_answer` calls eval, exec or sympy's parser, by the installed source."""
    spec = importlib.util.find_spec("reasoning_gym")
    assert spec is not None
    assert spec.origin is not None
    for path in Path(spec.origin).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if not any(f"{name}(" in source for name in EXECUTORS):
            continue
        tree = ast.parse(source)
        names = [
            node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id == "DATASET_NAME"
            and isinstance(node.value, ast.Constant)
        ]
        if any(isinstance(node, ast.FunctionDef) and executes(node) for node in ast.walk(tree)):
            yield from map(str, names)


def executes(function: ast.FunctionDef) -> bool:
    if function.name != "score_answer":
        return False
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    called = {
        call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "") for call in calls
    }
    return bool(called & {"eval", "exec", "parse_expr", "sympify", "S"})


def test_every_scorer_that_would_run_an_answer_is_known() -> None:
    # number_sorting evaluates the stored answer, propositional_logic has a parser of its own by the same name.
    assert set(scorers_that_execute()) - {"number_sorting", "propositional_logic"} == EXECUTES_ANSWERS
