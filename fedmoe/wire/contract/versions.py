"""Protocol versions: the number in a header, and the refusal of peers more than one version apart.

It rises when a request or an answer changes its meaning; new keys of answers and new optional parameters do not raise
it. A version works with the one before and the one after it. Whoever sends no number is from before there was one.
"""

from __future__ import annotations

from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.safe_text import shortened

#: The protocol of this version.
PROTOCOL = 2
PROTOCOL_HEADER = "FedMoE-Protocol"


def mismatch(header: str | None, here: str, there: str, version: str) -> RefusedError | None:
    """The refusal of a peer whose header says `header`, None if it is near enough; `here` and `there` name the ends.

    `version` is the installed version of this end.
    """
    text = "1" if header is None else header
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else None
    if number is not None and abs(number - PROTOCOL) <= 1:
        return None
    old = there if number is None or number < PROTOCOL else here
    number_text = shortened(header or "", 40)
    return RefusedError(
        "upgrade_required",
        f"{here} (fedmoe {version}) speaks protocol {PROTOCOL}, and {PROTOCOL - 1} and {PROTOCOL + 1}; "
        f"{there} speaks {number_text if number is not None else repr(number_text)}.",
        f"Upgrade {old} (pip install --upgrade fedmoe), or install a version nearer to it at the other end.",
        protocol=PROTOCOL,
        fedmoe=version,
        got=number_text,
    )
