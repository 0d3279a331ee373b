"""Tables of merges and of the online gateway: the share of every expert's own gain that is kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import mean
from typing import Any

from lib.table_text import Row, percent, percent_interval, results, significant, table

#: What a merge is called in the results -> in the table; `{chosen}` is its scale and weights.
_MERGES = {
    "weighted_average": "weighted_average",
    "scaled": "scaled",
    "regmean, equal weights": "regmean x{scale}, equal weights",
    "regmean, chosen": "regmean {chosen}",
    "regmean, chosen, rank 32": "regmean {chosen}",
    "regmean, chosen, rank 16": "regmean {chosen}",
    "routed": "routed",
}
_PEERS = {
    "weighted_average": "ours, weighted_average",
    "regmean": "ours, regmean",
    "peft cat": "PEFT cat",
    "peft svd": "PEFT svd",
    "peft ties": "PEFT ties",
    "peft dare_ties": "PEFT dare_ties",
    "peft arrow, top 1": "PEFT Arrow, top 1",
    "peft arrow, top 2": "PEFT Arrow, top 2",
}
_MERGED = {"first": "first merge", "second": "after one lap", "third": "after two", "fourth": "after three"}
_INITS = {
    "shared": "the same",
    "independent": "each its own",
    "slots": "rows of one orthogonal matrix, other ones for each",
}
_POOLED = {
    "speed 1": "pooled, speed 1",
    "mean speed 7/3": "pooled, mean speed 7/3",
    "speed 4": "pooled, speed 4",
    "all steps": "pooled, equal total steps",
}
_SHARES = {"mean speed 7/3": "time, mean speed 7/3", "speed 4": "time, speed 4", "all steps": "total steps"}


def merge_quality(domains: str) -> str:
    """The first seed with every merge, further seeds with what was chosen and with routing."""
    by_seed = results(f"merge_quality_{domains}")
    rows: list[Row] = []
    for place, (seed, found) in enumerate(by_seed.items()):
        equal = len(set(found["weights"].values())) == 1
        for model, label in _MERGES.items():
            further = model in ("regmean, chosen", "regmean, equal weights", "routed")
            if (place and not further) or (equal and model == "regmean, equal weights"):
                continue
            name = label.format(scale=found["scale"], chosen=_chosen(found["scale"], found["weights"]))
            rows.append([name, str(found["ranks"].get(model, "")), seed, *_kept(found["test"], model)])
    return _by_seed(["merge", "rank"], by_seed, rows)


def _chosen(scale: float, weights: Mapping[str, float]) -> str:
    """`x1.2, typescript and protos x1.3`."""
    by_weight: dict[float, list[str]] = {}
    for domain, weight in weights.items():
        if weight != 1:
            by_weight.setdefault(round(weight, 2), []).append(domain)
    parts = [f"{' and '.join(names)} x{weight:g}" for weight, names in by_weight.items()]
    return ", ".join([f"x{scale:g}", *parts])


def _domains(by_seed: Mapping[str, Any]) -> list[str]:
    return list(next(iter(by_seed.values()))["test"]["retained"])


def _by_seed(header: Row, by_seed: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """What every seed kept; the column of seeds, after those of `header`, only where there are several."""
    place = len(header)
    if len(by_seed) == 1:
        rows = [[*row[:place], *row[place + 1 :]] for row in rows]
    else:
        header = [*header, "seed"]
    return table([*header, *_domains(by_seed), "worst", "mean"], rows)


def _kept(test: Mapping[str, Any], model: str, mean_interval: bool = True) -> list[str]:
    """Every domain, the worst and the mean; with many domains only the worst has its interval."""
    summary, shares = test["summary"][model], [row["kept"][model] for row in test["retained"].values()]
    many = len(shares) > 3
    cells = [percent(share["value"]) if many else percent_interval(share) for share in shares]
    average = summary["mean"]
    last = percent_interval(average) if mean_interval and not many else percent(average["value"])
    return [*cells, percent_interval(summary["worst"]), last]


def merge_peers() -> str:
    measured = results("merge_peers_demo")
    rows = []
    for model, label in _PEERS.items():
        cost = measured["merges"].get(model)
        costs = [significant(cost["processor_seconds"], 2 if cost["processor_seconds"] < 10 else 3)] if cost else [""]
        costs.append(f"{cost['peak_mib']:.0f}" if cost else "")
        rows.append([label, str(cost["rank"]) if cost else "", *_kept(measured["test"], model, False), *costs])
    domains = list(measured["test"]["retained"])
    return table(["merge", "rank", *domains, "worst", "mean", "seconds", "MiB"], rows)


def repeated_merges(name: str) -> str:
    """A gateway after the first merge and after every lap, seed by seed."""
    by_seed = results(f"repeated_merges_{name}")
    models = [model for model in _MERGED if model in next(iter(by_seed.values()))["test"]["summary"]]
    rows = [
        [_MERGED[model], seed, *_kept(found["test"], model, False)]
        for model in models
        for seed, found in by_seed.items()
    ]
    return _by_seed(["gateway"], by_seed, rows)


def lora_init() -> str:
    by_seed = results("lora_init_demo")
    rows = []
    for variant, label in _INITS.items():
        summaries = [found[variant]["test"]["summary"]["regmean"] for found in by_seed.values()]
        cells = [", ".join(percent(one[part]["value"]) for one in summaries) for part in ("worst", "mean")]
        rows.append([label, *cells])
    return table(["first A of the three experts", "worst", "mean"], rows)


def statistics_budget(domains: str) -> str:
    """One expert's moments rest on so many tokens, the others' on the most that was measured."""
    return _budget(f"statistics_budget_{domains}", "one ", "tokens of the own moments")


def statistics_budget_all(domains: str) -> str:
    """All experts' moments rest on so many tokens."""
    return _budget(f"statistics_budget_{domains}", "all ", "tokens of all moments")


