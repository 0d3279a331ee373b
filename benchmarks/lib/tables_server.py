"""Tables of the coordinator and the gateway's server: load, attacks, starts, crashes, fuzzing, swaps."""

from __future__ import annotations

from collections import Counter
from statistics import median

from lib.table_text import Row, document, percent, results, significant, spread, table

_NEIGHBOURS = {
    "silent": "70 uploads with a head and 1000 bytes, then silence",
    "heads": "70 uploads with a head only",
    "requests": "64 connections, `GET /list_experts`",
    "register": "16 connections, a new expert each time",
    "guesses": "64 connections with a token nobody knows",
}
_STARTS = {
    "with_snapshots": "chain of all rows, seals, digests of the versions, roster",
    "without_snapshots": "all snapshots lost: every update is landed again",
}
_GATE_STEPS = {"first": "as trained", "python_spoilt": "its product times -1", "python_mended": "mended"}
_SWAPS = ("serve_swap_tiny", "serve_swap_smollm2", "serve_swap_smollm2_vllm")
_BASES = {"tiny": "tiny model", "smollm2": "SmolLM2-135M"}
_MODELS = {"smollm2-135m": "SmolLM2-135M", "qwen2.5-7b": "Qwen2.5-7B"}


def coordinator() -> str:
    rows: list[Row] = []
    for dtype, measured in results("coordinator").items():
        floor = measured["floor"]["updates_per_second"]["median"]
        for key, row in measured.items():
            if key == "floor":
                continue
            rate, push, pull = row["updates_per_second"], row["push"], row["pull"]
            rows.append(
                [
                    dtype,
                    key.removesuffix("_workers"),
                    spread(rate["median"], rate["min"], rate["max"]),
                    f"{floor:.1f}",
                    f"{percent(row['share_of_floor'])} %",
                    f"{push['median_ms']:.0f} / {push['p99_ms']:.0f}",
                    f"{pull['median_ms']:.0f} / {pull['p99_ms']:.0f}",
                    f"{row['not_modified']['median_ms']:.1f}",
                ]
            )
    header = ["wire", "workers", "updates/s median (min-max)", "floor/s", "share of the floor"]
    return table([*header, "push ms median / p99", "pull ms median / p99", "304 ms"], rows)


def journals() -> str:
    """PostgreSQL beside SQLite, in turns."""
    rows: list[Row] = []
    for dtype, measured in results("journals").items():
        for name in ("sqlite", "postgresql"):
            row = measured[name]
            rate = row["updates_per_second"]
            rows.append(
                [
                    dtype,
                    name,
                    spread(rate["median"], rate["min"], rate["max"]),
                    "" if name == "sqlite" else f"{percent(measured['share_of_sqlite'])} %",
                    f"{row['median_ms']:.0f} / {row['p99_ms']:.0f}",
                    f"{1e3 * row['cpu_seconds']:.0f}",
                ]
            )
    header = ["wire", "journal", "updates/s median (min-max)", "share of SQLite's", "push ms median / p99"]
    return table([*header, "coordinator's CPU ms an update"], rows)


def crashes() -> str:
    """All runs of the campaign added up."""
    runs = document("crashes")["runs"]
    done: Counter[str] = Counter()
    for run in runs:
        done.update(run["done"])
    named = sum(
        count for what, count in done.items() if what.startswith("kills at ") and what != "kills at random moments"
    )
    sums = {
        key: sum(run.get(key, 0) for run in runs)
        for key in ("kills", "pushes", "acknowledged", "sent_again", "never_answered", "of_another_history")
    }
    counts = {
        "runs": len(runs),
        "kills": sums["kills"],
        "of them at named places": named,
        "stops": done["stops"],
        "clock jumps": done["clock jumps"],
        "backups": done["backups"],
        "restores": done["restores"],
        "pushes": sums["pushes"],
        "acknowledged": sums["acknowledged"],
        "sent again": sums["sent_again"],
        "never answered": sums["never_answered"],
        "turned away after a restore": sums["of_another_history"],
        "faults": sum(len(run["faults"]) for run in runs),
    }
    return table(list(counts), [[f"{count:,}" for count in counts.values()]])


def fuzzing() -> str:
    """All runs of a reader added up, readers in the order in which they were first run."""
    runs = document("fuzzing")["runs"]
    rows = []
    for target in dict.fromkeys(run["target"] for run in runs):
        own = [run for run in runs if run["target"] == target]
        rows.append(
            [
                target.replace("_", " "),
                f"{sum(run['processor_minutes'] for run in own):.1f}",
                f"{sum(run['executions'] for run in own):,}",
                str(sum(bool(run["uncaught"]) for run in own)),
            ]
        )
    return table(["reader", "processor minutes", "executions", "uncaught"], rows)


