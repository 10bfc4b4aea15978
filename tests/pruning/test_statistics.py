"""Accumulators merge, agree with a float64 reference, and survive the disk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch.errors import DataError
from adasearch.pruning import statistics
from adasearch.pruning.accumulators import (
    Cosine,
    Covariance,
    GradientSum,
    Moments,
    SquareSum,
    Votes,
    damped,
    gradient_rows,
)
from adasearch.pruning.statistics import Statistics, merge

CUTS = st.tuples(st.integers(1, 20), st.integers(21, 40), st.integers(0, 2**31))


def _data(seed, rows=60, features=5, offset=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0]) + offset


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


class TestMoments:
    @given(CUTS, st.sampled_from([0.0, 1e3]))
    def test_merge_is_associative_and_equals_one_pass(self, cuts, offset):
        first, second, seed = cuts
        x = _data(seed, offset=offset)
        a, b, c = (Moments.of(part) for part in (x[:first], x[first:second], x[second:]))
        whole = Moments.of(x)
        for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
            assert merged.count == whole.count == 60
            _close(merged.mean, whole.mean)
            _close(merged.variance, whole.variance)

    def test_reads_out_as_the_definitions(self):
        x = _data(0, offset=2.0)
        moments = Moments.of(x)
        _close(moments.variance, x.double().var(0, unbiased=False))
        _close(moments.second_moment, x.double().square().mean(0))
        assert moments.mean.dtype == torch.float64

    def test_variance_of_a_large_mean_does_not_cancel(self):
        x = _data(1, rows=2000).double() + 1e6
        halves = Moments.of(x[:700]).merge(Moments.of(x[700:]))
        torch.testing.assert_close(halves.variance, x.var(0, unbiased=False), rtol=1e-6, atol=0)


class TestCovariance:
    @given(CUTS)
    def test_merge_is_associative_and_equals_one_pass(self, cuts):
        first, second, seed = cuts
        x = _data(seed)
        a, b, c = (Covariance.of(part) for part in (x[:first], x[first:second], x[second:]))
        exact = x.double().T @ x.double() / 60
        for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), Covariance.of(x)):
            torch.testing.assert_close(merged.matrix(), exact, rtol=1e-5, atol=1e-5)
            _close(merged.mean, x.double().mean(0))

    def test_centred_is_the_population_covariance(self):
        x = _data(3, offset=1.0)
        exact = torch.cov(x.double().T, correction=0)
        torch.testing.assert_close(Covariance.of(x).matrix(centred=True), exact, rtol=1e-5, atol=1e-5)

    def test_extended_is_the_sum_over_both(self):
        x = _data(5, rows=400)
        parts = Covariance.of(x[:100]).extended(x[100:300]).extended(x[300:])
        torch.testing.assert_close(parts.matrix(), Covariance.of(x).matrix(), rtol=1e-5, atol=1e-5)
        _close(parts.mean, x.double().mean(0))

    def test_bfloat16_is_accumulated_in_float32(self):
        x = _data(4).bfloat16()
        exact = x.double().T @ x.double() / 60
        torch.testing.assert_close(Covariance.of(x).matrix(), exact, rtol=1e-5, atol=1e-5)


class TestVotes:
    def test_equals_its_definition_and_merges(self):
        x = _data(0).view(6, 10, 5)
        whole = Votes.of(x)
        assert whole.count == 60
        shares = sum((row.square() / row.square().sum()).double() for row in x.flatten(0, 1))
        torch.testing.assert_close(whole.token, shares, rtol=1e-6, atol=1e-9)
        norms = sum(sequence.double().norm(dim=0) for sequence in x)
        torch.testing.assert_close(whole.sequence, norms, rtol=1e-6, atol=1e-9)
        parts = Votes.of(x[:2]).extended(x[2:5]).extended(x[5:])
        assert parts.count == 60
        _close(parts.token, whole.token)
        _close(parts.sequence, whole.sequence)

    def test_every_token_has_one_vote_and_a_silent_one_none(self):
        x = _data(1).view(6, 10, 5) * torch.logspace(-3, 3, 10)[None, :, None]
        x[2, 3] = 0
        assert float(Votes.of(x).token.sum()) == pytest.approx(59, abs=1e-4)


class TestDamped:
    def test_adds_a_share_of_the_mean_diagonal(self):
        matrix = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
        _close(damped(matrix, 0.5), torch.diag(torch.tensor([2.0, 4.0], dtype=torch.float64)))

    def test_no_activation_at_all_still_has_an_inverse(self):
        assert torch.linalg.det(damped(torch.zeros(3, 3), 0.01)) == 1


class TestGradientRows:
    @given(st.integers(0, 2**31), st.booleans())
    def test_reads_out_as_the_definitions(self, seed, fisher):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(6, 4, generator=generator)
        gradients = torch.randn(5, 6, 4, generator=generator)
        totals = [GradientSum(count=3 * len(part), total=part.sum(0)) for part in gradients.split([2, 3])]
        squares = [SquareSum(count=3 * len(part), squares=part.square().sum(0)) for part in gradients.split([2, 3])]
        total, square = totals[0].merge(totals[1]), squares[0].merge(squares[1])
        assert total.count == square.count == 15
        for dim in (0, 1):
            rows = gradient_rows(total.total, square.squares if fisher else None, weight, dim, sequences=5)
            w, g, f = weight.double(), gradients.double().mean(0), gradients.double().square().mean(0)
            expected = {"gradient/elem1": (w * g).abs(), "gradient/signed": w * g}
            if fisher:
                half = w * g - w * w * f / 2
                expected |= {"fisher/elem2": w * w * f, "fisher/mix": half.abs(), "fisher/signed": w * g}
            assert rows.keys() == expected.keys()
            for name, item in expected.items():
                torch.testing.assert_close(rows[name], item.sum(1 - dim), rtol=1e-4, atol=1e-5)


class TestCosine:
    def test_equals_its_definition_and_merges(self):
        before, after = _data(0), _data(1)
        exact = (before * after).sum(1) / before.norm(dim=1) / after.norm(dim=1)
        whole = Cosine.of(before, after)
        assert whole.count == 60
        torch.testing.assert_close(whole.mean, exact.double().mean(), rtol=1e-6, atol=1e-7)
        parts = Cosine.of(before[:13], after[:13]).extended(before[13:], after[13:])
        torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-6, atol=1e-7)

    def test_the_same_stream_has_cosine_one(self):
        assert float(Cosine.of(_data(0), 3 * _data(0)).mean) == pytest.approx(1.0, abs=1e-6)


def _held(seed=0, families=("moments", "covariance")):
    x = _data(seed)
    moments, both = Moments.of(x), Covariance.of(x)
    tensors = {
        "moments/a.o/mean": moments.mean,
        "moments/a.o/m2": moments.m2,
        "covariance/a.o/mean": both.mean,
        "covariance/a.o/gram": both.gram,
    }
    return Statistics(tokens=60, tensors={k: v for k, v in tensors.items() if k.split("/")[0] in families})


class TestStatistics:
    def test_merge_equals_one_pass(self):
        merged = merge(_held(0), _held(1))
        whole = torch.cat([_data(0), _data(1)])
        _close(merged.moments("a.o").variance, Moments.of(whole).variance)
        exact = Covariance.of(whole).matrix()
        torch.testing.assert_close(merged.covariance("a.o").matrix(), exact, rtol=1e-5, atol=1e-5)
        assert merged.tokens == 120

    def test_every_family_that_merges_is_named_by_its_class(self):
        assert statistics.merged_from("moments") == {"moments"}
        for family in statistics.FAMILIES:
            assert statistics.merged_from(family) <= set(statistics.ACCUMULATORS)

    def test_merge_refuses_sums_of_absolute_values(self):
        gradient = Statistics(tokens=3, tensors={"gradient/w/elem1": torch.ones(2)})
        with pytest.raises(AssertionError, match="cannot merge"):
            merge(gradient, gradient)

    def test_union_and_only_are_inverse(self):
        held = _held()
        again = statistics.union([held.only("covariance"), held.only("moments")])
        assert again.tokens == held.tokens
        assert set(again.tensors) == set(held.tensors)
        assert again.families == {"moments", "covariance"}

    def test_union_refuses_different_samples(self):
        with pytest.raises(AssertionError, match="same tokens"):
            statistics.union([_held().only("moments"), Statistics(tokens=7, tensors={})])


class TestDisk:
    def test_load_gives_what_was_saved(self, tmp_path):
        path = tmp_path / "s.safetensors"
        statistics.save(_held(), path)
        again = statistics.load(path)
        assert again.tokens == 60
        for name, tensor in _held().tensors.items():
            assert torch.equal(again.tensors[name], tensor)
            assert again.tensors[name].dtype == tensor.dtype

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99])
    def test_a_file_cut_short_is_an_error(self, tmp_path, share):
        path = tmp_path / "s.safetensors"
        statistics.save(_held(), path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match="whole statistics file"):
            statistics.load(path)

    def test_a_flipped_byte_is_an_error(self, tmp_path):
        path = tmp_path / "s.safetensors"
        statistics.save(_held(), path)
        content = bytearray(path.read_bytes())
        content[-9] ^= 0x40
        path.write_bytes(content)
        with pytest.raises(DataError, match="checksum"):
            statistics.load(path)

    def test_a_missing_file_is_an_error(self, tmp_path):
        with pytest.raises(DataError):
            statistics.load(tmp_path / "none.safetensors")
