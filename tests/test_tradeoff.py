"""The front from records: who is on it, who is finished, what is said of it."""

import dataclasses

import pytest

from adasearch import report, report_front, report_html
from adasearch.config import Component, FinalizeConfig, TrialResult
from adasearch.errors import NoTrialError
from adasearch.finalists import finalists
from adasearch.records import Record, write_record
from adasearch.registry import NoOptions
from adasearch.sections import ObjectiveConfig
from adasearch.tradeoff import LOSSES, finished_first, lines, tradeoff
from tests.test_report import Balance
from tests.test_report import study as study_of

BOTH = ObjectiveConfig(search=("a",), also=("parameters", "latency"))
ONE = ObjectiveConfig(search=("a",), also=("parameters",))
# score, share of the parameters, share of the latency: a bend at trial 2, trial 4 is dominated, trial 5 stopped
TRIALS = [
    (0.10, 0.50, 0.55), (0.30, 0.60, 0.62), (0.45, 0.65, 0.70), (0.481, 0.80, 0.85), (0.44, 0.70, 0.75),
    (0.60, 0.50, 0.50), (0.50, 0.90, 0.88),
]  # fmt: skip
WANTED = FinalizeConfig(top=3, recovery=Component(type="none", options=NoOptions()))


def result_of(score, share, latency, *, stopped=False, stderr=0.01):
    return TrialResult(
        score=score, stderr=stderr, tasks=(), parameters=int(share * 1000), widths={}, items=9, stopped=stopped,
        seconds={"costs": 1.0}, peak_bytes=1, notes={},
        costs={"parameters": share * 1000, "latency": latency * 0.2, "memory": 3e6 * share},
        shares={"parameters": share, "latency": latency, "memory": share}, spreads={"latency": 0.01},
    )  # fmt: skip


def records_of(stderr=0.01):
    results = [result_of(*facts, stopped=n == 5, stderr=stderr) for n, facts in enumerate(TRIALS)]
    return [
        Record(number=n, attempt=1, recipe="flap" if n == 4 else None, config={"seed": n, "calibration": {}},
               result=result, failure=None, environment={})
        for n, result in enumerate(results)
    ]  # fmt: skip


DENSE = result_of(0.55, 1.0, 1.0)


def test_the_front_its_knee_and_the_cheapest_for_a_loss():
    found = tradeoff(BOTH, records_of(), dataclasses.replace(DENSE, score=0.54))
    assert found.numbers == (0, 1, 2, 3, 6)
    number, bend = found.knees["parameters"]
    assert (number, bend.clear) == (2, True)
    line = 0.10 + (0.65 - 0.5) / 0.4 * 0.40
    assert bend.gain == pytest.approx(0.45 - line)
    assert [(n, deal.allowed) for n, deal in found.bargains["parameters"]] == [(6, LOSSES[2])]
    assert "knee in parameters" in found.roles(2)
    assert found.against == "dense"
    near = tradeoff(BOTH, records_of(), None)
    assert [n for n, _ in near.bargains["parameters"]] == [6, 3, 2]
    assert near.against == "best"
    assert tradeoff(ObjectiveConfig(search=("a",)), records_of(), DENSE) is None


def test_a_knee_within_noise_says_so():
    text = "\n".join(lines(tradeoff(ONE, records_of(stderr=0.2), DENSE)))
    assert "the knee in parameters, trial 2, lies within the noise" in text
    assert "within the noise" not in "\n".join(lines(tradeoff(ONE, records_of(), DENSE)))


def test_finalists_are_the_knee_and_the_ends_then_what_adds_most():
    full = [r for r in records_of() if not r.result.stopped]
    assert [r.number for r in finished_first(ONE, full, 3)] == [2, 6, 0]
    assert [r.number for r in finished_first(ONE, full, 1)] == [2]
    assert {r.number for r in finished_first(ONE, full, 4)} == {0, 1, 2, 6}
    assert [r.number for r in finished_first(ONE, full, 9)][5:] == [4]
    assert finished_first(ObjectiveConfig(search=("a",)), full, 2) == full[:2]  # they come the best first


@pytest.mark.parametrize("also", [(), ("parameters",)])
def test_who_breaks_a_limit_is_never_a_finalist(also):
    objective = ObjectiveConfig(search=("a",), also=also, at_most={"parameters": 0.75, "latency": 0.72})
    tasks = finalists(records_of(), dataclasses.replace(WANTED, top=9), objective=objective)
    assert {t.trial for t in tasks if t.role != "dense"} == {0, 1, 2}
    hard = dataclasses.replace(objective, at_most={"latency": 0.1})
    with pytest.raises(NoTrialError, match=r"objective.at_most \(latency 0.1\)"):
        finalists(records_of(), WANTED, objective=hard)


def test_a_cost_that_is_not_known_breaks_its_limit():
    objective = ObjectiveConfig(search=("a",), at_most={"latency": 0.9, "memory": 0.5})
    assert objective.violations({"memory": 0.4}) == pytest.approx({"latency": 1.0, "memory": -0.1})
    assert not objective.admits({"memory": 0.4})
    assert objective.admits({"memory": 0.5, "latency": 0.9})


@pytest.fixture
def run(tmp_path):
    for record in records_of():
        write_record(tmp_path, record)
    dense = Record(number=-1, attempt=1, recipe=None, config=None, result=DENSE, failure=None, environment={})
    write_record(tmp_path, dense)
    return tmp_path


def test_the_report_shows_the_front_and_the_leaderboard_its_columns(run):
    objective = ObjectiveConfig(search=("a",), also=("parameters", "latency"), at_most={"memory": 0.85})
    study = study_of(objective=objective)
    page = report_html.page(report.gather(run, study), run)
    balance = Balance()
    balance.feed(page)
    text = "".join(balance.text)
    assert not balance.wrong
    assert "Knee in parameters: trial 2." in text
    assert "Trials beyond: 6." in text
    assert "No trial scores within 5 points" in text
    assert page.count('class="knee"><title>trial 2') == 2
    assert page.count('class="front"><title>') == 6
    table = report.leaderboard(run, study).set_index("trial")
    assert table.loc["dense", "latency"] == pytest.approx(0.2)
    assert table.loc["2", "latency_share"] == 0.70
    assert sorted(table.index[table["front"].eq(True)]) == ["0", "1", "2", "3"]
    assert sorted(table.index[table["admitted"].eq(False)]) == ["6"]
    assert "parameters_share" not in table


def test_a_study_of_one_objective_has_no_front(run):
    study = study_of()
    assert report_front.front_section(report.gather(run, study)) == ""
    assert list(report.leaderboard(run, study).columns) == list(report.COLUMNS)


def test_costs_are_shown_in_their_units():
    shown = [report_front.figure_of(*item) for item in (("parameters", 1.5e6), ("latency", 0.0123), ("memory", 2**21))]
    assert shown == ["1.50 M", "12.3 ms", "2.0 MiB"]
