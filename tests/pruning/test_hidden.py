"""Rules for hidden dimensions against their definitions."""

import pytest
import torch

from adasearch.config import Component
from adasearch.errors import TrialError
from adasearch.pruning import hidden
from adasearch.pruning.hidden import HiddenContext
from adasearch.registry import HIDDEN
from tests.pruning.sample import activations, sample


def _scores(case, name, **options):
    entry = HIDDEN.get(name)
    context = HiddenContext(structure=case.structure, weights=case.weights, statistics=case.statistics)
    return entry.function(context, entry.options(**options))


def test_activation_norm_is_the_sum_over_sublayers_of_root_mean_squares_after_the_norm():
    case = sample()
    expected = torch.zeros(24, dtype=torch.float64)
    for layer in range(case.structure.layers):
        for module in (f"model.layers.{layer}.self_attn.q_proj", f"model.layers.{layer}.mlp.gate_proj"):
            expected += activations(case.model, module, case.tokens).double().square().mean(0).sqrt()
    torch.testing.assert_close(_scores(case, "activation_norm").double(), expected, rtol=1e-5, atol=1e-8)


def test_magnitude_is_the_norm_of_all_that_a_dimension_owns():
    case = sample()
    for dim in (0, 7, 23):
        total = 0.0
        for name, weight in case.weights.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                total += float(weight[dim].double().square().sum())
            elif weight.ndim == 2:
                total += float(weight[:, dim].double().square().sum())
        assert float(_scores(case, "magnitude")[dim]) == pytest.approx(total**0.5, rel=1e-5)


def test_scores_that_are_not_finite_are_told():
    case = sample()
    weights = {k: w.clone() for k, w in case.weights.items()}
    weights["model.embed_tokens.weight"][3, 5] = torch.nan
    context = HiddenContext(structure=case.structure, weights=weights, statistics=None)
    rule = Component(type="magnitude", options=HIDDEN.get("magnitude").options())
    with pytest.raises(TrialError, match="magnitude scores of hidden dimensions must be finite"):
        hidden.kept(context, rule, 12)


def test_the_best_stay():
    case = sample()
    scores = _scores(case, "activation_norm")
    context = HiddenContext(structure=case.structure, weights=case.weights, statistics=case.statistics)
    rule = Component(type="activation_norm", options=HIDDEN.get("activation_norm").options())
    found = hidden.kept(context, rule, 10)
    gone = sorted(set(range(24)) - set(found))
    assert float(scores[list(found)].min()) >= float(scores[gone].max())