def recovery() -> str:
    measured = results("recovery")
    rows = []
    for key, label in _STARTS.items():
        seconds = measured[key]["cpu_seconds"]
        rows.append([label, str(seconds["repeats"]), spread(seconds["median"], seconds["min"], seconds["max"])])
    return table(["", "starts", "CPU seconds"], rows)


def fairness() -> str:
    measured = results("fairness")
    rows = []
    for key in [key for key, value in measured.items() if isinstance(value, dict) and "kept_of_medians" in value]:
        row, windows = measured[key], measured[key]["kept_by_window"]
        cpu = row["coordinator_cpu_seconds_per_update"]
        rows.append(
            [
                _NEIGHBOURS.get(key, key),
                f"{median(row['alone_updates_per_second']):.1f}",
                f"{median(row['beside_updates_per_second']):.1f}",
                spread(row["kept_of_medians"], windows["minimum"], windows["maximum"], 2),
                f"{1e3 * cpu['alone']:.1f}",
                f"{1e3 * cpu['beside']:.1f}",
            ]
        )
    header = ["beside", "alone, updates/s", "beside, updates/s", "kept (windows)"]
    return table([*header, "CPU ms an update, alone", "beside"], rows)


def attacks() -> str:
    rows = []
    for row in results("attacks")["attacks"]:
        health = row["healthz_ms"]
        rows.append(
            [
                row["attack"],
                f"{row['anonymous_mb_peak']:.0f}",
                f"{row['anonymous_mb_three_seconds_later']:.0f}",
                f"{row['resident_mb_peak']:.0f}",
                f"{health['median']:.1f} / {health['p99']:.0f} / {health['max']:.0f}",
                f"{row['cpu_seconds']:.1f} of {row['seconds']:.0f}",
                f"{row['loop_waited_for_a_processor_seconds']:.1f}",
                f"{row['load_1_minute']:.1f}",
            ]
        )
    header = ["attack", "anonymous, peak", "3 s later", "resident, peak", "`/healthz` ms", "CPU s"]
    return table([*header, "loop waited s", "load"], rows)


def many_experts() -> str:
    rows = []
    for key, row in results("many_experts").items():
        times = [row[part] for part in ("push", "list", "push_and_list")]
        cells = [spread(time["median_ms"], time["quartile_1_ms"], time["quartile_3_ms"]) for time in times]
        count = int(key.removesuffix("_experts"))
        rows.append([f"{count:,}", *cells, f"{row['list_bytes']:,}", f"{row['resident_mib']:.0f}"])
    return table(["experts", "push ms", "list ms", "push and list ms", "list bytes", "resident MiB"], rows)


def threads() -> str:
    measured = results("threads")
    rows = []
    for count, row in measured["now"].items():
        before = measured.get("before", {}).get(count)
        earlier = ["not measured", ""] if before is None else [_a_step(before), f"{before['times_1']:.2g}"]
        took = ", ".join(dict.fromkeys(row["threads"]))
        rows.append([count, _a_step(row), f"{row['times_1']:.2g}", took, *earlier])
    header = ["workers", "CPU s a step (smallest - largest)", "times one worker", "threads each took"]
    return table([*header, "before", "times one worker"], rows)


def training_step() -> str:
    rows = []
    for name in ("rows", "samples"):
        row = results("training_step")[name]
        apart = max(abs(own - peers) / peers for own, peers in zip(*row["losses"].values(), strict=True))
        cells = [f"{row['cpu_seconds'][side]:#.3g}" for side in ("fedmoe", "peft")]
        ratios = [
            f"{row[f'{kind}_ratio']:.2f} ({min(row[f'{kind}_ratios']):.2f}-{max(row[f'{kind}_ratios']):.2f})"
            for kind in ("cpu", "wall")
        ]
        rows.append([name, *cells, *ratios, f"{apart:.0e}"])
    header = ["", "CPU s, this build", "CPU s, PEFT", "PEFT / this build, CPU", "by the clock"]
    return table([*header, "losses apart, at most"], rows)


def _a_step(row: dict[str, dict[str, float]]) -> str:
    seconds = row["cpu_seconds_a_step"]
    return f"{seconds['median']:#.3g} ({seconds['smallest']:#.3g} - {seconds['largest']:#.3g})"


def recompress() -> str:
    rows = []
    for key, row in results("recompress").items():
        model, _, count = key.partition(", K = ")
        how = (
            "attention measured, MLP extrapolated"
            if row["dense"]["extrapolated"]
            else "each shape once, times its count"
        )
        ours, dense = row["ours"]["median_seconds"], row["dense"]["seconds"]
        ratio = significant(row["dense_over_ours"], 2)
        rows.append([_MODELS.get(model, model), count, significant(ours, 2), f"{significant(dense, 3)} ({how})", ratio])
    return table(["model", "K", "ours s", "dense SVD s", "ratio"], rows)


