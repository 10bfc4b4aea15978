"""The gates of a trial: their arithmetic against its definition, their laws, and what they save in simulation."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats

from adasearch import promotion
from adasearch.promotion import Gate, Told, gates
from adasearch.racing import FidelityConfig

VALUE, HALVING = FidelityConfig(stop="value"), FidelityConfig(stop="halving", eta=3.0)
SPENT = {"divergence": 0.3, "midway": 0.62}
LEFT = {kind: 1 - spent for kind, spent in SPENT.items()}


def trial(score: float, merits: dict[str, float], *, full: bool = True, measured: bool = True) -> Told:
    return Told(score=score, measured=measured, full=full, merits=merits, left=LEFT)


def landscape(rng: np.random.Generator, n: int, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return score, divergence after the cut and midway of n configurations, some of them far worse than the rest."""
    quality = rng.normal(0, 1, n) - (rng.random(n) < 0.15) * rng.exponential(2, n)
    first = np.exp(-0.5 * (quality + 0.75 * noise * rng.normal(0, 1, n)))
    second = 0.6 * np.exp(-0.5 * (quality + 0.5 * noise * rng.normal(0, 1, n)))
    return 0.3 + 0.05 * quality + 0.01 * rng.normal(0, 1, n), first, second


def history(rng: np.random.Generator, n: int = 20, noise: float = 1.0) -> list[Told]:
    return [
        trial(float(y), {"divergence": -float(a), "midway": -float(b)})
        for y, a, b in zip(*landscape(rng, n, noise), strict=True)
    ]


class TestArithmetic:
    def test_the_fit_is_that_of_least_squares(self):
        rng = np.random.default_rng(0)
        x = rng.normal(2, 1, 12)
        y = 0.3 * x + rng.normal(0, 0.1, 12)
        fit, known = promotion.fitted(x, y), stats.linregress(x, y)
        assert (fit.slope, fit.slope_stderr) == (pytest.approx(known.slope), pytest.approx(known.stderr))
        assert fit.at(2.5) == pytest.approx(known.intercept + 2.5 * known.slope)
        assert promotion.rises(fit) == (known.pvalue / 2 < 0.025)

    def test_the_prediction_covers_new_scores_as_often_as_it_says(self):
        """The interval of Student's t around the prediction, at a merit drawn anew, holds 90 % of the scores."""
        rng, inside = np.random.default_rng(1), 0
        for _ in range(3000):
            x = rng.normal(0, 1, 11)
            y = 0.2 + 0.1 * x + rng.normal(0, 0.05, 11)
            fit = promotion.fitted(x[:10], y[:10])
            gate = Gate(kind="unrecovered", least=0.0, fit=dataclasses.replace(fit, lowest=-99.0))
            mean, error = gate.predict(float(x[10]))
            inside += abs(y[10] - mean) < stats.t.ppf(0.95, gate.fit.freedom) * error
        assert inside / 3000 == pytest.approx(0.9, abs=3 * math.sqrt(0.09 / 3000))

    @pytest.mark.parametrize(
        ("mean", "scale", "freedom"), [(0.2, 0.1, 6), (0.6, 0.1, 6), (-1.0, 0.3, 30), (0.5, 2.0, 2)]
    )
    def test_the_expected_gain_is_its_integral(self, mean, scale, freedom):
        law = stats.t(freedom, mean, scale)
        known, _ = integrate.quad(lambda y: (y - 0.5) * law.pdf(y), 0.5, np.inf)
        assert promotion.expected_gain(mean, scale, freedom, 0.5) == pytest.approx(known, rel=1e-5)

    @given(
        st.floats(-2, 2), st.floats(0, 2), st.floats(1e-6, 2), st.integers(2, 60), st.floats(-1, 1)
    )  # fmt: skip
    def test_the_expected_gain_rises_with_the_mean(self, mean, more, scale, freedom, best):
        low, high = (promotion.expected_gain(m, scale, freedom, best) for m in (mean, mean + more))
        assert high >= low * (1 - 1e-9) - 1e-12
        assert low >= max(mean - best, 0.0) - 1e-12

    @given(st.sampled_from(promotion.ORDER), st.floats(1e-6, 1e3), st.floats(1e-6, 1e3))
    def test_the_transform_keeps_the_order_and_can_be_undone(self, kind, a, b):
        x, y = (promotion.transformed(kind, -value) for value in (a, b))
        assert (x > y) == (-a > -b) or math.isclose(x, y, abs_tol=1e-12)
        assert promotion.merit_of(kind, x) == pytest.approx(-a)

    def test_no_divergence_at_all_is_as_good_as_can_be(self):
        best = promotion.transformed("divergence", 0.0)
        assert best == promotion.transformed("midway", 1e-12)
        assert best > promotion.transformed("divergence", -1e-6)


