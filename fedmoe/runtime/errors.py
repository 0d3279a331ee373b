"""Base classes of expected errors, whose messages say what is wrong, what was found and what to do."""

from __future__ import annotations


class ExpectedError(Exception):
    """Base of errors that a command shows as one line instead of a traceback, since the message says what to do."""


class RefusedError(Exception):
    """A request that is refused for a reason the sender can act on; nothing was changed.

    `code` is stable for programs, `detail` says what is wrong and what was got, `fix` says what to do, `facts` carries
    values a program may want (versions, hashes).
    """

    def __init__(self, code: str, detail: str, fix: str = "", **facts: object) -> None:
        super().__init__(f"{detail} {fix}".strip())
        self.code = code
        self.detail = detail
        self.fix = fix
        self.facts = facts
