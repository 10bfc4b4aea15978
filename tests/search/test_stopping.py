"""When a search ends early: the rules, and searches that end by each of them, go on, and end again alike."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasearch import run as run_module
from adasearch.config import TrialResult
from adasearch.records import DENSE, Record, write_json
from adasearch.search import belief, outcomes
from adasearch.search import study as study_module
from adasearch.search.executor import InProcessExecutor
from adasearch.search.outcomes import SearchClock, ending, read_ended, write_ended
from adasearch.search.stopping import Ended, reason, spent, summary
from adasearch.search.study import rebuild
from adasearch.sections import ClusterConfig, SamplerConfig, StoppingConfig
from tests.search.synthetic import Faults, Stop, ThreadExecutor, factory, make_space, make_study, search, table, told

pytestmark = pytest.mark.usefixtures("fakes")

GAINS = st.lists(st.none() | st.floats(0, 3), max_size=12)


def result(seconds, **notes):
    return TrialResult(
        score=0.5, stderr=0.1, tasks=(), parameters=1, widths={}, items=1, stopped=False, seconds=seconds,
        peak_bytes=1, notes=notes,
    )  # fmt: skip


def record(number, found):
    return Record(number=number, attempt=1, recipe=None, config=None, result=found, failure=None, environment={})


class TestRules:
    @given(st.floats(0, 1e6), st.floats(0, 1e6), GAINS)
    def test_without_a_rule_nothing_ends(self, seconds, cost, gains):
        assert reason(StoppingConfig(), seconds, cost, gains) is None

    @given(st.floats(0.1, 100), st.floats(0, 200))
    def test_time_and_cost_end_at_their_bound_and_not_before(self, bound, given_):
        assert (reason(StoppingConfig(seconds=bound), given_, 0.0, []) is not None) == (given_ >= bound)
        assert (reason(StoppingConfig(cost=bound), 0.0, given_, []) is not None) == (given_ >= bound)

    @given(GAINS, st.floats(0.01, 3), st.integers(1, 6))
    def test_gain_ends_exactly_where_the_last_ones_are_all_known_and_small(self, gains, least, patience):
        row = 0
        for gain in gains:
            row = row + 1 if gain is not None and gain < least else 0
        ended = reason(StoppingConfig(gain=least, patience=patience), 0.0, 0.0, gains)
        assert (ended is not None) == (row >= patience)

    def test_words(self):
        rule = StoppingConfig(gain=0.2, patience=5)
        why = reason(rule, 0.0, 0.0, [1.0, *[0.1] * 4, 0.002])
        assert why == "expected gain 0.002 is below 0.2 standard errors, as for 5 proposals in a row"
        ended = Ended(reason=why, asked=41, trials=60, rule=rule)
        assert summary(ended, 60) == f"the search ended after 41 of 60 trials: {why}"
        assert summary(None, 60) == "the search ran all 60 trials"

    def test_a_result_taken_from_another_trial_costs_nothing(self):
        found = [record(0, result({"cut": 1.0, "score": 2.0})), record(1, result({"cut": 9.0}, same_trial_as=0.0))]
        assert spent([*found, record(2, None)]) == 3.0

    def test_a_decision_stands_until_the_rule_or_the_trials_change(self):
        rule = StoppingConfig(cost=1.0)
        ended = Ended(reason="x", asked=3, trials=8, rule=rule)
        assert ended.stands(rule, 8)
        assert not ended.stands(rule, 9)
        assert not ended.stands(StoppingConfig(), 8)
        assert not Ended(reason="x", asked=3, trials=8, rule=rule, lifted=True).stands(rule, 8)


class TestOnDisk:
    def test_a_decision_is_read_back_and_a_damaged_one_is_none(self, tmp_path):
        assert read_ended(tmp_path) is None
        ended = Ended(reason="x", asked=3, trials=8, rule=StoppingConfig(gain=0.5))
        write_ended(tmp_path, ended)
        assert read_ended(tmp_path) == ended
        for text in ("{", "[]", '{"reason": 3}', ""):
            (tmp_path / "stopped.json").write_text(text)
            assert read_ended(tmp_path) is None

    def test_the_clock_counts_over_drivers(self, tmp_path, monkeypatch):
        now = [100.0]
        monkeypatch.setattr(outcomes.time, "monotonic", lambda: now[0])
        first = SearchClock(tmp_path)
        now[0] += 9.0
        first.keep()
        assert not (tmp_path / "clock.json").exists()
        now[0] += 2.0
        first.keep()
        now[0] += 5.0  # killed here: these are lost
        second = SearchClock(tmp_path)
        assert (second.seconds, second.here) == (11.0, 0.0)
        now[0] += 1.0
        second.keep(now=True)
        assert SearchClock(tmp_path).seconds == 12.0
        for text in ("", "{}", '{"seconds": NaN}', '{"seconds": -4}', '{"seconds": "x"}'):
            (tmp_path / "clock.json").write_text(text)
            assert SearchClock(tmp_path).seconds == 0.0


def numbers(found):
    return [r.number for r in found]


def gains_of(run, study):
    book = study_module.open_study(run, study, make_space(study))
    try:
        return [asked.gain for asked in book.trials()]
    finally:
        book.close()


def test_a_search_ends_by_cost_and_goes_on_with_another_rule(tmp_path, reference):
    study = make_study(stopping=StoppingConfig(cost=0.0105))  # 0.003 s a trial
    seen = []
    found = search(study, tmp_path, observer=seen.append)
    assert numbers(found) == [DENSE, 0, 1, 2, 3]
    assert told(tmp_path) == [(n, "COMPLETE") for n in range(4)]
    assert (seen[-1].total, seen[-1].done) == (4, 4)
    why = "the search ended after 4 of 8 trials: trials took 0 s of 0.0105 s"
    assert any(s.last == why for s in seen)
    assert ending(tmp_path, study, 4) == why
    assert ending(tmp_path, study, 3) == ""  # the last one is still running
    seen.clear()
    assert table(search(study, tmp_path, observer=seen.append)) == table(found)
    assert any(s.last == why for s in seen)
    assert table(search(make_study(), tmp_path)) == reference
    assert read_ended(tmp_path).lifted
    assert ending(tmp_path, make_study(), 8) == "the search ran all 8 trials"


def test_raising_the_trials_decides_anew(tmp_path):
    rule = StoppingConfig(cost=0.0105)
    assert len(search(make_study(stopping=rule), tmp_path)) == 5
    assert len(search(make_study(stopping=rule, trials=9), tmp_path)) == 5  # the cost is spent all the same
    assert read_ended(tmp_path).trials == 9


def test_a_search_ends_by_time_over_all_drivers(tmp_path):
    study = make_study(stopping=StoppingConfig(seconds=1000.0))
    write_json(tmp_path / "clock.json", {"seconds": 0.0})

    def observe(snapshot):
        if snapshot.done >= 3:
            raise Stop

    with pytest.raises(Stop):
        search(study, tmp_path, observer=observe)
    left = json.loads((tmp_path / "clock.json").read_text())["seconds"]
    assert 0 < left < 1000
    write_json(tmp_path / "clock.json", {"seconds": 1000.0})  # as if that driver had taken so long
    found = search(study, tmp_path)
    assert numbers(found) == [DENSE, 0, 1, 2, 3]  # the last one had been asked for
    assert " s of 1000 s are over" in read_ended(tmp_path).reason


def test_at_least_one_trial_is_run(tmp_path):
    assert numbers(search(make_study(stopping=StoppingConfig(seconds=1e-9)), tmp_path)) == [DENSE, 0]


BY_GAIN = {
    "sampler": SamplerConfig(type="random", startup=2),
    "stopping": StoppingConfig(gain=0.5, patience=2),
    "trials": 14,
}


@pytest.mark.parametrize("workers", [1, 3])
def test_a_search_ends_by_gain_alike_however_often_it_is_interrupted(tmp_path, monkeypatch, workers):
    """What is expected falls from trial to trial; the fourth and fifth model-based proposals are below the bound."""
    monkeypatch.setattr(study_module, "expected_gain", lambda space, trials, params: 4.0 / 2 ** len(trials) + 0.05)
    study = make_study(cluster=ClusterConfig(workers=workers), **BY_GAIN)

    def executor():
        return ThreadExecutor(factory(Faults(delay=0.01)), workers) if workers > 1 else InProcessExecutor(factory())

    whole = search(study, tmp_path / "whole", executor=executor())
    ended = read_ended(tmp_path / "whole")
    assert len(whole) == ended.asked + 1 < 15
    gains = [gain for gain in gains_of(tmp_path / "whole", study) if gain is not None]
    assert all(gain >= 0.5 for gain in gains[:-1])
    assert gains[-1] < 0.5  # one below the bound was run; the second in a row was not

    for limit in (2, 4, ended.asked - 1, ended.asked):

        def observe(snapshot, limit=limit):
            if snapshot.done >= limit:
                raise Stop

        with pytest.raises(Stop):
            search(study, tmp_path / "parts", executor=executor(), observer=observe)
    parts = search(study, tmp_path / "parts", executor=executor())
    assert table(parts) == table(whole)
    assert read_ended(tmp_path / "parts") == ended
    assert gains_of(tmp_path / "parts", study) == gains_of(tmp_path / "whole", study)


def test_gains_survive_a_rebuild_and_more_trials_begin_a_new_row(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "expected_gain", lambda space, trials, params: 0.1)
    study = make_study(**BY_GAIN)
    found = search(study, tmp_path)
    # two recipes and two random trials, then one proposal below the bound is run and the second is not
    assert numbers(found) == [DENSE, 0, 1, 2, 3, 4]
    before = gains_of(tmp_path, study)
    assert before == [None] * 4 + [0.1]
    rebuild(tmp_path, study, make_space(study))
    assert gains_of(tmp_path, study) == before
    assert table(search(study, tmp_path)) == table(found)
    more = search(make_study(**{**BY_GAIN, "trials": 20}), tmp_path)
    assert numbers(more) == [
        DENSE,
        *range(7),
    ]  # trial 5 begins with a clean slate, 6 is the first of a row, 7 the second
    assert table(more)[: len(found)] == table(found)


def test_a_real_model_ends_a_search_in_which_nothing_is_to_be_gained(tmp_path):
    """All trials score alike up to a small part of their standard error: the model sees that nothing is left."""
    study = make_study(
        sampler=SamplerConfig(type="random", startup=3), stopping=StoppingConfig(gain=0.5, patience=2), trials=30
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.search.synthetic.objective", lambda config: 0.5 + 1e-4 * (len(str(config)) % 7))
        found = search(study, tmp_path, executor=InProcessExecutor(factory(Faults(noise=0.0))))
    assert len(found) - 1 < 30
    ended = read_ended(tmp_path)
    assert "standard errors" in ended.reason
    assert ended.asked == len(found) - 1 >= belief.FEW_TRIALS


def test_status_says_how_it_ended(tmp_path, monkeypatch):
    study = make_study(stopping=StoppingConfig(cost=0.0105))
    search(study, tmp_path)
    monkeypatch.setattr(run_module, "load_run", lambda run: study)
    lines = list(run_module.status(tmp_path))
    assert lines[0].startswith("trials: 4 of 8 done")
    assert lines[1] == "the search ended after 4 of 8 trials: trials took 0 s of 0.0105 s"
