"""Which recipes a search begins with."""

from __future__ import annotations

import dataclasses

import pytest

from adasearch.search.seeds import decided, find_seeds
from tests.search.synthetic import make_space, make_study, search, told

pytestmark = pytest.mark.usefixtures("fakes")

POINTS = {f"taylor_{rank}": {"importance": "taylor", "recovery": {"type": "lora", "rank": rank}} for rank in (4, 8, 16)}
OPEN = {"plain": {"importance": "taylor"}, "again": {"importance": {"type": "taylor"}}, **POINTS,
        "elsewhere": {"allocation": "uniform"}}  # fmt: skip


def seeds_of(**changes):
    study = make_study(**{"recipes": OPEN, "all_recipes": True, **changes})
    return find_seeds(study, make_space(study))


def test_all_points_run_once_and_the_others_say_why_not():
    found = seeds_of(trials=20)
    assert found.names == ("plain", *POINTS)
    assert found.same == {"again": "plain"}
    assert found.waiting == ()
    assert list(found.unexpressed) == ["elsewhere"]
    assert found.summary().startswith(
        "5 of 6 recipes are points of the space; the same trials as others: again (plain)"
    )
    assert "not expressible: elsewhere (allocation.type" in found.summary()


@pytest.mark.parametrize(("trials", "names"), [(1, ()), (2, ("plain",)), (7, ("plain", "taylor_4", "taylor_8"))])
def test_recipes_left_open_take_at_most_half_of_the_trials(trials, names):
    found = seeds_of(trials=trials)
    assert found.names == names
    assert found.waiting == ("plain", *POINTS)[len(names) :]
    assert "seeds take at most half of the trials: " in found.summary()


def test_named_recipes_take_as_many_trials_as_there_are():
    found = seeds_of(trials=3, all_recipes=False)
    assert found.names == ("plain", "taylor_4", "taylor_8")
    assert [line.split(":")[0] for line in found.lines()] == [
        "recipe elsewhere is not in the space and is left out",
        "recipe again is the same trial as recipe plain and is left out",
    ]


def test_deciding_names_what_runs_and_changes_nothing_that_was_named():
    study = make_study(recipes=OPEN, all_recipes=True, trials=4)
    named = decided(study, make_space(study))
    assert (list(named.recipes), named.all_recipes) == (["plain", "taylor_4"], False)
    assert decided(named, make_space(named)) is named
    more = dataclasses.replace(named, trials=40)
    assert find_seeds(more, make_space(more)).names == ("plain", "taylor_4")


def test_a_long_list_is_cut_short():
    many = {f"elsewhere_{i}": {"allocation": "uniform"} for i in range(5)}
    assert seeds_of(recipes=many).summary().endswith(" and 2 more")


def test_seeds_are_the_first_trials_and_are_scored_in_full(tmp_path):
    study = make_study(recipes=OPEN, all_recipes=True, trials=6)
    found = search(study, tmp_path)
    assert [r.recipe for r in found[1:]] == ["plain", "taylor_4", "taylor_8", None, None, None]
    assert len(told(tmp_path)) == 6
