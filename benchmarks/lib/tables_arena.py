"""Tables of the arena: what modes buy, throughput and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lib.table_text import results, table

_SETTINGS = {"base": "base model", "independent": "independent (four GRPO runs)", "team_battle": "team battle"}
_MEASURES = {
    "single": "one policy",
    "best": "best policy",
    "vote": "vote of four",
    "drafted_vote": "vote after drafts",
    "game": "game: points",
    "legal": "game: legal moves",
}
_BY_SEED = ("single", "best", "vote", "game")


def arena_modes() -> str:
    """Means over seeds with their intervals; a star where a setting surely differs from policies that learn alone."""
    settings = results("arena_modes")["settings"]
    rows = [
        [_SETTINGS.get(name, name), *(_interval(row[measure]) for measure in _MEASURES)]
        for name, row in settings.items()
    ]
    return table(["setting", *_MEASURES.values()], rows)


def arena_modes_by_seed() -> str:
    settings = results("arena_modes")["settings"]
    rows = [
        [
            _SETTINGS.get(name, name),
            *(", ".join(f"{score:.2f}" for score in row[measure]["seeds"]) for measure in _BY_SEED),
        ]
        for name, row in settings.items()
    ]
    return table(["setting", *(_MEASURES[measure] for measure in _BY_SEED)], rows)


def _interval(measure: Mapping[str, Any]) -> str:
    mean, low, high = measure["mean"]
    return f"{mean:.2f} [{low:.2f}, {high:.2f}]" + ("*" if measure.get("surely_different") else "")


def arena_throughput() -> str:
    """Ours for each number of policies, and how many times the peers' throughput that is."""
    measured = results("arena_throughput")
    rows, compared = measured["rows"], measured["compared"]
    counts = [key.partition("/")[2] for key in rows if key.startswith("fedmoe-fp32/")]

    def ours(dtype: str, key: str, digits: int = 0, scale: float = 1.0) -> list[str]:
        return [f"{scale * rows[f'fedmoe-{dtype}/{count}'][key]:.{digits}f}" for count in counts]

    def seconds(system: str) -> float:
        return float(rows[f"{system}/1"]["wall_seconds"]["median"])

    def mebibytes(system: str, count: str = "1") -> str:
        return f"{rows[f'{system}/{count}']['peak_bytes'] / 2**20:.0f}"

    def times(dtype: str, peer: str) -> list[str]:
        return [f"{compared[f'fedmoe-{dtype} over {peer}'][count]['wall']:.2f}" for count in counts]

    def step(dtype: str) -> list[str]:
        return [f"{rows[f'fedmoe-{dtype}/{count}']['wall_seconds']['median']:.1f}" for count in counts]

    skyrl = f"SkyRL {mebibytes('skyrl')} to {mebibytes('skyrl', counts[-1])}"
    peers = f"TRL {mebibytes('trl')}, plain {mebibytes('trl-plain')}; {skyrl}"
    lines = [
        ["float32, seconds a step", *step("fp32")],
        ["tokens/s", *ours("fp32", "tokens_per_second")],
        [f"times TRL ({seconds('trl'):.1f} s a policy)", *times("fp32", "trl")],
        [f"times TRL plain ({seconds('trl-plain'):.1f} s)", *times("fp32", "trl-plain")],
        ["times SkyRL, learning", *times("fp32", "skyrl")],
        [f"peak memory MiB ({peers})", *ours("fp32", "peak_bytes", scale=2**-20)],
        ["bfloat16, seconds a step", *step("bf16")],
        ["tokens/s", *ours("bf16", "tokens_per_second")],
        [f"times TRL in bfloat16 ({seconds('trl-bf16'):.1f} s)", *times("bf16", "trl-bf16")],
        [f"peak memory MiB (TRL {mebibytes('trl-bf16')})", *ours("bf16", "peak_bytes", scale=2**-20)],
    ]
    return table(["", f"P = {counts[0]}", *counts[1:]], lines)
