"""Selections against their definitions: errors by brute force, searches that never get worse, laws of the surgeon."""

import itertools

import pytest
import torch

from adasearch.config import Component, TrialConfig, merged
from adasearch.errors import TrialError
from adasearch.library import REPOSITORY, load_recipe
from adasearch.pruning import calibration, schedule, selection
from adasearch.pruning.accumulators import damped
from adasearch.pruning.compensation.least_squares import solve
from adasearch.pruning.importance import GroupView
from adasearch.pruning.importance.obs import ObsOptions
from adasearch.pruning.importance.obs import score as obs
from adasearch.pruning.output_error import LeastSquaresError, PlainError
from adasearch.pruning.plan import check_plan, highest, make_plan
from adasearch.pruning.products import packed_gram
from adasearch.pruning.selection.swap_correlation import RemovedParts
from adasearch.pruning.statistics import Statistics
from adasearch.pruning.structure import Group, Slice
from adasearch.registry import SELECTION
from tests.pruning.sample import budget, sample

DAMPING = 0.01
OUTPUTS = 5


def problem(seed, *, units=8, block=1, partitions=1, kind="mlp", tokens=60):
    """One made-up sublayer: correlated features, its view, features (T × F, float64) and weight (D × F, float64)."""
    generator = torch.Generator().manual_seed(seed)
    features = units * block
    mixed = torch.randn(features, features, generator=generator) / features**0.5 + 0.3 * torch.eye(features)
    x = torch.randn(tokens, features, generator=generator) @ mixed + torch.randn(features, generator=generator) / 2
    weight = torch.randn(OUTPUTS, features, generator=generator)
    group = Group(
        name="layer.sub",
        layer=0,
        kind=kind,
        unit="made",
        units=units,
        partitions=partitions,
        slices=(Slice(parameter="layer.sub.out.weight", dim=1, block=block),),
        output="layer.sub.out",
    )
    tensors = {"covariance/layer.sub.out/gram": packed_gram(x), "covariance/layer.sub.out/mean": x.double().mean(0)}
    statistics = Statistics(tokens=tokens, tensors=tensors)
    view = GroupView(group=group, weights={"layer.sub.out.weight": weight}, statistics=statistics, seed=0)
    return view, x.double(), weight.double()


def mask(view, out):
    """Which features belong to the units in `out`."""
    units = torch.zeros(view.group.units, dtype=torch.bool)
    units[list(out)] = True
    return units.repeat_interleave(view.group.output_block)


def plain_error(view, x, weight, out):
    """Mean over tokens of ||x W^T - x W'^T||^2 with W' zero in the columns of `out`."""
    return float((x * mask(view, out) @ weight.T).square().sum(1).mean())


