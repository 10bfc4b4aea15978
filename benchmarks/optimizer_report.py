"""Tables and curves of recorded replays: what a choice is worth against trials and against cost. Pure.

Held-out values are put on a scale where 0 is the median random point and 1 the best point known. Letters: R runs
(one of each seed), X places on the axis of trials or of cost, cost being in whole trials without extra rungs.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Row = Mapping[str, Any]
Axis = Literal["trials", "cost"]
Group = tuple[str, int, str]

RESAMPLES = 1_000
BASES = ("tpe", "random")
TOLERANCE = 0.01
PER_TRIAL = 10  # places on the axis of cost for each whole trial
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#edae49", "#6a4c93", "#00798c", "#8d6a4f", "#444444", "#c77dff", "#7cb518")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Curves:
    """The runs of a sampler.

    Args:
        seeds: of the runs (R).
        trials: scaled held-out value of the choice after 1, 2, ... trials told (R x X).
        cost: the same after `PER_TRIAL`-ths of a whole trial of work (R x X).
        above: held-out value of the last choice less that of the best seed trial, scaled (R).
        asking: processor seconds of each proposal, recipes left out, over all runs.
        stopped: mean share of the trials that were stopped.
    """

    seeds: tuple[int, ...]
    trials: np.ndarray
    cost: np.ndarray
    above: np.ndarray
    asking: np.ndarray
    stopped: float

    def of(self, axis: Axis) -> np.ndarray:
        """Return the curves over an axis (R x X)."""
        return self.trials if axis == "trials" else self.cost


def steps(places: np.ndarray, values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the last of `values` (ascending `places`) at or before each place of the grid, 0 before the first."""
    index = np.searchsorted(places, grid, side="right") - 1
    return np.where(index >= 0, values[np.maximum(index, 0)], 0.0)


def curves_of(rows: Sequence[Row], which: str = "curve") -> Curves:
    """Return the runs of one sampler in one group, by seed."""
    rows = sorted(rows, key=lambda row: row["seed"])
    most = max(row["trials"] for row in rows)
    trials, cost, above = [], [], []
    for row in rows:
        low, high = row["scale"]
        count, _, spent, value = np.array(row[which], dtype=np.float64).T
        scaled = np.nan_to_num((value - low) / (high - low), nan=0.0)  # nothing to choose from is worth a random point
        trials.append(steps(count, scaled, np.arange(1, most + 1)))
        cost.append(steps(spent / row["unit"], scaled, np.arange(1, 2 * PER_TRIAL * most + 1) / PER_TRIAL))
        above.append(scaled[-1] - (max(row["seed_trials"]) - low) / (high - low))
    return Curves(
        seeds=tuple(row["seed"] for row in rows),
        trials=np.array(trials),
        cost=np.array(cost),
        above=np.array(above),
        asking=np.array([s for row in rows for s in row["asking"][len(_recipes(row)) :]]),
        stopped=float(np.mean([row["stopped"] / row["trials"] for row in rows])),
    )


def _recipes(row: Row) -> Sequence[float]:
    return row["seed_trials"] if "+seeds" in row["sampler"] else ()


def groups_of(rows: Sequence[Row]) -> dict[Group, dict[str, Curves]]:
    """Return the curves by problem, workers and order, then by sampler; ours chooses by posterior mean too."""
    found: dict[Group, dict[str, list[Row]]] = {}
    for row in {row_key(row): row for row in rows if "unavailable" not in row}.values():
        group = (row["problem"], row["workers"], row["order"])
        found.setdefault(group, {}).setdefault(row["sampler"], []).append(row)
    result: dict[Group, dict[str, Curves]] = {}
    for group, by_sampler in sorted(found.items()):
        result[group] = {}
        for sampler, its in by_sampler.items():
            result[group][sampler] = curves_of(its)
            for rule, label in (("posterior", "by posterior"), ("finalists", "by finalists")):
                if all(rule in row for row in its):
                    result[group][f"{sampler}, {label}"] = curves_of(its, rule)
    return result