class TestValue:
    @given(st.integers(0, 10_000), st.integers(8, 40))
    def test_the_gate_parts_what_is_worth_the_rest_from_what_is_not(self, seed, n):
        """Found by bisection, it agrees with the rule evaluated at any merit; the first rung is held to its mean."""
        told = history(np.random.default_rng(seed), n)
        found = {gate.kind: gate for gate in gates(told, VALUE)}
        best = max(t.score for t in told)
        rows = {kind: np.array([promotion.transformed(kind, t.merits[kind]) for t in told]) for kind in SPENT}
        fits = {kind: promotion.fitted(x, np.array([t.score for t in told])) for kind, x in rows.items()}
        rising = [kind for kind in SPENT if promotion.rises(fits[kind])]

        def promise(kind, x):
            fit = fits[kind]
            return promotion.expected_gain(fit.at(x), fit.scale, fit.freedom, best)

        assert set(found) <= set(rising)
        for kind in rising:
            fresh = np.mean([promise(rising[0], x) for x in rows[rising[0]][-promotion.RECENT :]])
            wanted = VALUE.threshold * round(LEFT[kind], 1) * fresh
            for x in np.linspace(rows[kind].min() - 1, rows[kind].max() + 1, 23):
                merit = promotion.merit_of(kind, x)
                stopped = kind in found and merit < found[kind].least
                assert stopped == (promise(kind, x) < wanted) or promise(kind, x) == pytest.approx(wanted, rel=1e-6)

    def test_a_history_of_use_makes_gates_in_the_order_of_a_trial(self):
        found = gates(history(np.random.default_rng(2), 30), VALUE)
        assert [gate.kind for gate in found] == ["divergence", "midway"]
        assert all(gate.stops for gate in found)
        assert not any(gate.stops for gate in gates(history(np.random.default_rng(2), 30), VALUE, stops=False))

    @given(st.integers(0, 10_000), st.floats(0.2, 5.0), st.sampled_from([VALUE, HALVING]))
    def test_what_is_expected_to_be_far_better_than_the_best_goes_on(self, seed, ahead, rules):
        told = history(np.random.default_rng(seed))
        best = max(t.score for t in told)
        for gate in gates(told, rules):
            if gate.fit.slope > 0:
                x = gate.fit.center + (best + ahead - gate.fit.intercept) / gate.fit.slope
                x = max(x, *(promotion.transformed(gate.kind, t.merits[gate.kind]) for t in told))
                assert promotion.merit_of(gate.kind, x) >= gate.least

    @pytest.mark.parametrize("rules", [VALUE, HALVING])
    def test_a_short_history_asks_nothing(self, rules):
        told = history(np.random.default_rng(3), 40)
        assert gates(told[:7], rules) == ()
        unmeasured = [dataclasses.replace(t, measured=False, full=False) for t in told[7:]]
        assert gates(told[:7] + unmeasured, rules) == ()
        assert gates([], rules) == ()
        assert gates(told, FidelityConfig(stop="none")) == ()
        assert gates([trial(0.3, {}) for _ in told], rules) == ()

    @pytest.mark.parametrize("rules", [VALUE, HALVING])
    def test_equal_merits_ask_nothing(self, rules):
        rng = np.random.default_rng(4)
        assert gates([trial(float(y), {"divergence": -0.5}) for y in rng.random(20)], rules) == ()

    def test_a_rung_that_says_nothing_or_the_contrary_asks_nothing(self):
        rng = np.random.default_rng(5)
        told = [trial(float(y), {"divergence": -float(d)}) for y, d in zip(rng.random(30), np.arange(30), strict=True)]
        contrary = [dataclasses.replace(t, score=-t.merits["divergence"]) for t in told]
        equal = [dataclasses.replace(t, score=0.5) for t in told]
        found = [gates(h, VALUE) for h in (contrary, equal)]
        assert found == [(), ()]
        asked = 0
        for seed in range(400):
            shuffled = np.random.default_rng(seed).permutation([t.score for t in told])
            asked += bool(
                gates([dataclasses.replace(t, score=float(y)) for t, y in zip(told, shuffled, strict=True)], VALUE)
            )
        assert asked / 400 < 0.025 + 3 * math.sqrt(0.025 * 0.975 / 400)

    def test_the_gates_follow_from_the_history_alone(self):
        told = history(np.random.default_rng(6), 25)
        assert gates(told, VALUE) == gates(list(told), VALUE)
        slower = [dataclasses.replace(t, left={k: v + 0.02 for k, v in t.left.items()}) for t in told]
        assert gates(slower, VALUE) == gates(told, VALUE)  # a clock that is a little off rarely changes anything

    def test_less_left_and_a_lower_threshold_ask_for_less(self):
        told = history(np.random.default_rng(7), 40)
        nearer = [dataclasses.replace(t, left=dict.fromkeys(LEFT, 0.2)) for t in told]
        lenient = dataclasses.replace(VALUE, threshold=0.2)
        found = [{g.kind: g.least for g in gates(h, r)} for h, r in ((nearer, VALUE), (told, lenient), (told, VALUE))]
        for kind in SPENT:
            assert found[0][kind] < found[2][kind]
            assert found[1][kind] < found[2][kind]

    def test_the_prediction_levels_out_below_what_was_seen(self):
        told = history(np.random.default_rng(8), 25)
        gate = gates(told, VALUE)[0]
        lowest = min(t.merits["divergence"] for t in told)
        assert gate.predict(100 * lowest) == gate.predict(lowest)
        assert gate.predict(lowest)[0] < gate.predict(gate.least)[0] < max(t.score for t in told)
        assert gate.predict(lowest)[1] > gate.fit.scale


