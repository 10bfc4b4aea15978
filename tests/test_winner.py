"""Which finalist is the best: the formula by hand, its limits, and what it is worth."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasearch import finalize
from adasearch.config import Component, FinalizeConfig, TrialResult
from adasearch.errors import NoTrialError
from adasearch.finalists import finalists
from adasearch.finalize import judge
from adasearch.pruning.structure import WHOLE
from adasearch.records import DENSE, Evidence, FinalRecord, Record, ranked_finals, read_finals, write_final, write_items
from adasearch.registry import NoOptions
from adasearch.sections import ObjectiveConfig
from adasearch.trial import Clock
from adasearch.tuning.evaluation import item_values
from adasearch.tuning.items import Item
from adasearch.winner import SELECT, merits


def known(mean, sd):
    return Evidence(score=mean, stderr=0.1, mean=mean, sd=sd)


def items_of(*rows, task="t"):
    return [{task: np.array(row, dtype=float)} for row in rows]


class TestMerits:
    def test_by_hand(self):
        items = items_of([1, 0, 1, 1], [0, 1, 1, 0])
        # select 0.75 and 0.5; differences to the mean item by item are +-(.5, -.5, 0, .5) with variance .2292
        fresh = np.var([0.5, -0.5, 0, 0.5], ddof=1) / 4 * 2
        offset = 0.625 - 0.45
        share = fresh / (fresh + 0.2**2)
        expected = [
            share * (0.4 + offset) + (1 - share) * 0.75,
            share * (0.5 + offset) + (1 - share) * 0.5,
        ]
        assert merits([known(0.4, 0.2), known(0.5, 0.2)], items) == pytest.approx(expected)

    @given(st.integers(0, 10**6), st.floats(-3, 3))
    def test_differences_alone_count(self, seed, shift):
        """Another level of the search scores, or items that are easier for all, change no difference."""
        rng = np.random.default_rng(seed)
        means, rows, ease = rng.normal(size=3), rng.normal(size=(3, 20)), rng.normal(size=20)
        plain = merits([known(m, 0.3) for m in means], items_of(*rows))
        moved = merits([known(m + shift, 0.3) for m in means], items_of(*(rows + ease)))
        assert np.diff(moved) == pytest.approx(np.diff(plain), abs=1e-9)

    @given(st.integers(0, 10**6))
    def test_lies_between_its_two_sources(self, seed):
        rng = np.random.default_rng(seed)
        means, rows = rng.normal(size=4), rng.normal(size=(4, 10))
        found = np.array(
            merits([known(m, s) for m, s in zip(means, rng.random(4) + 0.01, strict=True)], items_of(*rows))
        )
        select = rows.mean(axis=1)
        believed = means + np.mean(select - means)
        assert (found >= np.minimum(select, believed) - 1e-12).all()
        assert (found <= np.maximum(select, believed) + 1e-12).all()

    def test_the_surer_one_has_the_say(self):
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(2, 50))
        select = rows.mean(axis=1)
        sure = merits([known(1.0, 1e-6), known(2.0, 1e-6)], items_of(*rows))
        assert sure[1] - sure[0] == pytest.approx(1.0, abs=1e-6)
        vague = merits([known(1.0, 1e6), known(2.0, 1e6)], items_of(*rows))
        assert vague == pytest.approx(list(select), abs=1e-6)

    def test_the_select_score_alone_where_there_is_no_posterior(self):
        items = items_of([1, 0], [1, 1])
        for pieces in ([None, None], [known(9.0, 0.1), None], [known(9.0, 0.1), Evidence(score=0.1, stderr=0.1)]):
            assert merits(pieces, items) == [0.5, 1.0]
        assert merits([known(9.0, 0.1)], items[:1]) == [0.5]
        assert merits([], []) == []
        assert merits([known(1.0, 0.0), known(2.0, 0.0)], items_of([1, 1], [1, 1])) == [1.0, 1.0]

    def test_tasks_weigh_the_same(self):
        items = [{"a": np.ones(2), "b": np.zeros(30)}, {"a": np.zeros(2), "b": np.zeros(30)}]
        assert merits([None, None], items) == [0.5, 0.0]

    def test_other_items_are_refused(self):
        with pytest.raises(ValueError, match="same select items"):
            merits([None, None], [{"a": np.ones(2)}, {"a": np.ones(3)}])
        with pytest.raises(ValueError, match="same select items"):
            merits([None], [{}])

    def test_both_together_choose_better_than_either(self):
        """2000 finals of three finalists: the weighed choice is truly better than that by search or select alone."""
        rng = np.random.default_rng(3)
        lost = {"search": 0.0, "select": 0.0, "merit": 0.0}
        for _ in range(2000):
            truth = rng.normal(scale=0.02, size=3)
            believed = truth + rng.normal(scale=0.02, size=3)
            rows = truth[:, None] + rng.normal(scale=0.2, size=100) + rng.normal(scale=0.2, size=(3, 100))
            found = merits([known(m, 0.02) for m in believed], items_of(*rows))
            for name, figures in (("search", believed), ("select", rows.mean(axis=1)), ("merit", found)):
                lost[name] += truth.max() - truth[int(np.argmax(figures))]
        assert lost["merit"] < 0.85 * min(lost["search"], lost["select"])


def trial(number, score, *, recipe=None, stopped=False, config=None):
    found = TrialResult(
        score=score, stderr=0.02, tasks=(), parameters=8, widths={}, items=9, stopped=stopped, seconds={}, peak_bytes=0,
        notes={},
    )  # fmt: skip
    return Record(
        number=number, attempt=1, recipe=recipe, config=config or {"n": number}, result=found, failure=None,
        environment={},
    )  # fmt: skip


WANTED = FinalizeConfig(top=2, recovery=Component(type="none", options=NoOptions()))


class TestFinalists:
    def test_are_the_best_by_posterior_mean_and_the_best_recipe(self):
        records = [trial(DENSE, 0.9), *(trial(n, s) for n, s in enumerate([0.5, 0.8, 0.6, 0.7]))]
        records += [trial(4, 0.3, recipe="a"), trial(5, 0.4, recipe="b"), trial(6, 0.99, stopped=True)]
        means = {0: 0.60, 1: 0.55, 2: 0.61, 3: 0.5, 4: 0.45, 5: 0.4, 6: 0.9}
        pieces = {n: Evidence(score=0.5, stderr=0.02, mean=m, sd=0.01) for n, m in means.items()}
        tasks = finalists(records, WANTED, pieces)
        assert [(t.trial, t.role) for t in tasks] == [(DENSE, "dense"), (2, "finalist"), (0, "finalist"), (4, "recipe")]
        assert tasks[1].search == pieces[2]
        assert tasks[0].search is None
        observed = finalists(records, WANTED)
        assert [t.trial for t in observed] == [DENSE, 1, 3, 5]

    def test_equal_configurations_count_once_and_a_recipe_among_the_best_stays_a_finalist(self):
        records = [trial(0, 0.5, recipe="a"), trial(1, 0.7), trial(2, 0.7, config={"n": 1}), trial(3, 0.6)]
        assert [(t.trial, t.role) for t in finalists(records, WANTED)][1:] == [
            (1, "finalist"),
            (3, "finalist"),
            (0, "recipe"),
        ]
        assert [t.trial for t in finalists(records[:2], WANTED)][1:] == [1, 0]

    def test_trials_that_differ_in_their_recovery_alone_are_one_and_the_recipe_if_it_is_among_them(self):
        ranks = {n: {"importance": "flap", "recovery": {"type": "lora", "rank": n}} for n in (4, 8)}
        records = [trial(0, 0.7, config=ranks[4]), trial(1, 0.5, recipe="flap", config=ranks[8]), trial(2, 0.6)]
        assert [(t.trial, t.recipe) for t in finalists(records, WANTED)][1:] == [(1, "flap"), (2, None)]
        assert [t.trial for t in finalists([records[0], trial(3, 0.8, config=ranks[8])], WANTED)][1:] == [3]

    def test_none_in_full_is_an_error(self):
        with pytest.raises(NoTrialError, match="no trial was scored in full"):
            finalists([trial(DENSE, 0.5), trial(0, 0.5, stopped=True)], WANTED)


def final(run, number, role, values, piece=None):
    record = FinalRecord(
        name=f"trial{number}", trial=number, role=role, recipe=None, selected=(), report=(), perplexity={},
        parameters=8, removed=0.2, seconds={}, export=None, losses=(), search=piece,
    )  # fmt: skip
    write_final(run, record)
    write_items(run / "final" / record.name, {f"t/x{SELECT}": np.array(values), "t/x#acc": np.ones(3)})


def test_finalists_are_judged_from_their_records(tmp_path):
    final(tmp_path, 0, "finalist", [1.0, 0.0, 0.2])
    final(tmp_path, 1, "finalist", [0.9, 0.1, 0.3])
    final(tmp_path, 2, "recipe", [0.0, 0.0, 0.1])
    pieces = {n: known(m, 0.05) for n, m in enumerate([0.9, 0.5, 0.4])}
    judge(tmp_path, pieces)
    found = read_finals(tmp_path)
    items = items_of([1.0, 0.0, 0.2], [0.9, 0.1, 0.3], [0.0, 0.0, 0.1])
    assert [r.merit for r in found] == pytest.approx(merits([pieces[n] for n in range(3)], items))
    assert [r.search for r in found] == [pieces[n] for n in range(3)]
    assert [r.trial for r in ranked_finals(found, "margin")] == [0, 1, 2]  # by select alone it is 1, 0, 2
    judge(tmp_path, {n: Evidence(score=0.5, stderr=0.1) for n in range(3)})
    assert [r.trial for r in ranked_finals(read_finals(tmp_path), "margin")] == [1, 0, 2]


ITEMS = tuple(
    Item(task="t/x", id=str(i), contexts=("c",), choices=(" a", " bc"), gold=0, lengths=(1, 2)) for i in range(4)
)
MODELS = {
    "bold": [[0.0, -18.0]] * 3 + [[-18.0, 0.0]],  # right and sure of it three times, once as sure and wrong
    "shy": [[-1.0, -3.0]] * 3 + [[-1.0, -1.9]],  # never sure; wrong once, and per character alone
    "lucky": [[-1.0, -2.2]] * 4,  # right by a little, and per character always
}


@pytest.mark.parametrize(
    ("metric", "expected"), [("margin", "bold"), ("log_score", "shy"), ("acc", "shy"), ("acc_norm", "lucky")]
)
def test_finalists_are_compared_by_the_metric_of_the_study(tmp_path, monkeypatch, metric, expected):
    """From log-likelihoods to ranks, with merits and without."""
    tasks = {"t/x": SimpleNamespace(items=ITEMS, encoded=())}
    study = SimpleNamespace(objective=ObjectiveConfig(search=("t/x",), metric=metric))
    bench = SimpleNamespace(study=study, items=lambda _role, _outline: tasks)
    for number, (name, logliks) in enumerate(MODELS.items()):
        logliks = [np.array(x) for x in logliks]
        monkeypatch.setattr(finalize, "score_blocks", lambda _model, _blocks, found=logliks: {"t/x": found})
        scores, items = finalize._score(
            None, finalize.FinalTask(name=name, trial=0, role="finalist"), bench, Clock(), WHOLE
        )
        values = item_values(ITEMS, logliks, metric)
        assert items[f"t/x{SELECT}"].tolist() == items["t/x"].tolist() == values.tolist()
        assert items["t/x#acc"].tolist() == item_values(ITEMS, logliks, "acc_norm").tolist()
        final(tmp_path, number, "finalist", [])
        (record,) = (r for r in read_finals(tmp_path) if r.trial == number)
        write_final(tmp_path, dataclasses.replace(record, selected=scores["select"]))
        write_items(tmp_path / "final" / record.name, items)
    plain = ranked_finals(read_finals(tmp_path), metric)
    judge(tmp_path, {})
    judged = ranked_finals(read_finals(tmp_path), metric)
    assert [r.trial for r in judged] == [r.trial for r in plain]
    assert list(MODELS)[judged[0].trial] == expected
    assert [r.merit for r in judged] == pytest.approx([r.selected[0].of(metric)[0] for r in judged])


def test_finals_without_select_items_are_left_as_they_are(tmp_path):
    final(tmp_path, 0, "finalist", [1.0, 0.0])
    write_items(tmp_path / "final" / "trial0", {"t/x#acc": np.ones(3)})
    judge(tmp_path, {})
    assert read_finals(tmp_path)[0].merit is None
    first, second = (dataclasses.replace(read_finals(tmp_path)[0], trial=n, merit=m) for n, m in ((0, 0.1), (1, 0.3)))
    assert [r.trial for r in ranked_finals([first, second], "margin")] == [1, 0]