def evaluation_gate() -> str:
    measured = results("evaluation_gate")
    rows = []
    for key, label in _GATE_STEPS.items():
        row = measured[key]
        worst = {model: min(kept.items(), key=lambda item: item[1]) for model, kept in row["kept"].items()}
        before = [f"{percent(share)} % ({domain})" for model, (domain, share) in worst.items() if "version" in model]
        candidates = {model: pair for model, pair in worst.items() if "version" not in model}
        if row["published"]:
            domain, share = candidates[row["published"]]
            cells = [f"{row['published']} goes out", f"{percent(share)} % ({domain})"]
        else:
            domain, share = max(candidates.values(), key=lambda pair: pair[1])
            cells = ["the old gateway stays", f"{percent(share)} % at best ({domain})"]
        rows.append([label, *cells, *(before or [""]), f"{row['seconds']:.0f}"])
    header = ["the python expert", "verdict", "gain kept on the worst domain", "published before", "seconds"]
    return table(header, rows)


def serve_swap() -> str:
    rows = []
    for name in _SWAPS:
        whole = document(name)
        row, arguments = whole["results"], whole["arguments"]
        backend = f"vLLM {row['vllm_version'].rpartition('.')[0]} (CPU)" if row["vllm_version"] else "transformers"
        times = [row[part] for part in ("under_swaps", "quiet", "swap_delay")]
        rows.append(
            [
                f"{backend}, {_BASES.get(arguments['base'], arguments['base'])}, {arguments['tokens']} tokens",
                str(row["failed"]),
                str(row["mixed"]),
                *(f"{time['p50_ms']:,.0f} / {time['p99_ms']:,.0f}" for time in times),
            ]
        )
    return table(["back end", "failed", "mixed", "latency ms", "without new versions", "swap ms"], rows)


def against(name: str = "against") -> str:
    """This build beside an earlier one, from the results of this name; digits as small times need them."""
    rows = []
    for part_name, row in results(name)["measured"].items():
        digits = 4 if row["now"]["median"] < 0.1 else 2
        cells = [
            spread(part["median"], part["minimum"], part["maximum"], places)
            for part, places in ((row["before"], digits), (row["now"], digits), (row["ratio"], 2))
        ]
        same = {True: "yes", False: "no", None: ""}[row["same_result"]]
        rows.append([part_name, *cells, same])
    return table(["", "before, CPU s", "now, CPU s", "now / before", "same bits"], rows)


def auto() -> str:
    """Processor and wall seconds of prompts at once, to `gateway` and to `auto`, in both builds."""
    measured = results("auto")
    rows = []
    for name in (name for name in measured if name.endswith(" experts")):
        for build in ("before", "now"):
            row = measured[name][build]
            parts = [row[f"{part}_seconds"] for part in ("gateway_cpu", "auto_cpu", "gateway_wall", "auto_wall")]
            parts += [row["cpu_ratio"], row["wall_ratio"]]
            rows.append([f"{name}, {build}", *(spread(p["median"], p["minimum"], p["maximum"], 2) for p in parts)])
    return table(["", "gateway, CPU s", "auto, CPU s", "gateway, s", "auto, s", "CPU ratio", "wall ratio"], rows)


def page() -> str:
    """What open pages cost the coordinator, and what one costs its browser."""
    measured = results("page")
    pages, browser = measured["pages"], measured["browser"]
    rows: list[Row] = [
        [f"{pages['pages']} pages, one update a second", f"{100 * pages['cost_of_a_core']:.1f} %", "", ""],
        [
            f"one page in Chromium, {browser['workers']:,} workers, {browser['events_a_minute']:,} heartbeats a minute",
            f"{100 * browser['coordinator_share_of_a_core']:.0f} %, the heartbeats included",
            f"{100 * browser['chromium_share_of_a_core']:.0f} %",
            f"{browser['healthz_p50_ms']:.1f} / {browser['healthz_p99_ms']:.1f}",
        ],
    ]
    return table(["", "coordinator, of a core", "Chromium, of a core", "`/healthz` ms p50 / p99"], rows)


def runs_page() -> str:
    """What open pages of arena runs cost their server, and what one costs its browser."""
    measured = results("runs_page")
    pages, browser = measured["pages"], measured["browser"]
    several, one = pages["server_share_of_a_core"], pages["server_share_of_a_core_one"]
    rows: list[Row] = [
        ["one page", f"{100 * one:.1f} %", f"{100 * browser['chromium_share_of_a_core']:.0f} %"],
        [f"{pages['pages']} pages", f"{100 * several:.1f} %", ""],
    ]
    return table(["", "server, of a core", "Chromium, of a core"], rows)
