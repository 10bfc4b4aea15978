"""Bonsai's rounds: what is tried, what is asked of the model, and that the units that cost least go."""

import torch

from adasearch.pruning import masking, schedule, surgery
from adasearch.pruning.plan import make_plan
from tests.pruning.sample import sample, schedule_context

GLOBAL = {"type": "global_score", "normalise": "none", "minimum": 0.1}


def rounds(**options):
    return {"type": "mask_regression", "masks": 16, "steps": 2, "sequences": 2, **options}


def test_asks_for_as_many_losses_as_it_says_and_never_brings_back_a_unit(monkeypatch):
    case, asked = sample(), []
    plain = masking.masked

    def watched(model, structure, masks, skipped=frozenset()):
        asked.append({name: mask.clone() for name, mask in masks.items()})
        return plain(model, structure, masks, skipped)

    monkeypatch.setattr(masking, "masked", watched)
    context = schedule_context(case, rounds(), allocation=GLOBAL, importance="act_norm")
    plan = schedule.decide(context).plan
    assert len(asked) == 2 * 16
    gone_first = [g.name for g in case.structure.groups if any(not m[g.name].any() for m in asked)]
    assert not gone_first  # no mask takes a whole group
    for one, two in zip(asked[::2], asked[1::2], strict=True):
        flat, other = (torch.cat([masks[g.name] for g in case.structure.groups]) for masks in (one, two))
        assert not (~flat & ~other).all()
    first_gone = {name: torch.stack([m[name] for m in asked[16:]]).any(0).logical_not() for name in asked[0]}
    for group in case.structure.groups:
        kept = torch.zeros(group.units, dtype=torch.bool)
        kept[list(plan.keep[group.name])] = True
        assert not (kept & first_gone[group.name]).any()


def test_with_enough_masks_the_loss_is_lower_than_what_the_prior_alone_leaves():
    """Over seeds, in the mean: the regression sees the loss, random scores do not."""
    case = sample()
    gains = []
    for seed in range(4):
        told = {"allocation": GLOBAL, "importance": "random", "seed": seed}
        tried = schedule_context(case, rounds(masks=96, steps=1, fraction=0.4), 0.2, **told)
        alone = schedule_context(case, "one_shot", 0.2, **told)
        losses = []
        for context in (tried, alone):
            plan = schedule.decide(context).plan
            model = surgery.cut(context.config, context.weights, context.structure, plan)
            losses.append(masking.loss(model, case.tokens))
        gains.append(losses[1] - losses[0])
    assert sum(gains) / len(gains) > 0


def test_a_whole_model_is_left_as_it_is():
    case = sample()
    before = {k: w.clone() for k, w in case.weights.items()}
    schedule.decide(schedule_context(case, rounds(), allocation=GLOBAL))
    assert all(torch.equal(before[k], case.weights[k]) for k in before)
    assert make_plan(case.structure, case.units, {}, {}).parameters == case.structure.parameters
