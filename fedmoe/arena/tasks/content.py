"""Content keys of questions, for the held-out split: reworded or reordered questions get the same key.

Held-out questions must differ from trained ones in content: a policy that learned 7 x 3 knows 3 x 7. A key is rather
too coarse than too fine: questions that share one stand on the same side, which costs some but lets nothing through.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

_WORDED = {"plus": "+", "minus": "-", "times": "*", "multiplied by": "*", "divided by": "/", "over": "/"}
_OPERATION = re.compile(rf"(?<=\d)\s+({'|'.join(_WORDED)})\s+(?=[-(]?\d)")
_SIGNS = str.maketrans({"×": "*", "·": "*", "÷": "/", "−": "-", "–": "-", "⁄": "/"})
_TIMES = re.compile(r"(?<=[\d)])(\s*)x(\s*)(?=[\d(])")
_NUMBER = r"\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?"
# An operator has a number or a bracket beside it; a hyphen or a slash between words has not.
_MATHS = re.compile(rf"({_NUMBER})|(?<=[\d)])\s*([-+*/%^<>]+)|([-+*/%^<>]+)\s*(?=[\d(])")
_TOKENS = re.compile(rf"{_NUMBER}|[^\W\d_]+|[^\s\w.,:;!?'\"`()]")
#: Of the different texts of a sample a coarser rule must leave one in ...
_COARSEST = 4
#: A word in more than one question of ... is the wording's.
_COMMON = 10


@dataclass(frozen=True, slots=True)
class ContentRule:
    """The rule by which a data set's questions are reduced to their content.

    `numbers`: its numbers and operators. `words`: its words, numbers and signs, without those that are `common` to the
    data set's questions. Both in any order, whatever case, white space and the words around. `text`: all of it.
    """

    kind: Literal["numbers", "words", "text"]
    common: frozenset[str] = frozenset()

    @classmethod
    def of(cls, questions: Sequence[str]) -> ContentRule:
        """The coarsest one that still tells the questions of a sample apart.

        One that leaves fewer than a quarter of the different texts reads past what the questions are about (the letters
        of a word, the order of a list).
        """
        texts = len({cls("text").key(question) for question in questions})
        seen = Counter(word for question in questions for word in set(_TOKENS.findall(_folded(question))))
        common = frozenset(word for word, count in seen.items() if count * _COMMON > len(questions))
        for rule in (cls("numbers"), cls("words", common), cls("words")):
            if len({rule.key(question) for question in questions}) * _COARSEST >= texts:
                return rule
        return cls("text")

    def key(self, question: str) -> str:
        """Equal for questions of equal content."""
        text = _folded(question)
        if self.kind == "numbers":
            return _sorted(number or before or after for number, before, after in _MATHS.findall(text))
        if self.kind == "words":
            return _sorted(token for token in _TOKENS.findall(text) if token not in self.common)
        return " ".join(text.split())


def _folded(question: str) -> str:
    text = unicodedata.normalize("NFKC", question).casefold().translate(_SIGNS)
    text = _OPERATION.sub(lambda match: f" {_WORDED[match[1]]} ", text)
    return _TIMES.sub(r"\1*\2", text)


def _sorted(tokens: Iterable[str]) -> str:
    return " ".join(sorted(map(_plain, tokens)))


def _plain(token: str) -> str:
    """A number without separators of thousands, leading and trailing zeros; anything else as it is."""
    if not token[0].isdigit():
        return token
    whole, point, fraction = token.replace(",", "").partition(".")
    fraction = fraction.rstrip("0")
    return (whole.lstrip("0") or "0") + (point + fraction if fraction else "")
