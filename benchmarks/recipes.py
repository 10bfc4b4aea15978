"""Published recipes beside each other: what comparing them costs, and whether their order holds.

    python -m benchmarks.recipes --cost --threads 2
    python -m benchmarks.recipes --leaderboard --out runs/recipes --items 100 --tokens 8192 --workers 2
    python -m benchmarks.recipes --leaderboard --out runs/recipes --recipes flap,wanda_sp --budgets 0.2 --items 24

`--cost` makes and scores every recipe without recovery, in this process and with empty caches, and gives the seconds of
each step and their ratio to scoring and perplexity alone. `--leaderboard` is one `adasearch compare` for each budget,
without recovery and with the same short LoRA, in folders below `--out`; the same command goes on where it was. Then
come scores and perplexities of 128-token windows before and after the recovery, and how well orders agree (Spearman).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from adasearch.comparison import tasks_of, with_recipes
from adasearch.config import SpaceConfig, StudyConfig, TrialConfig, load_study, merged
from adasearch.documents import plain
from adasearch.errors import AdaSearchError, TrialError
from adasearch.report_rungs import spearman

STEPS = {"calibrate": "calibrate", "plan": "plan", "cut": "cut", "report": "scoring", "perplexity": "perplexity"}
ALONE = ("report", "perplexity")
BUDGETS = (0.10, 0.20, 0.35, 0.50)
BEFORE, AFTER = "none", "lora"
WINDOW = 128
FEW = 4
NOTHING = "-"

Seconds = Mapping[str, float]
Row = Mapping[str, str]
Boards = Mapping[tuple[float, str], Mapping[str, Row]]
"""Rows of ``leaderboard.csv`` by recipe, by budget and recovery."""


def _line(cells: Sequence[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    return [_line(head), f"|{'---|' * len(head)}", *map(_line, rows)]


def cost_table(found: Mapping[str, Seconds]) -> list[str]:
    """Return the seconds of each step by recipe, and their sum, in Markdown; the dense model is no part of the sum.

    The ratio is that of all seconds to those of scoring and perplexity alone.
    """
    names = sorted({phase for seconds in found.values() for phase in seconds})
    recipes = [seconds for name, seconds in found.items() if name != "dense"]
    total = {phase: sum(seconds.get(phase, 0.0) for seconds in recipes) for phase in names}
    rows = []
    for name, seconds in {**found, f"all {len(recipes)} recipes": total}.items():
        whole, alone = sum(seconds.values()), sum(seconds.get(phase, 0.0) for phase in ALONE)
        ratio = f"{whole / alone:.2f}" if alone else NOTHING
        rows.append([name, *(f"{seconds.get(phase, 0.0):.2f}" for phase in STEPS), f"{whole:.2f}", ratio])
    return _table(["recipe", *STEPS.values(), "total", "ratio"], rows)


def read_board(path: Path) -> dict[str, Row]:
    """Return the rows of a ``leaderboard.csv`` by recipe, the dense model among them."""
    with path.open(newline="", encoding="utf-8") as file:
        return {row["recipe"]: row for row in csv.DictReader(file)}


def number(row: Row | None, column: str) -> float:
    """Return what a row says, nan where it says nothing; ``perplexity`` is that of the first corpus."""
    if row is not None and column == "perplexity":
        column = next((key for key in row if key.startswith("perplexity ") and key.endswith(f"@{WINDOW}")), column)
    text = (row or {}).get(column, "")
    return float(text) if text else math.nan


def _pair(boards: Boards, budget: float, name: str, column: str, form: str, scale: float = 1.0) -> str:
    figures = [number(boards.get((budget, recovery), {}).get(name), column) for recovery in (BEFORE, AFTER)]
    texts = [NOTHING if math.isnan(x) else format(scale * x, form) for x in figures]
    return NOTHING if set(texts) == {NOTHING} else " → ".join(texts)


def _place(boards: Boards, name: str) -> tuple[float, str]:
    """Return the mean rank of a recipe after recovery (before it, where there is none), and its name."""
    for wanted in (AFTER, BEFORE):
        ranks = [number(board.get(name), "rank") for (_, recovery), board in boards.items() if recovery == wanted]
        ranks = [rank for rank in ranks if not math.isnan(rank)]
        if ranks:
            return (sum(ranks) / len(ranks), name)
    return (math.inf, name)


def leaderboard_table(boards: Boards) -> list[str]:
    """Return recipes x budgets in Markdown: score in percent, perplexity and rank, before → after recovery.

    The dense model comes first, then the recipes by their mean rank after recovery.
    """
    budgets = sorted({budget for budget, _ in boards})
    names = {name for board in boards.values() for name in board}
    order = [*(["dense"] if "dense" in names else []), *sorted(names - {"dense"}, key=lambda n: _place(boards, n))]
    head = ["recipe", *(f"{what} {100 * b:g} %" for b in budgets for what in ("score", "perplexity", "rank"))]
    rows = [
        [
            name,
            *itertools.chain.from_iterable(
                (
                    _pair(boards, budget, name, "score", ".1f", 100.0),
                    _pair(boards, budget, name, "perplexity", ".1f"),
                    _pair(boards, budget, name, "rank", ".0f"),
                )
                for budget in budgets
            ),
        ]
        for name in order
    ]
    return _table(head, rows)


def agreement(one: Mapping[str, Row], two: Mapping[str, Row], column: str) -> tuple[float, int]:
    """Return Spearman's correlation of a column over the recipes that both boards have a figure for, and their number.

    nan for fewer than `FEW` recipes.
    """
    shared = [name for name in one if name in two and name != "dense"]
    pairs = [(number(one[name], column), number(two[name], column)) for name in shared]
    sound = [pair for pair in pairs if not any(map(math.isnan, pair))]
    if len(sound) < FEW:
        return math.nan, len(sound)
    a, b = np.array(sound).T
    return float(spearman(a, b)), len(sound)


def correlations(boards: Boards) -> list[str]:
    """Return how well the orders of recipes agree, between budgets and before and after recovery, in Markdown."""
    titles = {BEFORE: "before", AFTER: "after"}
    names = {key: f"{100 * key[0]:g} % {titles[key[1]]}" for key in sorted(boards)}
    pairs = [(a, b) for a, b in itertools.combinations(names, 2) if a[0] == b[0] or a[1] == b[1]]
    rows = []
    for a, b in sorted(pairs, key=lambda pair: (pair[0][0] == pair[1][0], pair)):
        found = [agreement(boards[a], boards[b], column) for column in ("score", "perplexity")]
        texts = [NOTHING if math.isnan(value) else f"{value:+.2f}" for value, _ in found]
        rows.append([names[a], names[b], found[0][1], *texts])
    return _table(["order", "beside", "recipes", "Spearman, score", "Spearman, perplexity"], rows)


def setting(args: argparse.Namespace, remove: float, recovery: str) -> StudyConfig:
    """Return the study of one comparison: model, corpora and tasks of the study file, cut to the time there is."""
    study = load_study(args.study)
    given = TrialConfig.from_dict(study.trial, "trial").recovery.to_dict()
    lora = {**(given if given["type"] == AFTER else {"type": AFTER}), "tokens": args.tokens}
    report = dataclasses.replace(
        study.report, items=args.items, perplexity_tokens=args.perplexity_tokens, windows=(WINDOW,)
    )
    return dataclasses.replace(
        study,
        name=f"recipes-{round(1000 * remove):03d}-{recovery}",
        # nothing is searched, and a space of the study may ask for a recovery
        space=SpaceConfig(name="inline", dimensions={"importance": {"choice": ["random", "wanda_sp"]}}),
        budget=dataclasses.replace(study.budget, remove=remove),
        trial=merged(study.trial, {"recovery": lora if recovery == AFTER else {"type": "none"}}),
        report=report,
        recipes={},
        all_recipes=False,
        cluster=dataclasses.replace(study.cluster, workers=args.workers or "auto"),
    )


def cost(args: argparse.Namespace) -> dict[str, Seconds]:
    """Return the seconds of each step, by recipe, with empty caches and one worker in this process."""
    from adasearch.finalize import run_final
    from adasearch.workbench import Workbench
    from benchmarks.setting import empty_run

    study = with_recipes(setting(args, args.budgets[0], BEFORE), args.recipes, args.study)
    found: dict[str, Seconds] = {}
    with empty_run() as folder:
        bench = Workbench(study, folder, args.threads)
        for task in tasks_of(study):
            try:
                found[task.title] = run_final(task, bench).seconds
                print(f"{task.title}: {sum(found[task.title].values()):.1f} s", flush=True)
            except TrialError as error:
                print(f"{task.title}: {error}", flush=True)
    return found


def compare(args: argparse.Namespace) -> dict[tuple[float, str], dict[str, Row]]:
    """Make the comparisons that are not made yet, and return their leaderboards."""
    from adasearch.run import compare_study

    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("ADASEARCH_CACHE", str((args.out / "cache").resolve()))  # statistics are those of one model
    boards = {}
    for remove, recovery in itertools.product(args.budgets, (BEFORE, AFTER)):
        study = setting(args, remove, recovery)
        path = args.out / f"{study.name}.yaml"
        path.write_text(yaml.safe_dump(plain(study.to_dict()), sort_keys=False, allow_unicode=True), encoding="utf-8")
        run = compare_study(path, recipes=args.recipes, out=args.out / study.name, say=print)
        boards[remove, recovery] = read_board(run / "leaderboard.csv")
    return boards


def tables(boards: Boards) -> Iterator[str]:
    """Yield what the leaderboards say."""
    yield from leaderboard_table(boards)
    yield ""
    yield from correlations(boards)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--cost", action="store_true", help="seconds of each step by recipe")
    what.add_argument("--leaderboard", action="store_true", help="scores and orders by budget and recovery")
    add("--study", type=Path, default=Path("studies/quickstart.yaml"), help="model, corpora and tasks come from it")
    add("--recipes", type=_names, help="names, a comma between them (default: all)")
    add("--budgets", type=_numbers, help="fractions removed (default: 0.2 for --cost, else 0.1,0.2,0.35,0.5)")
    add("--items", type=int, default=100, help="report items of each task (default: 100)")
    add("--tokens", type=int, default=8192, help="of the recovery (default: 8192)")
    add("--perplexity-tokens", type=int, default=8192, help="of each corpus (default: 8192)")
    add("--workers", type=int, help="of the comparisons (default: as the machine allows)")
    add("--threads", type=int, default=os.cpu_count() or 1, help="of --cost (default: all cores)")
    add("--out", type=Path, default=Path("runs/recipes"), help="folder of the comparisons (default: runs/recipes)")
    return made


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.budgets = args.budgets or ([0.2] if args.cost else list(BUDGETS))
    try:
        found = cost_table(cost(args)) if args.cost else list(tables(compare(args)))
    except AdaSearchError as error:
        raise SystemExit(f"{error}") from error
    for line in found:
        print(line)


if __name__ == "__main__":
    main()
