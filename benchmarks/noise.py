"""How much of the difference between configurations a score shows, by metric and by what it is paired with.

    python -m benchmarks.noise benchmarks/smollm2_30.npz        # or the recorded lines, .jsonl

Model of an item value: v[i, k] = m + a[i] + b[k] + e[i, k] with a of N configurations, b of K items, e of both. All
configurations answer the same items, so b moves every score alike: it is in the standard error of a raw score and in
no comparison. Pairing takes it out: with the dense model (v - dense, which has an e of its own) or with the consensus
(v - mean over configurations). Pairing on all items does not change the order of the configurations; it changes what
is known of their distances, and the order where trials have answered different items.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from adasearch.report_rungs import spearman
from benchmarks.table import METRICS, Table, load_table, task_error, task_mean

RESAMPLES, HALVES = 2_000, 200
CHOICES, AMONG = 200, 40
PAIRINGS = ("raw", "dense", "consensus")
FEW = 8

Interval = tuple[float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Noise:
    """What a score says of the differences between configurations.

    Args:
        spread: standard deviation of the scores over configurations.
        true_spread: the same without what the items add to it, see `true_spread`.
        error: root mean square of the scores' standard errors.
        ratio: true spread over error, with the ends of its 95 % interval.
    """

    spread: float
    true_spread: float
    error: float
    ratio: Interval


def paired(values: np.ndarray, dense: np.ndarray, pairing: str) -> np.ndarray:
    """Return item values (N x K) less those that they are paired with.

    The consensus of configuration i is the mean over the other N - 1, so that none is compared with itself:
    v - (sum - v) / (N - 1) = (v - mean) N / (N - 1).

    Args:
        values: item values (N x K).
        dense: of the dense model (K).
        pairing: one of `PAIRINGS`.
    """
    if pairing == "dense":
        return values - dense
    if pairing == "consensus":
        return (values - values.mean(0)) * (len(values) / max(1, len(values) - 1))
    return values


def interaction_error(values: np.ndarray, of_task: np.ndarray) -> np.ndarray:
    """Return the standard error of each score that comes from e alone (N), common difficulty of items taken out.

    The residual v[i, k] - mean_i v[., k] has variance (1 - 1/N) var(e) over items; the factor is given back.
    """
    residual = (values - values.mean(0)) * np.sqrt(len(values) / max(1, len(values) - 1))
    return task_error(residual, of_task)


def true_spread(scores: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """Return sqrt(max(0, var(scores) - mean(errors^2))): the variance of scores is var(a) + var(e) / K.

    Args:
        scores: ... x N.
        errors: of the interaction (... x N); what all scores have in common adds nothing to their variance.
    """
    return np.sqrt(np.maximum(scores.var(-1, ddof=1) - (errors**2).mean(-1), 0.0))


def _interval(estimate: Callable[[np.ndarray], np.ndarray], count: int, seed: int) -> Interval:
    """Return an estimate over `count` configurations and its 95 % percentile bootstrap interval over them.

    Args:
        estimate: rows of configurations' numbers (R x N) -> figures (R).
        count: how many configurations.
        seed: of the resampling.
    """
    (found,) = estimate(np.arange(count)[None])
    draws = estimate(np.random.default_rng(seed).integers(0, count, (RESAMPLES, count)))
    low, high = np.nanquantile(draws, (0.025, 0.975)) if np.isfinite(draws).any() else (np.nan, np.nan)
    return float(found), float(low), float(high)


def noise(values: np.ndarray, dense: np.ndarray, of_task: np.ndarray, pairing: str, seed: int = 0) -> Noise:
    """Return the noise of a score; arguments as in `paired`, with the task of each item (K)."""
    scores = task_mean(values, of_task)
    errors = task_error(paired(values, dense, pairing), of_task)
    own = interaction_error(values, of_task)

    def ratio(rows: np.ndarray) -> np.ndarray:
        root = np.sqrt((errors[rows] ** 2).mean(-1))
        return true_spread(scores[rows], own[rows]) / np.where(root > 0, root, np.nan)

    return Noise(
        spread=float(scores.std(ddof=1)),
        true_spread=float(true_spread(scores, own)),
        error=float(np.sqrt((errors**2).mean())),
        ratio=_interval(ratio, len(scores), seed),
    )


def split_half(values: np.ndarray, of_task: np.ndarray, seed: int = 0, halves: int = HALVES) -> float:
    """Return how well a score on all items would agree with one on as many new ones of their kind, as Spearman's rho.

    Mean over random halves, drawn within tasks, of the correlation r between the scores on both, carried to the whole
    length by the prophecy formula 2 r / (1 + r) (Spearman 1910, Brown 1910).
    """
    rng = np.random.default_rng(seed)
    groups = [np.flatnonzero(of_task == task) for task in np.unique(of_task)]
    found = []
    for _ in range(halves):
        shuffled = [rng.permutation(group) for group in groups]
        parts = [np.concatenate([g[side * (len(g) // 2) :][: len(g) // 2] for g in shuffled]) for side in (0, 1)]
        one, other = (task_mean(values[:, part], of_task[part]) for part in parts)
        found.append(float(spearman(one, other)))
    r = float(np.nanmean(found)) if np.isfinite(found).any() else float("nan")
    return max(0.0, 2 * r / (1 + r))


def _shown(interval: Interval) -> str:
    return "{:+.2f} ({:+.2f} to {:+.2f})".format(*interval)


def noise_table(table: Table, role: str = "search") -> Iterator[str]:
    """Yield the lines of the table of spread against error."""
    items = len(table.of_task[role])
    yield f"{role} items: {items} of {', '.join(table.tasks[role])}; {len(table.points)} configurations"
    yield ""
    yield "| score | paired with | spread | true spread | standard error | true spread / error (95 %) |"
    yield "|---|---|---|---|---|---|"
    for metric in METRICS:
        for pairing in PAIRINGS:
            found = noise(table.values[role][metric], table.dense[role][metric], table.of_task[role], pairing)
            low, high = found.ratio[1:]
            yield (
                f"| {metric} | {pairing.replace('raw', '-')} | {found.spread:.4f} | {found.true_spread:.4f} "
                f"| {found.error:.4f} | {found.ratio[0]:.2f} ({low:.2f} to {high:.2f}) |"
            )


def ranking_table(table: Table) -> Iterator[str]:
    """Yield the lines of the table of how search scores rank configurations by their report scores.

    A ceiling is what a perfect agreement would come to at these numbers of items: sqrt of the product of both
    scores' split-half reliabilities (correction for attenuation, Spearman 1904).
    """
    kept = {(role, m): split_half(table.values[role][m], table.of_task[role]) for role in ("search", "report")
            for m in METRICS}  # fmt: skip
    yield "| search score | reliability | Spearman with report accuracy | ceiling | with report margin | ceiling |"
    yield "|---|---|---|---|---|---|"
    for metric in METRICS:
        cells = []
        for target in ("acc_norm", "margin"):
            mine, other = table.scores("search", metric), table.scores("report", target)
            interval = _interval(lambda rows, a=mine, b=other: spearman(a[rows], b[rows]), len(mine), 0)  # type: ignore[misc]
            cells.append(f"{_shown(interval)} | {np.sqrt(kept['search', metric] * kept['report', target]):.2f}")
        yield f"| {metric} | {kept['search', metric]:.2f} | {' | '.join(cells)} |"
    reliability = ", ".join(f"{m} {kept['report', m]:.2f}" for m in METRICS)
    yield ""
    yield f"Reliability of the report scores: {reliability}. Pairing on all items changes none of these orders."


def chosen(table: Table, seed: int = 0) -> dict[tuple[str, str], np.ndarray]:
    """Return which configurations searches would have chosen, by search metric and rule (`CHOICES` rows each).

    Each time `AMONG` configurations are drawn without repetition, and search items of each task with repetition, the
    same ones for all. ``score`` takes the best score, ``posterior`` the best mean of the search's model of the scores,
    which knows their paired errors.
    """
    from adasearch.search.surrogate import Observations, posterior
    from benchmarks.replayed import Replayed

    problem, rng = Replayed(table), np.random.default_rng(seed)
    features, of_task = np.array([problem.features(point) for point in table.points]), table.of_task["search"]
    groups = [np.flatnonzero(of_task == task) for task in np.unique(of_task)]
    found: dict[tuple[str, str], list[int]] = {(m, rule): [] for m in METRICS for rule in ("score", "posterior")}
    for _ in range(CHOICES):
        among = rng.choice(len(features), min(AMONG, len(features) // 2), replace=False)
        items = np.concatenate([rng.choice(group, len(group)) for group in groups])
        for metric in METRICS:
            values = table.values["search"][metric][np.ix_(among, items)]
            scores, errors = task_mean(values, of_task[items]), interaction_error(values, of_task[items])
            data = Observations(points=features[among], scores=scores, variances=errors**2,
                                pending=np.zeros((0, features.shape[1])), groups=problem.encoding.groups)  # fmt: skip
            means, _ = posterior(data, features[among])
            found[metric, "score"].append(int(among[scores.argmax()]))
            found[metric, "posterior"].append(int(among[means.argmax()]))
    return {key: np.array(rows) for key, rows in found.items()}


def choice_table(table: Table) -> Iterator[str]:
    """Yield the lines of the table of what a search would have got by each score and rule, on report items.

    In deviations over all configurations above their mean; the interval is over the draws of configurations and search
    items, and does not know how uncertain the report scores are.
    """
    targets = {metric: table.scores("report", metric) for metric in METRICS}
    yield f"| chosen of {min(AMONG, len(table.points) // 2)} by | {' | '.join(f'report {m}' for m in METRICS)} |"
    yield f"|---|{'---|' * len(METRICS)}"
    for (metric, rule), rows in chosen(table).items():
        cells = []
        for target in targets.values():
            z = ((target - target.mean()) / target.std())[rows]
            cells.append(f"{z.mean():+.2f} ± {1.96 * z.std(ddof=1) / len(z) ** 0.5:.2f}")
        yield f"| {metric}, {rule} | {' | '.join(cells)} |"


def merits(table: Table, metric: str = "margin") -> Iterator[tuple[str, np.ndarray, float, float]]:
    """Yield the rungs: name, merit of each trial (N, higher is better), own seconds, seconds until it is known."""
    mean = {phase: float(seconds.mean()) for phase, seconds in table.seconds.items()}
    values, of_task = table.values["search"][metric], table.of_task["search"]
    cut = mean["cut"]
    yield "divergence", -table.divergence[:, 0], mean["divergence"], cut + mean["divergence"]
    look = mean["recover_short"] + mean["midway"]
    yield "divergence midway", -table.midway[:, 0], mean["midway"], cut + look
    recovered = cut + mean["recover_short"] + mean["recover_rest"]
    for share in (0.3, 0.6, 1.0):
        first = np.concatenate([np.flatnonzero(of_task == t)[: round(share * (of_task == t).sum())]
                                for t in np.unique(of_task)])  # fmt: skip
        own = share * mean["search"]
        yield (
            f"recovered, {100 * share:.0f} % of items",
            task_mean(values[:, first], of_task[first]),
            own,
            recovered + own,
        )


def rung_table(table: Table, metric: str = "margin") -> Iterator[str]:
    """Yield the lines of the table of what each rung costs and how it ranks trials, all of them and the better half."""
    trial = sum(float(table.seconds[phase].mean()) for phase in ("cut", "recover_short", "recover_rest", "search"))
    report = table.scores("report", metric)
    better = np.flatnonzero(table.scores("search", metric) >= np.median(table.scores("search", metric)))
    yield f"A trial takes {trial:.1f} s of one thread: cut, recovery, search items."
    yield ""
    yield f"| {metric} | cost | known after | Spearman, search | Spearman, report | report, better half by search |"
    yield "|---|---|---|---|---|---|"
    for label, merit, own, known in merits(table, metric):
        columns = [(merit, table.scores("search", metric)), (merit, report), (merit[better], report[better])]
        found = [_shown(_interval(lambda rows, a=a, b=b: spearman(a[rows], b[rows]), len(a), 0)) for a, b in columns]  # type: ignore[misc]
        yield f"| {label} | {own / trial:.0%} | {known / trial:.0%} | {' | '.join(found)} |"


def main(argv: Sequence[str] | None = None) -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("table", type=Path, help="packed table (.npz) or recorded lines (.jsonl)")
    table = load_table(made.parse_args(argv).table)
    if len(table.points) < FEW:
        raise SystemExit(f"a spread needs {FEW} trials, the table has {len(table.points)}")
    for part in (noise_table(table), noise_table(table, "report"), ranking_table(table), choice_table(table),
                 rung_table(table)):  # fmt: skip
        print("\n".join(part), end="\n\n")


if __name__ == "__main__":
    main()