def _budget(name: str, kind: str, title: str) -> str:
    by_seed = results(name)
    tests = [found["test"] for found in by_seed.values()]
    models = list(tests[0]["summary"])
    # With the most tokens that were measured, one's own are as many as the others'.
    most = [model for model in models if model.startswith("all ")][:1] if kind == "one " else []
    models = most + sorted((model for model in models if model.startswith(kind) and model not in most), key=_order)
    if kind == "all ":
        models = models[1:]
    rows = []
    for model in models:
        shares = [[row["kept"][model]["value"] for row in test["retained"].values()] for test in tests]
        cells = [_mean_of_seeds(own) for own in zip(*shares, strict=True)]
        rows.append([_tokens(model), *cells, percent(min(map(min, shares)))])
    return table([title, *_domains(by_seed), "worst"], rows)


def _mean_of_seeds(shares: Sequence[float]) -> str:
    """`92 (88-96)`: mean, least and most; one seed has no spread."""
    ends = f" ({percent(min(shares))}-{percent(max(shares))})" if len(shares) > 1 else ""
    return percent(mean(shares)) + ends


def _tokens(model: str) -> str:
    """`one 256 filled up to 1024` -> `256, filled up to 1,024`."""
    own, filled, most = model.partition(" ")[2].partition(" filled up to ")
    return f"{int(own):,}" + (f", filled up to {int(most):,}" if filled else "")


def _order(model: str) -> tuple[bool, int, int]:
    """Most tokens first, what was filled up last."""
    words = model.split()
    return len(words) > 2, -int(words[1]), -int(words[-1])


def online_gateway() -> str:
    """Gains at the end, the mean over seeds."""
    by_seed = list(results("online_gateway").values())
    end = list(by_seed[0]["compared"])[-1]
    shown = {"online gateway": f"online, {end}"}
    counts = {"online gateway": _steps(by_seed[0]["merges"])}
    for machine, label in _POOLED.items():
        count = by_seed[0]["compared"][end][machine]["pooled_steps"]
        shown[label], counts[label] = f"pooled, {count} steps", str(count)
    domains = list(by_seed[0]["gains"]["base"])
    rows = [
        [label, counts[label], *(f"{mean(found['gains'][row][domain] for found in by_seed):.3f}" for domain in domains)]
        for label, row in shown.items()
    ]
    return table(["", "steps", *domains], rows)


def _steps(merges: Sequence[Mapping[str, Any]]) -> str:
    """How many steps of each expert went into the gateway, from the sums after every merge."""
    steps: dict[str, int] = {}
    before = 0
    for merge in merges:
        steps[merge["expert"]] = steps.get(merge["expert"], 0) + merge["steps"] - before
        before = merge["steps"]
    return " + ".join(map(str, sorted(steps.values())))


def online_gateway_shares() -> str:
    """The gateway's gain as a share of the pooled one's at the end, seed by seed."""
    by_seed = results("online_gateway")
    end = list(next(iter(by_seed.values()))["compared"])[-1]
    domains = list(next(iter(by_seed.values()))["compared"][end]["speed 4"]["share"])
    rows = []
    for machine, label in _SHARES.items():
        for seed, found in by_seed.items():
            row = found["compared"][end][machine]
            cells = [_share(row["share"][domain]) for domain in domains]
            rows.append([label, seed, *cells, percent(row["share_of_mean_gain"])])
    return table(["at equal", "seed", *domains, "mean gain"], rows)


def _share(share: Iterable[float] | None) -> str:
    """Nothing where the pooled gain may be none."""
    if share is None:
        return ""
    value, low, high = share
    return percent_interval({"value": value, "low": low, "high": high})
