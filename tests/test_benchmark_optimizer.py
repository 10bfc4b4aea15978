"""Replaying optimizers: the packed table, the noise study, the problems, the virtual clock, the tables at the end."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from adasearch.report_rungs import spearman
from adasearch.search.outcomes import lag
from benchmarks import noise, optimizer, optimizer_report, recorded
from benchmarks.optimizer_report import Curves, lead
from benchmarks.problems import BUDGET, FORMS, MOST, Outcome, Phase, Problem, analytic, projected
from benchmarks.replayed import Replayed
from benchmarks.simulation import Halving, Progress, Replay, Setting, Stop, Told, chosen, predicted
from benchmarks.table import METRICS, PHASES, ROLES, load_table, pack, save_table, task_error, task_mean

# --- the table


def lines(points, seed=0, items=(3, 4)):
    """Recorded lines of made-up trials on two tasks."""
    rng = np.random.default_rng(seed)

    def values():
        found = {m: {t: rng.normal(size=n).tolist() for t, n in zip("ab", items, strict=True)} for m in METRICS}
        found["acc_norm"] = {t: [float(x > 0) for x in v] for t, v in found["acc_norm"].items()}
        return found

    yield {"point": None, "failure": None, **{role: values() for role in ROLES}}
    for point in points:
        yield {
            "point": point, "failure": None, "seconds": {phase: 1 + float(rng.random()) for phase in PHASES},
            "divergence": [1.5, 0.1], "midway": [float(rng.random()), 0.1], "losses": [3.0, 2.5],
            **{role: values() for role in ROLES},
        }  # fmt: skip


@pytest.fixture(scope="module")
def table():
    return pack(list(lines(recorded.points())))


def test_a_packed_table_is_read_as_it_was(tmp_path):
    points = list(itertools.islice(recorded.points(), 6))
    given = [*lines(points), {"point": {"importance": "flap"}, "failure": "no room"}]
    made = pack(given)
    path = tmp_path / "table.npz"
    save_table(made, path)
    read = load_table(path)
    assert sorted(map(str, read.points)) == sorted(map(str, points))
    assert read.points == made.points
    assert read.failed == (({"importance": "flap"}, "no room"),)
    assert read.tasks == dict.fromkeys(ROLES, ("a", "b"))
    by_point = {str(line["point"]): line for line in given}
    for row, point in enumerate(read.points):
        line = by_point[str(point)]
        for role, metric in itertools.product(ROLES, METRICS):
            whole = line[role][metric]["a"] + line[role][metric]["b"]
            assert read.values[role][metric][row] == pytest.approx(whole, abs=2e-3)
        assert read.midway[row].tolist() == pytest.approx(line["midway"])
        assert {p: s[row] for p, s in read.seconds.items()} == pytest.approx(line["seconds"])
        expected = np.mean([np.mean(line["search"]["margin"][t]) for t in "ab"])
        assert read.scores("search", "margin")[row] == pytest.approx(expected, abs=1e-3)
    assert set(np.unique(read.values["search"]["acc_norm"])) <= {0.0, 1.0}
    assert read.dense["report"]["margin"] == pytest.approx(made.dense["report"]["margin"], abs=2e-3)


def test_a_table_of_a_whole_grid_is_small(tmp_path):
    path = tmp_path / "table.npz"
    save_table(pack(list(lines(recorded.points(), items=(40, 40)))), path)
    assert path.stat().st_size < 400_000


def test_lines_about_other_items_are_refused():
    mixed = [*lines([{"a": 1}]), *list(lines([{"a": 2}], items=(3, 5)))[1:]]
    with pytest.raises(SystemExit, match="not about the same items"):
        pack(mixed)
    with pytest.raises(SystemExit, match="dense model"):
        pack(list(lines([{"a": 1}]))[1:])


# --- the noise study


def test_means_and_errors_weigh_tasks_the_same():
    values, of_task = np.array([1.0, 3.0, 10.0, 20.0, 60.0]), np.array([0, 0, 1, 1, 1])
    assert task_mean(values, of_task) == pytest.approx((2.0 + 30.0) / 2)
    by_hand = math.sqrt(np.var([1, 3], ddof=1) / 2 + np.var([10, 20, 60], ddof=1) / 3) / 2
    assert task_error(values, of_task) == pytest.approx(by_hand)


def test_the_consensus_leaves_the_configuration_itself_out():
    values = np.random.default_rng(0).normal(size=(5, 7))
    by_hand = [values[i] - np.delete(values, i, axis=0).mean(0) for i in range(5)]
    assert noise.paired(values, np.zeros(7), "consensus") == pytest.approx(np.array(by_hand))
    assert noise.paired(values, np.ones(7), "dense") == pytest.approx(values - 1)


def test_the_noise_of_a_known_model_is_found():
    rng = np.random.default_rng(1)
    a, b, e = 0.3, 2.0, 1.0
    configurations, items = 400, 100
    of_task = np.repeat([0, 1], items // 2)
    dense = rng.normal(size=items)
    common = b * rng.normal(size=items)
    values = a * rng.normal(size=(configurations, 1)) + common + e * rng.normal(size=(configurations, items))
    found = {p: noise.noise(values, dense + common, of_task, p) for p in noise.PAIRINGS}
    assert found["raw"].spread == pytest.approx(math.hypot(a, e / math.sqrt(items)), rel=0.1)
    assert found["raw"].error == pytest.approx(math.hypot(e, b) / math.sqrt(items), rel=0.15)
    assert found["consensus"].error == pytest.approx(e / math.sqrt(items), rel=0.05)
    assert found["dense"].error == pytest.approx(math.hypot(e, 1) / math.sqrt(items), rel=0.15)
    for each in found.values():
        assert each.true_spread == pytest.approx(a, rel=0.1)
        assert each.ratio[0] == pytest.approx(each.true_spread / each.error)
        assert each.ratio[1] < each.ratio[0] < each.ratio[2]


def test_split_halves_give_the_agreement_of_two_samples_of_items():
    rng = np.random.default_rng(2)
    truth = rng.normal(size=(300, 1))
    one, two = (truth + 5 * rng.normal(size=(300, 40)) for _ in range(2))
    of_task = np.repeat([0, 1], 20)
    measured = float(spearman(task_mean(one, of_task), task_mean(two, of_task)))
    assert noise.split_half(one, of_task, halves=40) == pytest.approx(measured, abs=0.08)


def test_the_study_prints_tables(table, tmp_path, capsys):
    save_table(table, tmp_path / "table.npz")
    noise.RESAMPLES, before = 50, noise.RESAMPLES
    try:
        noise.main([str(tmp_path / "table.npz")])
    finally:
        noise.RESAMPLES = before
    printed = capsys.readouterr().out
    assert "160 configurations" in printed
    assert all(f"| {metric} | consensus |" in printed for metric in METRICS)
    assert "| divergence midway |" in printed


# --- problems


def test_ratios_are_projected_onto_the_budget():
    rng = np.random.default_rng(3)
    for scale in (0.1, 1.0, 3.0):
        shape, weights = np.exp(scale * rng.normal(size=12)), rng.random(12)
        ratios = projected(shape, weights / weights.sum())
        assert ratios @ (weights / weights.sum()) == pytest.approx(BUDGET)
        assert ratios.max() <= MOST + 1e-9
        free = ratios < MOST - 1e-9
        assert np.ptp((ratios / shape)[free]) == pytest.approx(0.0, abs=1e-9)
        assert (shape[~free] >= shape[free].max()).all() if free.any() else True


@pytest.fixture(scope="module", params=["profile_5", "profile_12", "free_50"])
def made(request):
    return analytic(request.param)(3)


def test_a_made_up_model_repeats_itself_and_hides_what_does_not_count(made):
    again = analytic(made.name)(3)
    rng = np.random.default_rng(0)
    for params in made.sample(5):
        one, two = made.evaluate(params, 1), again.evaluate(params, 1)
        assert (one.score, one.phases) == (two.score, two.phases)
        assert made.evaluate(params, 2).score != one.score
        idle = {n: p.from_unit(rng.random()) for n, p in made.parameters.items() if n not in made.active(params)}
        assert made.evaluate({**params, **idle}, 1).score == one.score
    assert analytic(made.name)(4).held_out(params) != made.held_out(params)


def test_scores_scatter_about_what_a_configuration_is_worth(made):
    points = made.sample(150, seed=9)
    found = [made.evaluate(params, 0) for params in points]
    gaps = np.array([o.score - made.held_out(p) for o, p in zip(found, points, strict=True)])
    plain = np.mean([o.stderr for o in found])
    own = FORMS[made.name].noise * 0.03
    assert gaps.std() == pytest.approx(own, rel=0.25), "what differs between trials"
    assert plain > 1.6 * own, "a plain standard error holds what all trials share too"


def test_rungs_rank_as_they_were_measured_to(made):
    points = made.sample(200, seed=8)
    truth = np.array([made.held_out(p) for p in points])
    found = [{r.name: r for r in made.evaluate(p, 0).rungs} for p in points]
    for name, rank in {"divergence": 0.82, "unrecovered": 0.90}.items():
        assert float(spearman(truth, np.array([rungs[name].merit for rungs in found]))) == pytest.approx(rank, abs=0.1)
    last = [rungs["recovered_100"].merit for rungs in found]
    assert last == pytest.approx([made.evaluate(p, 0).score for p in points])


def test_recipes_are_decent_and_not_the_best(made):
    low, high = made.scale
    best = max(made.held_out(params) for params in made.recipes.values())
    assert low < best < high
    assert all(params.keys() == made.parameters.keys() for params in made.recipes.values())


def test_equal_ratios_are_best_where_all_layers_matter_alike():
    problem = analytic("free_50")(0)
    problem._truth._sensitivity = dict.fromkeys(problem._truth._sensitivity, np.ones(48))
    even = problem.recipes["flap"]
    others = [{**params, "importance": "flap", "compensation": "none"} for params in problem.sample(50)]
    assert problem.held_out(even) > max(map(problem.held_out, others))


def test_the_table_answers_with_recorded_trials(table):
    problem = Replayed(table, "acc_norm")
    point = {"importance": "taylor", "grain": "vector", "compensation": "none", "tilt": -0.5, "attention": 0.75}
    row = table.points.index(point)
    assert problem.row(point) == row
    assert problem.held_out(point) == table.scores("report", "acc_norm")[row]
    flap = {**point, "importance": "flap"}
    assert problem.row(flap) == problem.row({**flap, "grain": "element"})
    assert {problem.row(params) for params in problem.sample(3000)} == set(range(160))
    outcome = problem.evaluate(point, 4)
    seconds = sum(table.seconds[p][row] for p in ("cut", "recover_short", "recover_rest", "search"))
    assert outcome.seconds == pytest.approx(seconds)
    assert [rung.name for rung in outcome.rungs] == [
        "divergence", "midway", "recovered_30", "recovered_60", "recovered_100"]  # fmt: skip
    assert outcome.rungs[0].merit == -table.divergence[row, 0]
    whole = table.values["search"]["acc_norm"][row]
    assert set(outcome.items) <= set(whole)
    assert outcome.score == pytest.approx(task_mean(outcome.items, outcome.of_task))
    assert sorted(outcome.of_task) == sorted(table.of_task["search"])
    assert [problem.evaluate(point, seed).score for seed in range(6)] != [outcome.score] * 6


def test_a_point_that_is_not_recorded_is_answered_with_the_nearest():
    points = [p for p in recorded.points() if (p["tilt"], p["importance"]) == (0.0, "flap")]
    problem = Replayed(pack(list(lines(points))))
    asked = {"importance": "wanda_sp", "grain": "element", "compensation": "none", "tilt": 0.5, "attention": -1.5}
    assert problem.table.points[problem.row(asked)] == {**asked, "importance": "flap", "tilt": 0.0}


# --- the virtual clock


class Line(Problem):
    """Points 0, 1, 2, ... that take the seconds and give the scores that they are told to."""

    def __init__(self, seconds, scores=None, rungs=()):
        from adasearch.search.parameters import IntParameter

        super().__init__("line", {"x": IntParameter(low=0, high=99)}, {}, {"one": {"x": 90}, "two": {"x": 91}})
        self.given, self.scores, self.rungs = seconds, scores or {}, rungs

    def evaluate(self, params, seed):
        x = params["x"]
        whole, score = self.given.get(x, 1.0), self.scores.get(x, float(x))
        rungs = [Phase(name=name, seconds=1.0, merit=score, extra=True) for name in self.rungs]
        items = np.full(4, score)
        return Outcome(
            score=score, stderr=0.1, phases=(Phase(name="cut", seconds=0.0), *rungs, Phase(name="rest", seconds=whole)),
            items=items, of_task=np.array([0, 1, 0, 1]),
        )  # fmt: skip

    def held_out(self, params):
        return self.scores.get(params["x"], float(params["x"]))


class Counting:
    """Proposes 0, 1, 2, ... and writes down how much it had been told each time."""

    def __init__(self, points=None):
        self.points = points
        self.told = []
        self.seen = []

    def ask(self, number, recipe):
        self.seen.append(list(self.told))
        return dict(recipe) if recipe else {"x": self.points[number] if self.points else number}

    def tell(self, number, value, stderr, paired):
        self.told.append(number)


def test_four_workers_finish_in_the_order_of_their_seconds():
    book = Counting()
    problem = Line({0: 5.0, 1: 2.0, 2: 4.0, 3: 1.0, 4: 3.0, 5: 1.0})
    told = Replay(problem, book, Setting(workers=4, trials=6, seed=0, order="finished")).run()
    # worker 3 is free at 1 and takes trial 4 until 4, worker 1 at 2 and takes trial 5 until 3
    assert [(t.number, t.time) for t in told] == [(3, 1.0), (1, 2.0), (5, 3.0), (2, 4.0), (4, 4.0), (0, 5.0)]
    assert [t.cost for t in told] == [1.0, 3.0, 4.0, 8.0, 11.0, 16.0]
    assert book.seen == [[], [], [], [], [3], [3, 1]]


def test_one_worker_takes_the_sum():
    told = Replay(Line({0: 5.0, 1: 2.0}), Counting(), Setting(workers=1, trials=2, seed=0)).run()
    assert [(t.number, t.time, t.cost) for t in told] == [(0, 5.0, 5.0), (1, 7.0, 7.0)]


def test_in_order_a_proposal_knows_what_the_driver_lets_it_know():
    for workers in (1, 4):
        seconds = {x: 1.0 + (7 * x) % 5 for x in range(20)}
        book = Counting()
        told = Replay(Line(seconds), book, Setting(workers=workers, trials=20, seed=0)).run()
        assert [t.number for t in told] == list(range(20))
        assert [len(seen) for seen in book.seen] == [max(0, n - lag(workers) + 1) for n in range(20)]
        assert all(a.time <= b.time for a, b in itertools.pairwise(told))


def test_a_slow_trial_does_not_change_what_is_asked_in_order():
    seen = []
    for slow in (1.0, 30.0):
        book = Counting()
        Replay(Line({2: slow}), book, Setting(workers=4, trials=12, seed=0)).run()
        seen.append(book.seen)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("order", ["in_order", "finished"])
def test_an_equal_trial_takes_the_result_and_no_seconds(order):
    book = Counting([3, 3, 5, 3])
    told = Replay(Line({3: 4.0, 5: 1.0}), book, Setting(workers=2, trials=4, seed=0, order=order)).run()
    assert sorted(t.number for t in told) == [0, 1, 2, 3]
    assert [t.value for t in sorted(told, key=lambda t: t.number)] == [3.0, 3.0, 5.0, 3.0]
    assert told[-1].cost == 5.0


def test_recipes_come_first_and_are_never_stopped():
    class Severe:
        extra = frozenset({"early"})

        def __call__(self, history, progress, rung):
            assert rung == "early"
            assert progress.merits == {"early": self.merit(progress)}
            return Stop(value=-1.0, stderr=0.5)

        def merit(self, progress):
            return float(progress.params["x"])

    problem, setting = Line({}, rungs=("early",)), Setting(workers=1, trials=4, seed=0, recipes=True)
    told = Replay(problem, Counting(), setting, Severe()).run()
    assert [(t.params["x"], t.value, t.full, t.recipe) for t in told] == [
        (90, 90.0, True, True), (91, 91.0, True, True), (2, -1.0, False, False), (3, -1.0, False, False)]  # fmt: skip
    assert told[-1].cost == 2 * 2.0 + 2 * 1.0, "a stopped trial costs its rungs only"
    without = Replay(problem, Counting(), Setting(workers=1, trials=4, seed=0)).run()
    assert without[-1].cost == 4.0, "nobody asked for the rung"


def test_halving_lets_the_better_half_go_on():
    policy = Halving(("early",), eta=2.0, grace=4)
    history = [Progress(number=n, params={}, recipe=False, merits={"early": float(n)}, score=2.0 * n) for n in range(6)]
    late = Progress(number=9, params={}, recipe=False, merits={"early": 4.5})
    assert policy(history, late, "early") is None
    behind = Progress(number=9, params={}, recipe=False, merits={"early": 0.5})
    stop = policy(history, behind, "early")
    assert stop is not None
    assert (stop.value, stop.stderr) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-6))
    assert policy(history[:3], behind, "early") is None, "too few to compare with"
    assert policy(history, behind, "other") is None


def test_the_error_of_a_prediction_is_that_of_the_textbook():
    rng = np.random.default_rng(0)
    x = rng.normal(size=9)
    y = 2 * x + rng.normal(size=9)
    design = np.stack([np.ones(9), x], axis=1)
    beta, *_ = np.linalg.lstsq(design, y, rcond=None)
    s2 = float(((y - design @ beta) ** 2).sum()) / 7
    row = np.array([1.0, 0.7])
    stop = predicted(list(zip(x, y, strict=True)), 0.7)
    assert stop.value == pytest.approx(float(row @ beta))
    assert stop.stderr == pytest.approx(math.sqrt(s2 * (1 + row @ np.linalg.inv(design.T @ design) @ row)))


def test_the_choice_is_the_best_whole_trial():
    def told(value, *, full):
        return Told(number=0, params={}, value=value, stderr=0.1, paired=0.1, full=full, recipe=False, time=0, cost=0,
                    asking=0)  # fmt: skip

    assert chosen([told(1.0, full=True), told(9.0, full=False), told(2.0, full=True), told(2.0, full=True)]) == 2
    assert chosen([told(9.0, full=False)]) is None


# --- the sweep and its report


def run(**over):
    task = {"problem": "profile_5", "sampler": "random", "workers": 4, "order": "in_order", "seed": 0, "trials": 8}
    return optimizer.run(optimizer.Task(**{**task, **over}))


def test_a_run_repeats_itself_but_for_its_seconds():
    one, two = run(sampler="tpe+seeds"), run(sampler="tpe+seeds")
    assert {**one, "asking": 0} == {**two, "asking": 0}
    assert [row[0] for row in one["curve"]] == list(range(1, 9))
    problem = analytic("profile_5")(0)
    first = next(iter(problem.recipes.values()))
    assert one["curve"][0][3] == problem.held_out(first)
    assert one["values"][0] == problem.evaluate(first, 0).score


def test_the_lead_is_paired_by_seed_and_group():
    def made(seeds, ends):
        flat = np.repeat(np.array(ends, dtype=float)[:, None], 3, axis=1)
        return Curves(seeds=seeds, trials=flat, cost=flat, above=flat[:, 0], asking=np.array([]), stopped=0.0)

    one = {"tpe": made((0, 1, 2), (0.1, 0.5, 0.9)), "x": made((2, 1, 0), (1.0, 0.6, 0.2)), "y": made((7,), (1.0,))}
    other = {"tpe": made((0, 1, 2), (0.0, 0.0, 0.0)), "x": made((0, 1, 2), (0.3, 0.3, 0.3))}
    assert lead([one], "tpe", "x") == pytest.approx((0.1, 0.1, 0.1))
    assert lead([one, other], "tpe", "x") == pytest.approx((0.2, 0.2, 0.2))
    assert lead([one], "tpe", "y") is None, "no seed is shared"
    assert lead([one], "tpe", "tpe") is None
    assert lead([other], "random", "x") is None
    wide = {"tpe": made((0, 1), (0.0, 0.0)), "x": made((0, 1), (0.0, 1.0))}
    assert lead([wide], "tpe", "x") == pytest.approx((0.5, 0.0, 1.0))


def test_our_sampler_plays_and_chooses_by_posterior_mean_too():
    row = run(sampler="botorch+seeds", trials=9, workers=1)
    assert [place[0] for place in row["posterior"]] == [5, 9]
    assert all(math.isfinite(place[3]) for place in row["posterior"])


def test_what_is_not_there_is_said(tmp_path):
    row = run(sampler="tpe+seeds+gates")
    assert "unavailable" not in row or "gates" in row["unavailable"]
    with pytest.raises(SystemExit, match="--table"):
        run(problem="table_margin")


def test_the_sweep_goes_on_where_it_was(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(optimizer, "sweep", lambda todo, path, jobs: ran.append(list(todo)))
    out = tmp_path / "sweep.jsonl"
    command = ["--out", str(out), "--problems", "profile_5", "--samplers", "random", "tpe", "--seeds", "2"]
    optimizer.main(command)
    first = ran[0]
    assert [(t.seed, t.sampler) for t in first] == [(0, "random"), (0, "tpe"), (1, "random"), (1, "tpe")]
    out.write_text("".join(optimizer.json.dumps(row_of(t)) + "\n" for t in first[:3]) + '{"torn')
    optimizer.main(command)
    assert ran[1] == first[3:]


def row_of(task, values=(0.4, 0.5)):
    curve = [[i + 1, float(i), 10.0 * (i + 1), value] for i, value in enumerate(values)]
    return {
        **optimizer.asdict(task), "scale": [0.4, 0.6], "unit": 10.0, "seed_trials": [0.45], "curve": curve,
        "values": list(values), "asking": [0.1] * len(values), "stopped": 0, "repeated": 0,
    }  # fmt: skip


def sweep(samplers, seeds=4, workers=(4,)):
    """Rows of made-up runs: by sampler, the held-out value of the choice after each trial told."""
    for seed, (name, values), number in itertools.product(range(seeds), samplers.items(), workers):
        task = optimizer.Task(
            problem="p", sampler=name, workers=number, order="in_order", seed=seed, trials=len(values)
        )
        yield row_of(task, values)


def test_savings_are_counted_to_the_level_that_the_base_comes_to():
    slow, fast = np.array([[0.0, 0.1, 0.2, 0.3, 0.3]]), np.array([[0.0, 0.3, 0.295, 0.4, 0.4]])
    both = np.repeat(slow, 3, 0), np.repeat(fast, 3, 0)
    assert optimizer_report.saving(*both) == (2.0, 2.0, 2.0), "the base is there after 4 trials, the other after 2"
    assert optimizer_report.saving(*both[::-1]) == (0.0, 0.0, 0.0), "never there"
    dipped = np.repeat(np.array([[0.0, 0.3, 0.2, 0.2, 0.3]]), 3, 0)
    assert optimizer_report.saving(both[0], dipped)[0] == 4 / 5, "what is lost again does not count"
    assert optimizer_report.efficiency(fast[0:1], slow[0:1]) == pytest.approx(2 / 4)


def test_steps_hold_their_value_until_the_next():
    found = optimizer_report.steps(np.array([1.0, 2.5]), np.array([5.0, 7.0]), np.array([0.5, 1.0, 2.0, 3.0]))
    assert found.tolist() == [0.0, 5.0, 5.0, 7.0]


def test_the_report_holds_every_sampler_and_the_chart_draws_it():
    values = {"random": [0.4, 0.41, 0.42, 0.44], "tpe": [0.4, 0.44, 0.44, 0.5], "x": [0.4, 0.5, 0.5, 0.5]}
    rows = list(sweep(values, workers=(1, 4)))
    rows.append({**rows[0], "sampler": "gates", "unavailable": "gates: no module"})
    printed = list(optimizer_report.tables(rows))
    assert printed[0] == "left out: gates: no module"
    row, other = [line for line in printed if line.startswith("| x | 0.50")]
    assert row == other, "four workers are told the same here"
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == "2.0 (2.0 to 2.0)", "tpe is at its 0.5 after 4 trials, x after 2"
    assert cells[4] == "2.0 (2.0 to 2.0)", "random is at 0.44 after 4 trials"
    assert cells[6] == "+0.25"
    assert "| p | x | 4 | in order | 1.00 |" in printed
    picture = optimizer_report.chart(rows)
    assert picture.count("<polyline") == 6
    import xml.etree.ElementTree as ElementTree

    ElementTree.fromstring(picture)


def test_gates_stop_what_promises_little():
    pytest.importorskip("adasearch.promotion")
    from benchmarks.gates import Gates

    policy = Gates(control=0.0)
    problem, setting = analytic("profile_12")(0), Setting(workers=1, trials=40, seed=0)
    points = problem.sample(40, seed=4)

    class Drawn(Counting):
        def ask(self, number, recipe):
            return points[number]

    told = Replay(problem, Drawn(), setting, policy).run()
    stopped = [t for t in told if not t.full]
    assert len(stopped) > 5
    assert all(t.full for t in told[:8]), "nothing is known yet"
    worth = {flag: np.mean([problem.held_out(t.params) for t in told if t.full == flag]) for flag in (True, False)}
    assert worth[True] > worth[False]
    assert told[-1].cost < Replay(problem, Drawn(), setting).run()[-1].cost
