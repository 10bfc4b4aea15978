"""The pure parts of `benchmarks/recipes.py`: tables and rank correlations from rows of leaderboards."""

from __future__ import annotations

import csv
import math

import pytest

from benchmarks.recipes import AFTER, BEFORE, agreement, correlations, cost_table, leaderboard_table, parser, read_board

COLUMNS = ("rank", "recipe", "score", "perplexity pydoc@128", "perplexity pydoc@2048")


def board(scores, failed=()):
    """Rows with these scores, best first, and perplexities that rise as scores fall; `failed` have none."""
    ranked = sorted(scores, key=lambda name: -scores[name])
    rows = {"dense": ["", "dense", "0.9", "10", "5"]}
    rows |= {
        name: [str(rank), name, str(scores[name]), str(100 - 10 * scores[name]), "7"]
        for rank, name in enumerate(ranked, start=1)
    }
    rows |= {name: ["", name, "", "", ""] for name in failed}
    return {name: dict(zip(COLUMNS, row, strict=True)) for name, row in rows.items()}


ONE = {"a": 0.5, "b": 0.4, "c": 0.3, "d": 0.2, "e": 0.1}
SWAPPED = {"a": 0.5, "b": 0.3, "c": 0.4, "d": 0.2, "e": 0.1}
BOARDS = {
    (0.2, BEFORE): board(ONE),
    (0.2, AFTER): board(SWAPPED),
    (0.5, BEFORE): board({name: -score for name, score in ONE.items()}, failed=["f"]),
}


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_leaderboard_is_read_by_recipe(tmp_path):
    path = tmp_path / "leaderboard.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(BOARDS[0.2, BEFORE].values())
    assert read_board(path) == BOARDS[0.2, BEFORE]


def test_the_table_holds_before_and_after_by_budget():
    head, rule, *rows = map(cells, leaderboard_table(BOARDS))
    assert head == [
        "recipe",
        "score 20 %",
        "perplexity 20 %",
        "rank 20 %",
        "score 50 %",
        "perplexity 50 %",
        "rank 50 %",
    ]
    assert len(rule) == len(head)
    assert [row[0] for row in rows] == ["dense", "a", "c", "b", "d", "e", "f"], "by the rank after recovery"
    assert rows[0] == ["dense", "90.0 → 90.0", "10.0 → 10.0", "-", "90.0 → -", "10.0 → -", "-"]
    assert rows[2] == ["c", "30.0 → 40.0", "97.0 → 96.0", "3 → 2", "-30.0 → -", "103.0 → -", "3 → -"]
    assert rows[-1][1:] == ["-"] * 6


def test_spearman_is_that_of_ranks_over_shared_recipes():
    assert agreement(BOARDS[0.2, BEFORE], BOARDS[0.2, AFTER], "score") == (pytest.approx(0.9), 5)  # 1 - 6*2/(5*24)
    assert agreement(BOARDS[0.2, BEFORE], BOARDS[0.5, BEFORE], "perplexity") == (pytest.approx(-1.0), 5)
    few, count = agreement(board({"a": 1, "b": 2, "c": 3}), board(ONE), "score")
    assert math.isnan(few)
    assert count == 3


def test_correlations_are_between_budgets_and_across_recovery():
    _, _, *rows = map(cells, correlations(BOARDS))
    assert rows == [
        ["20 % before", "50 % before", "5", "-1.00", "-1.00"],
        ["20 % after", "20 % before", "5", "+0.90", "+0.90"],
    ]


def test_the_cost_is_related_to_scoring_and_perplexity_alone():
    found = {
        "dense": {"report": 4.0, "perplexity": 1.0},
        "a": {"calibrate": 3.0, "plan": 0.5, "cut": 0.5, "recover": 0.0, "report": 3.0, "perplexity": 1.0},
        "b": {"calibrate": 0.0, "plan": 0.5, "cut": 0.5, "recover": 1.0, "report": 3.0, "perplexity": 1.0},
    }
    head, _, dense, one, _, total = map(cells, cost_table(found))
    assert head == ["recipe", "calibrate", "plan", "cut", "scoring", "perplexity", "total", "ratio"]
    assert dense[-2:] == ["5.00", "1.00"]
    assert one == ["a", "3.00", "0.50", "0.50", "3.00", "1.00", "8.00", "2.00"]
    assert total == ["all 2 recipes", "3.00", "1.00", "1.00", "6.00", "2.00", "14.00", "1.75"]


def test_the_command_line_is_read():
    args = parser().parse_args(["--leaderboard", "--recipes", "flap, random", "--budgets", "0.1,0.5"])
    assert (args.recipes, args.budgets) == (["flap", "random"], [0.1, 0.5])