class TestHalving:
    @given(st.integers(0, 10_000), st.integers(8, 40), st.floats(1.1, 6))
    def test_the_best_share_goes_on(self, seed, n, eta):
        told = history(np.random.default_rng(seed), n)
        new, gate = -float(np.random.default_rng(seed + 1).exponential(1)), None
        for gate in gates(told, dataclasses.replace(HALVING, eta=eta)):
            ranked = sorted([*(t.merits[gate.kind] for t in told), new], reverse=True)
            goes_on = new in ranked[: max(1, math.floor(len(ranked) / eta))]
            assert goes_on == (new >= gate.least)
        assert gate is not None


def replay(seed: int, rules: FidelityConfig, noise: float = 1.0, n: int = 60) -> tuple[float, float]:
    """Return the cost of a search in whole trials, and how far its best lies behind that of one without gates."""
    scores, *divergences = landscape(np.random.default_rng(seed), n, noise)
    told: list[Told] = []
    cost = 0.0
    for i, score in enumerate(scores):
        asked, merits, failed = {gate.kind: gate for gate in gates(told, rules)}, {}, None
        for kind, values in zip(SPENT, divergences, strict=True):
            merits[kind] = -float(values[i])
            if kind in asked and merits[kind] < asked[kind].least:
                failed = asked[kind]
                break
        cost += SPENT[failed.kind] if failed else 1.0
        known = failed.predict(merits[failed.kind])[0] if failed else float(score)
        told.append(trial(known, merits, full=failed is None, measured=failed is None))
    kept = max(t.score for t in told if t.full)
    return cost / n, float(scores.max() - kept)


class TestSimulation:
    SEEDS = range(20)

    def table(self, rules: FidelityConfig, noise: float = 1.0) -> tuple[float, float]:
        cost, regret = np.mean([replay(seed, rules, noise) for seed in self.SEEDS], axis=0)
        return float(cost), float(regret)

    def test_gates_save_cost_with_little_regret(self):
        """Scores have a standard deviation of about 0.08; what is lost of the best is a small part of it."""
        cost, regret = self.table(VALUE)
        assert cost < 0.7
        assert regret < 0.005
        assert self.table(FidelityConfig(stop="none")) == (1.0, 0.0)

    def test_gates_of_a_rung_that_says_nothing_do_no_harm(self):
        """Halving believes the rung all the same; that is the price of its simplicity."""
        cost, regret = self.table(VALUE, noise=12.0)
        assert cost > 0.85
        assert regret < 0.01
        blind_cost, blind_regret = self.table(HALVING, noise=12.0)
        assert blind_cost < 0.7
        assert blind_regret > regret