def least_squares_error(view, x, weight, out):
    """The same after ordinary least squares on the kept features; damping is rows of its root below the sample."""
    scaled = x / len(x) ** 0.5
    shift = DAMPING * scaled.square().sum(0).mean()
    rows = torch.cat([scaled, shift.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    target, stays = rows @ weight.T, ~mask(view, out)
    fitted = torch.linalg.lstsq(rows[:, stays], target).solution
    return float((rows[:, stays] @ fitted - target).square().sum())


ERRORS = {
    "plain": (PlainError, plain_error),
    "least_squares": (lambda view: LeastSquaresError(view, DAMPING), least_squares_error),
}
SHAPES = [{"units": 8, "block": 1}, {"units": 5, "block": 3, "kind": "attention"}]


def removed(view, kept):
    return [u for u in range(view.group.units) if u not in kept]


def chosen(name, view, width, scores=None, **options):
    entry = SELECTION.get(name)
    scores = torch.rand(view.group.units, generator=torch.Generator().manual_seed(1)) if scores is None else scores
    return selection.select(view, scores, width, Component(type=name, options=entry.options(**options)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ERRORS)
class TestOutputErrors:
    """Both errors and what they say of moves and exchanges, against the output itself."""

    def _pair(self, kind, shape, seed=0):
        view, x, weight = problem(seed, **shape)
        made, brute = ERRORS[kind]
        return made(view), lambda out: brute(view, x, weight, out)

    def test_error_of_a_set_however_it_was_reached(self, kind, shape):
        for way in ([[1, 3, 4]], [[4], [1], [3]], [[0, 1, 2], [3, 4], [2], [0]]):
            state, brute = self._pair(kind, shape)
            for units in way:
                state.move(units)
            assert state.out.nonzero().flatten().tolist() == [1, 3, 4]
            assert state.error == pytest.approx(brute([1, 3, 4]), rel=1e-4)

    def test_moves(self, kind, shape):
        state, brute = self._pair(kind, shape)
        state.move([0, 3])
        for unit, change in enumerate(state.moves().tolist()):
            other = {0, 3} ^ {unit}
            assert change == pytest.approx(brute(other) - brute({0, 3}), rel=1e-4, abs=1e-5)

    def test_exchanges(self, kind, shape):
        state, brute = self._pair(kind, shape)
        state.move([0, 3])
        back, away = torch.tensor([3, 0]), torch.tensor([4, 1, 2])
        changes = state.exchanges(back, away)
        for (i, r), (j, k) in itertools.product(enumerate(back.tolist()), enumerate(away.tolist())):
            expected = brute(({0, 3} - {r}) | {k}) - brute({0, 3})
            assert float(changes[i, j]) == pytest.approx(expected, rel=1e-4, abs=1e-5)


class TestLeastSquaresTable:
    @pytest.mark.parametrize("shape", SHAPES)
    def test_kept_columns_are_those_of_the_compensation(self, shape):
        view, _, weight = problem(2, **shape)
        state = LeastSquaresError(view, DAMPING)
        for unit in (2, 4, 1):
            state.move([unit])
        second = damped(view.covariance().matrix(), DAMPING)
        stays = ~mask(view, [1, 2, 4])
        torch.testing.assert_close(state.rows[:, stays], solve(weight, second, stays), rtol=1e-9, atol=1e-9)

    def test_units_that_leave_and_return_leave_no_trace(self):
        view, *_ = problem(3)
        state, fresh = LeastSquaresError(view, DAMPING), LeastSquaresError(view, DAMPING)
        state.move([1, 2, 5])
        state.move([2])
        state.move([1, 5])
        assert state.error == pytest.approx(0, abs=1e-9)
        torch.testing.assert_close(state.square, fresh.square, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(state.rows, fresh.rows, rtol=1e-8, atol=1e-8)

    def test_statistics_without_a_positive_definite_matrix_are_refused(self):
        view, *_ = problem(0)
        view.statistics.tensors["covariance/layer.sub.out/gram"].neg_()
        with pytest.raises(TrialError, match=r"layer\.sub\.out must be positive definite: raise the damping"):
            LeastSquaresError(view, DAMPING)


class TestTop:
    @pytest.mark.parametrize("unit", ["kv_group", "head"])
    def test_is_what_a_plan_does_by_itself(self, unit):
        case = sample(unit)
        generator = torch.Generator().manual_seed(5)
        scores = {g.name: torch.randint(0, 3, (g.units,), generator=generator).float() for g in case.structure.groups}
        widths = {g.name: max(1, g.width // 2) for g in case.structure.groups}
        component = Component(type="top", options=SELECTION.get("top").options())
        choose = selection.chooser(component, {}, None, 0)
        plan = make_plan(case.structure, case.units, scores, widths, choose=choose)
        assert plan == make_plan(case.structure, case.units, scores, widths)


class TestObsGreedy:
    def _one_by_one(self, view, x, weight, count):
        """Removed units where each is the one whose leaving raises the brute-force error least."""
        out, errors = [], []
        for _ in range(count):
            left = removed(view, out)
            costs = [least_squares_error(view, x, weight, [*out, u]) for u in left]
            errors.append(min(costs))
            out.append(left[costs.index(min(costs))])
        return out, errors

    @pytest.mark.parametrize("shape", SHAPES)
    def test_each_step_takes_the_unit_of_least_error(self, shape):
        for seed in range(5):
            view, x, weight = problem(seed, **shape)
            out, _ = self._one_by_one(view, x, weight, 3)
            kept = chosen("obs_greedy", view, view.group.units - 3, step=0.0)
            assert sorted(out) == removed(view, kept)

    def test_errors_of_the_steps_add_up_to_the_true_increase(self):
        view, x, weight = problem(1)
        out, errors = self._one_by_one(view, x, weight, 4)
        state, total = LeastSquaresError(view, DAMPING), 0.0
        for unit, error in zip(out, errors, strict=True):
            total += float(state.moves()[unit])
            state.move([unit])
            assert total == pytest.approx(error, rel=1e-4)
        assert total == pytest.approx(least_squares_error(view, x, weight, out), rel=1e-4)

    def test_all_at_once_is_the_top_of_obs(self):
        for seed in range(5):
            view, *_ = problem(seed, units=12)
            scores = obs(view, ObsOptions(damping=DAMPING))
            assert chosen("obs_greedy", view, 7, step=1.0) == highest(view.group, scores, 7)

    def test_is_better_than_one_shot_in_the_mean(self):
        """Mean over 40 random problems of the least squares error; each alone may go either way."""
        found = {0.0: [], 0.25: [], 1.0: []}
        for seed in range(40):
            view, x, weight = problem(seed, units=16)
            for step, errors in found.items():
                kept = chosen("obs_greedy", view, 8, step=step)
                errors.append(least_squares_error(view, x, weight, removed(view, kept)))
        greedy, batches, once = (sum(errors) for errors in found.values())
        assert greedy < 0.97 * once
        assert batches < once

    def test_scores_are_not_looked_at(self):
        view, *_ = problem(4)
        assert chosen("obs_greedy", view, 4, torch.arange(8.0)) == chosen("obs_greedy", view, 4, -torch.arange(8.0))

    def test_attention_goes_unit_by_unit(self):
        for seed in range(5):
            view, *_ = problem(seed, units=8, block=2, kind="attention")
            assert chosen("obs_greedy", view, 3, step=1.0) == chosen("obs_greedy", view, 3, step=0.0)

    def test_a_share_of_what_is_still_to_go(self, monkeypatch):
        sizes = []
        move = LeastSquaresError.move
        monkeypatch.setattr(
            LeastSquaresError, "move", lambda self, units: (sizes.append(len(units)), move(self, units))
        )
        view, *_ = problem(0, units=40)
        chosen("obs_greedy", view, 10, step=0.25)
        assert sizes == [8, 6, 4, 3, 3, 2, 1, 1, 1, 1]


class TestSwap:
    def _start(self, view, width):
        scores = torch.rand(view.group.units, generator=torch.Generator().manual_seed(1))
        return highest(view.group, scores, width)

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("kind", ERRORS)
    def test_ends_where_no_exchange_lowers_the_error(self, kind, shape):
        _, brute = ERRORS[kind]
        lower = 0
        for seed in range(5):
            view, x, weight = problem(seed, **shape)
            width = view.group.units - 2
            start, kept = self._start(view, width), chosen("swap", view, width, error=kind, damping=DAMPING)
            out = set(removed(view, kept))
            error = brute(view, x, weight, out)
            lower += error < brute(view, x, weight, removed(view, start)) * (1 - 1e-6)
            for r, k in itertools.product(out, kept):
                assert brute(view, x, weight, out - {r} | {k}) >= error * (1 - 1e-4)
        assert lower >= 3

    @pytest.mark.parametrize("kind", ERRORS)
    def test_error_never_rises_with_the_rounds(self, kind):
        _, brute = ERRORS[kind]
        for seed in range(5):
            view, x, weight = problem(seed, units=14)
            errors = [brute(view, x, weight, removed(view, self._start(view, 8)))]
            for rounds in range(1, 6):
                kept = chosen("swap", view, 8, error=kind, damping=DAMPING, rounds=rounds, candidates=3)
                errors.append(brute(view, x, weight, removed(view, kept)))
            assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
            assert errors[1] < errors[0]

    def test_one_round_makes_the_best_exchange_of_all(self):
        view, x, weight = problem(3, units=10)
        start = self._start(view, 6)
        kept = chosen("swap", view, 6, error="least_squares", damping=DAMPING, rounds=1)
        tried = [tuple(sorted({*start, r} - {k})) for r, k in itertools.product(removed(view, start), start)]
        best = min(tried, key=lambda keep: least_squares_error(view, x, weight, removed(view, keep)))
        assert kept == best

    def test_fewer_candidates_are_the_cheapest_alone(self):
        view, *_ = problem(3, units=10)
        start = self._start(view, 6)
        state = PlainError(view)
        state.move(removed(view, start))
        moves = state.moves()
        kept = chosen("swap", view, 6, error="plain", rounds=1, candidates=1)
        back = min(removed(view, start), key=lambda u: float(moves[u]))
        away = min(start, key=lambda u: float(moves[u]))
        assert kept == tuple(sorted({*start, back} - {away}))

    def test_partitions_keep_their_number(self):
        for seed in range(5):
            view, *_ = problem(seed, units=8, block=2, partitions=2, kind="attention")
            for name in ("swap", "obs_greedy", "swap_correlation"):
                kept = chosen(name, view, 2)
                assert [sum(u // 4 == part for u in kept) for part in (0, 1)] == [2, 2]


class TestSwapCorrelation:
    def _summed(self, view, x, weight, out):
        """Sum over output features of |corr| over tokens between the output and what is left of it."""
        y, left = x @ weight.T, x * ~mask(view, out) @ weight.T
        both = [torch.corrcoef(torch.stack([y[:, i], left[:, i]]))[0, 1] for i in range(y.shape[1])]
        return sum(abs(float(c)) for c in both)

    def _problem(self, seed, **more):
        return problem(seed, units=7, block=2, kind="attention", **more)

    def test_summed_correlation(self):
        view, x, weight = self._problem(0)
        found = RemovedParts(view).totals([1, 4], torch.tensor([0, 2, 6]))
        for unit, total in zip((0, 2, 6), found.tolist(), strict=True):
            assert total == pytest.approx(self._summed(view, x, weight, {1, 4, unit}), rel=1e-4)

    def test_each_removed_head_is_tried_against_every_kept_one(self):
        changed = 0
        for seed in range(8):
            view, x, weight = self._problem(seed)
            scores = torch.rand(7, generator=torch.Generator().manual_seed(seed))
            kept = set(highest(view.group, scores, 4))
            first = sorted(removed(view, kept), key=lambda u: float(scores[u]))
            out = set(first)
            for head in first:
                slot = head
                for other in sorted(kept):
                    swapped = out - {slot} | {other}
                    if self._summed(view, x, weight, swapped) > self._summed(view, x, weight, out):
                        out, kept, slot = swapped, kept - {other} | {slot}, other
            found = removed(view, chosen("swap_correlation", view, 4, scores))
            assert found == sorted(out)
            changed += found != sorted(first)
        assert changed >= 4

    def test_correlation_never_falls(self):
        for seed in range(8):
            view, x, weight = self._problem(seed)
            scores = torch.rand(7, generator=torch.Generator().manual_seed(seed))
            before = removed(view, highest(view.group, scores, 3))
            after = removed(view, chosen("swap_correlation", view, 3, scores))
            assert self._summed(view, x, weight, after) >= self._summed(view, x, weight, before) - 1e-6

    def test_mlps_keep_the_top(self):
        view, *_ = problem(0)
        scores = torch.rand(8, generator=torch.Generator().manual_seed(2))
        assert chosen("swap_correlation", view, 3, scores) == highest(view.group, scores, 3)


class TestTrials:
    @pytest.mark.parametrize(("recipe", "kind"), [("slimgpt", "mlp"), ("slimllm", "attention"), ("sobp", "mlp")])
    def test_recipes_decide_by_their_selection_at_the_same_widths(self, recipe, kind):
        case, asked = sample(), budget(0.3)
        mapping = load_recipe(recipe, REPOSITORY / "studies" / "any.yaml", "recipes")
        # Scores that say nothing: with three KV groups there is little to search from good ones.
        changes = {"calibration": {"corpus": "pydoc"}, "importance": "random", "seed": 1}
        config = TrialConfig.from_dict(merged(mapping, changes), recipe)
        statistics = calibration.collect(case.model, case.structure, case.tokens, schedule.needs(config))
        plain = TrialConfig.from_dict(merged(config.to_dict(), {"selection": "top"}), recipe)
        assert config.selection.type != "top"
        assert config.key != plain.key
        found, top = (
            schedule.decide(
                schedule.ScheduleContext(
                    config=case.config,
                    weights=case.weights,
                    structure=case.structure,
                    statistics=statistics,
                    tokens=lambda: case.tokens,
                    trial=trial,
                    budget=asked,
                    device=torch.device("cpu"),
                )
            ).plan
            for trial in (config, plain)
        )
        check_plan(found, case.structure)
        assert found.widths(case.structure) == top.widths(case.structure)
        differ = {g.kind for g in case.structure.groups if found.keep[g.name] != top.keep[g.name]}
        assert kind in differ

    @pytest.mark.parametrize("name", ["obs_greedy", "swap", "swap_correlation"])
    def test_statistics_that_a_selection_reads_are_collected(self, name):
        config = TrialConfig.from_dict(
            {"calibration": {"corpus": "pydoc"}, "importance": "random", "selection": name}, "t"
        )
        assert schedule.needs(config) == {"covariance"}
