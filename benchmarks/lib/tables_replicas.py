"""Tables of several machines: disturbances of replicas with what clients saw, takeovers, rates; rollouts on Ray."""

from __future__ import annotations

from collections import Counter

from lib.table_text import document, percent, results, spread, table

_DONE = ("kills", "of them at a named place", "pauses", "partitions", "rolling restarts")


def disturbances() -> str:
    """All runs that disturb, added up."""
    runs = [run for run in document("replicas")["runs"] if "done" in run]
    done: Counter[str] = Counter()
    for run in runs:
        done.update(run["done"])
    keys = ("terms", "pushes", "acknowledged", "sent_again", "never_answered", "reads")
    counts = {"runs": len(runs), **{name: done[name] for name in _DONE}}
    counts |= {key.replace("_", " "): sum(run[key] for run in runs) for key in keys}
    counts["faults"] = sum(len(run["faults"]) for run in runs)
    return table(list(counts), [[f"{count:,}" for count in counts.values()]])


def takeovers() -> str:
    """One row a run that measures, with the default lease."""
    runs = [run for run in document("replicas")["runs"] if "takeovers" in run]
    header = [
        "owners killed",
        "lease",
        "every",
        "nobody answered for: p50 / p99 / longest",
        "updates/s undisturbed / disturbed",
    ]
    rows = [
        [
            f"{run['takeovers']}",
            f"{run['lease_seconds']:g} s",
            f"{run['every_seconds']:g} s",
            " / ".join(f"{run['silence_seconds'][name]:.1f} s" for name in ("p50", "p99", "max")),
            f"{run['updates_per_second']['undisturbed']:.1f} / {run['updates_per_second']['disturbed']:.1f}",
            percent(run["goodput"]),
            f"{run['hardware']['load_average']:.0f}",
            f"{len(run['faults'])}",
        ]
        for run in runs
    ]
    return table([*header, "goodput, %", "load of the machine", "faults"], rows)


def rates() -> str:
    """One replica beside three, in turns."""
    runs = [run for run in document("replicas")["runs"] if run.get("measured") == "rates"]
    rows = []
    for run in runs:
        rate, cost, ratio = run["updates_per_second"], run["cpu_seconds_an_update"], run["cpu_ratio"]
        names = ("1 replicas", "3 replicas")
        rows.append(
            [
                f"{run['rounds']}",
                " / ".join(f"{rate[name]:.1f}" for name in names),
                " / ".join(f"{1e3 * cost[name]:.1f}" for name in names),
                f"{ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f})",
            ]
        )
    header = ["rounds", "updates/s with one / three", "CPU ms an update with one / three", "ratio of a round's two"]
    return table(header, rows)


def ray_rollouts() -> str:
    """Actors of Ray beside the engine in this process."""
    measured = results("ray_rollouts")
    rows = [
        [name, spread(rate["median"], rate["minimum"], rate["maximum"])]
        for name, rate in measured["tokens_per_second"].items()
    ]
    return table(["rollouts by", "tokens/s median (min-max)"], rows)
