"""Configurations that cannot be used are errors that name the line or the key, and what was meant (59)."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedmoe.arena.config import ArenaConfigError, read_config


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "sets nothing"),
        (b"# seed = 3\n", "sets nothing"),
        (b"seed = 3\nseed = 4\n", "at line 2"),
        (b"seed: 3\n", "at line 1"),
        (b'name = "\xe9"\n', "not TOML: 'utf-8'"),
        (b'seed = "x"\n', "seed: Input should be a valid integer"),
        (b"sead = 3\n", "sead: there is no such key; did you mean seed"),
        (b"[policies]\ncuont = 3\n", "policies.cuont: there is no such key; did you mean count"),
        (b'[[phases]]\nmode = "mixed"\niteration = 3\n', "iteration: there is no such key; did you mean iterations"),
        (b"[federation]\nurll = 3\n", "federation.urll: there is no such key; did you mean url"),
        (b"nothing_like_it = 3\n", "nothing_like_it: there is no such key$"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_where_and_what_was_meant_59(
    content: bytes, says: str, tmp_path: Path
) -> None:
    file = tmp_path / "arena.toml"
    file.write_bytes(content)
    with pytest.raises(ArenaConfigError, match=says):
        read_config(file)


def test_a_byte_order_mark_and_tabs_are_read_over_59(tmp_path: Path) -> None:
    file = tmp_path / "arena.toml"
    file.write_bytes(b"\xef\xbb\xbfseed = 3\n[policies]\n\tcount = 2\n")
    config = read_config(file)
    assert (config.seed, config.policies.count) == (3, 2)