def row_key(row: Row) -> tuple[Any, ...]:
    """Return what makes two recorded runs the same."""
    return tuple(row[name] for name in ("problem", "sampler", "workers", "order", "seed", "trials"))


def medians(curves: np.ndarray) -> np.ndarray:
    """Return the median over runs (... x R x X -> ... x X)."""
    return np.asarray(np.median(curves, axis=-2))


def reached(median: np.ndarray, level: np.ndarray) -> np.ndarray:
    """Return the place, from 1, from which on a curve (... x X) stays at `level` (...) or above, infinity for none.

    A dip of `TOLERANCE` does not count: what is chosen by noisy scores comes and goes.
    """
    there = median >= level[..., None] - TOLERANCE
    stays = np.flip(np.logical_and.accumulate(np.flip(there, -1), axis=-1), -1)
    return np.where(stays[..., -1], stays.argmax(-1) + 1.0, np.inf)


def saving(base: np.ndarray, other: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Return how many times less of the axis `other` takes to get where `base` gets in the end, and a 95 % interval.

    The level is the base's median over runs in the end; both are timed until their median gets there to
    stay, so that a base that stops improving early is credited with it. The interval is the percentile bootstrap over
    seeds, the same ones for both. 0 where `other` does not get there.

    Args:
        base: curves (R x X).
        other: of the same seeds.
        seed: of the resampling.
    """
    draws = np.random.default_rng(seed).integers(0, len(base), (RESAMPLES, len(base)))

    def ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        one, two = medians(a), medians(b)
        return np.asarray(reached(one, one[..., -1]) / reached(two, one[..., -1]))

    found = np.concatenate([ratio(base[part], other[part]) for part in np.split(draws, 10)])
    low, high = np.quantile(found, (0.025, 0.975))
    return float(ratio(base, other)), float(low), float(high)


def efficiency(alone: np.ndarray, many: np.ndarray) -> float:
    """Return what a trial with many workers is worth, in trials of one worker at the same level.

    The level is the lower one of what both have in the end; the figure is the trials that one worker needs for it over
    those that many need.
    """
    one, two = medians(alone), medians(many)
    level = np.asarray(min(one[-1], two[-1]))
    return float(reached(one, level) / reached(two, level))


def _shared(a: Curves, b: Curves, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    seeds = sorted(set(a.seeds) & set(b.seeds))
    return tuple(c.of(axis)[[c.seeds.index(s) for s in seeds]] for c in (a, b))  # type: ignore[return-value]


def _saved(found: Mapping[str, Curves], base: str, sampler: str, axis: Axis) -> tuple[float, float, float] | None:
    if base not in found or base == sampler or not set(found[base].seeds) & set(found[sampler].seeds):
        return None
    return saving(*_shared(found[base], found[sampler], axis))


def _cell(saved: tuple[float, float, float] | None) -> str:
    if saved is None:
        return "-"
    middle = "not reached" if saved[0] == 0 else f"{saved[0]:.1f}"
    return f"{middle} ({saved[1]:.1f} to {saved[2]:.1f})"


def group_table(group: Group, found: Mapping[str, Curves]) -> Iterator[str]:
    """Yield the lines of the table of one problem."""
    problem, workers, order = group
    counts = {len(curves.seeds) for curves in found.values()}
    runs = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{counts.pop()}"
    trials = next(iter(found.values())).trials.shape[1]
    yield f"**{problem}**, {workers} workers, told {order.replace('_', ' ')}, {trials} trials, {runs} seeds"
    yield ""
    yield ("| sampler | held-out at the end, median (quartiles) | trials of TPE / its own | cost of TPE / its own "
           "| trials of random / its own | cost of random / its own | over the best seed trial, median | below it "
           "| stopped | s per ask, median and 95 % |")  # fmt: skip
    yield "|" + "---|" * 10
    for sampler, curves in found.items():
        low, middle, high = np.quantile(curves.trials[:, -1], (0.25, 0.5, 0.75))
        saved = [_cell(_saved(found, base, sampler, axis)) for base in BASES for axis in ("trials", "cost")]
        asking = np.quantile(curves.asking, (0.5, 0.95)) if len(curves.asking) else (math.nan, math.nan)
        yield (
            f"| {sampler} | {middle:.2f} ({low:.2f} to {high:.2f}) | {' | '.join(saved)} "
            f"| {np.median(curves.above):+.2f} | {(curves.above < -1e-9).mean():.0%} "
            f"| {curves.stopped:.0%} | {asking[0]:.2f}, {asking[1]:.2f} |"
        )


def overall_table(groups: Mapping[Group, Mapping[str, Curves]]) -> Iterator[str]:
    """Yield the lines of the table of savings over all problems: geometric means of those that reach the level."""
    yield "| sampler | workers | problems | trials of TPE / its own | cost of TPE / its own | trials of random / its own | cost of random / its own |"  # fmt: skip  # noqa: E501
    yield "|---|---|---|---|---|---|---|"
    kinds = dict.fromkeys((s, workers, order) for (_, workers, order), found in groups.items() for s in found)
    for sampler, workers, order in kinds:
        mine = [f for (_, w, o), f in groups.items() if (w, o) == (workers, order) and sampler in f]
        cells = []
        for base in BASES:
            for axis in ("trials", "cost"):
                saved = [_saved(found, base, sampler, axis) for found in mine]
                ratios = [s[0] for s in saved if s is not None]
                good = [ratio for ratio in ratios if ratio > 0]
                mean = [f"{math.exp(float(np.mean(np.log(good)))):.2f}"] if good else []
                missed = len(ratios) - len(good)
                cells.append(", ".join(mean + ([f"{missed} not reached"] if missed else [])) or "-")
        yield f"| {sampler} | {workers}, {order.replace('_', ' ')} | {len(mine)} | {' | '.join(cells)} |"


def efficiency_table(groups: Mapping[Group, Mapping[str, Curves]]) -> Iterator[str]:
    """Yield the lines of the table of what a trial is worth with many workers; nothing where none were compared."""
    rows = []
    for (problem, workers, order), found in groups.items():
        for sampler, curves in found.items():
            alone = next((f for (p, w, o), f in groups.items() if (p, w, o) == (problem, 1, order)), {})
            if workers > 1 and sampler in alone:
                worth = efficiency(*_shared(alone[sampler], curves, "trials"))
                rows.append(f"| {problem} | {sampler} | {workers} | {order.replace('_', ' ')} | {worth:.2f} |")
    if rows:
        yield "| problem | sampler | workers | told | worth of a trial, in trials of one worker |"
        yield "|---|---|---|---|---|"
        yield from rows


def lead(found: Sequence[Mapping[str, Curves]], base: str, sampler: str) -> tuple[float, float, float] | None:
    """Return by how much the choice of a sampler is worth more than a base's in the end, and a 95 % interval.

    It is the mean over groups and seeds, paired by both, on the scale of held-out values; the interval is the
    percentile bootstrap over seeds. None where the two share no seed.

    Args:
        found: curves by sampler, of each group.
        base: what is compared with.
        sampler: what is compared.
    """
    both = [by for by in found if base in by and sampler in by]
    seeds = sorted(set.intersection(*(set(by[name].seeds) for by in both for name in (base, sampler)))) if both else []
    if not seeds or base == sampler:
        return None
    ends = [{name: dict(zip(by[name].seeds, by[name].trials[:, -1], strict=True)) for name in (base, sampler)}
            for by in both]  # fmt: skip
    gaps = np.array([np.mean([end[sampler][seed] - end[base][seed] for end in ends]) for seed in seeds])
    draws = np.random.default_rng(0).integers(0, len(gaps), (RESAMPLES, len(gaps)))
    low, high = np.quantile(gaps[draws].mean(1), (0.025, 0.975))
    return float(gaps.mean()), float(low), float(high)


def lead_table(groups: Mapping[Group, Mapping[str, Curves]]) -> Iterator[str]:
    """Yield the lines of the table of what the choices are worth more than those of TPE and of random search."""
    yield "| sampler | workers | problems | held-out in the end, less TPE's (95 %) | less that of random search |"
    yield "|---|---|---|---|---|"
    workers = sorted({group[1] for group in groups})
    for sampler in dict.fromkeys(s for found in groups.values() for s in found):
        for counts in [*([count] for count in workers), *([workers] if len(workers) > 1 else [])]:
            mine = [found for group, found in groups.items() if group[1] in counts and sampler in found]
            gaps = [lead(mine, base, sampler) for base in BASES]
            cells = ["-" if gap is None else "{:+.3f} ({:+.3f} to {:+.3f})".format(*gap) for gap in gaps]
            yield f"| {sampler} | {', '.join(map(str, counts))} | {len(mine)} | {' | '.join(cells)} |"


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the report's lines in Markdown."""
    for reason in sorted({row["unavailable"] for row in rows if "unavailable" in row}):
        yield f"left out: {reason}"
    groups = groups_of(rows)
    for group, found in groups.items():
        yield ""
        yield from group_table(group, found)
    if groups:
        yield ""
        yield from overall_table(groups)
        yield ""
        yield from lead_table(groups)
        yield ""
        yield from efficiency_table(groups)


def chart(rows: Sequence[Row], width: int = 560, height: int = 320) -> str:
    """Return an SVG with a panel for each problem, number of workers and order: medians over seeds against cost."""
    groups = groups_of(rows)
    names = list(dict.fromkeys(name for found in groups.values() for name in found))
    colour = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    columns = 2 if len(groups) > 1 else 1
    down = -(-len(groups) // columns)
    total = (columns * width, down * height + 22 * -(-len(names) // 3) + 16)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" font-family="sans-serif" '
        f'font-size="12"><rect width="100%" height="100%" fill="#ffffff"/>'
    ]
    for i, (group, found) in enumerate(groups.items()):
        body = _panel(group, found, colour, (width, height))
        parts.append(f'<g transform="translate({i % columns * width},{i // columns * height})">{body}</g>')
    for i, name in enumerate(names):
        x, y = 20 + (i % 3) * total[0] // 3, down * height + 14 + 22 * (i // 3)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 24}" y2="{y}" stroke="{colour[name]}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 30}" y="{y + 4}">{html.escape(name)}</text>')
    return "".join([*parts, "</svg>\n"])


def _panel(group: Group, found: Mapping[str, Curves], colour: Mapping[str, str], size: tuple[int, int]) -> str:
    left, top, right, bottom = 48, 26, size[0] - 14, size[1] - 40
    trials = next(iter(found.values())).trials.shape[1]
    shown = {name: np.median(curves.cost, axis=0)[: trials * PER_TRIAL] for name, curves in found.items()}
    low = min(0.0, *(float(line[PER_TRIAL:].min()) for line in shown.values()))

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / trials * (right - left), bottom - (y - low) / (1.05 - low) * (bottom - top)

    parts = [f'<text x="{left}" y="16" font-weight="bold">{html.escape(group[0])}, {group[1]} workers, '
             f'{html.escape(group[2].replace("_", " "))}</text>']  # fmt: skip
    for y in (0.0, 0.25, 0.5, 0.75, 1.0):
        at = place(0, y)[1]
        parts.append(f'<line x1="{left}" y1="{at:.1f}" x2="{right}" y2="{at:.1f}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in range(0, trials + 1, max(1, trials // 5)):
        parts.append(f'<text x="{place(x, 0)[0]:.1f}" y="{bottom + 16}" text-anchor="middle">{x}</text>')
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 32}" text-anchor="middle">cost, in whole trials; '
                 "held-out value of the choice: 0 median random point, 1 best known</text>")  # fmt: skip
    for name, line in shown.items():
        bends = [i for i in range(len(line)) if i in {0, len(line) - 1} or len(set(line[i - 1 : i + 2])) > 1]
        points = " ".join("{:.1f},{:.1f}".format(*place((i + 1) / PER_TRIAL, max(low, float(line[i])))) for i in bends)
        dash = ' stroke-dasharray="5 3"' if name.endswith("by posterior") else ""
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour[name]}" stroke-width="2"{dash}/>')
    return "".join(parts)
