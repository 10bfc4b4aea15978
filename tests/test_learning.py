"""A whole trial whose schedule learns: text, teacher, rungs and recovery around it; the same again for a finalist."""

import pytest
import torch

from adasearch import trainings
from adasearch.config import TrialConfig, study_from_dict
from adasearch.pruning.projection import removal
from adasearch.pruning.structure import Outline
from adasearch.trial import Clock, prune, run_trial
from adasearch.workbench import Workbench
from tests.tiny import save_checkpoint

SAMPLE = {"corpus": "pydoc", "samples": 2, "length": 32}
GATES = {"type": "gates", "tokens": 256, "length": 16, "batch": 4}
PAT = {"type": "pat", "remove": 0.25, "tokens": 256, "length": 16, "batch": 4, "inner": 3, "rank": 2, "distill": 1.0}
SCHEDULES = {
    "gates": GATES,
    "lora_prune": {**GATES, "type": "lora_prune", "distill": 0.5},
    "movement": {**GATES, "type": "movement", "rank": 0, "lr": 1e-4},
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning")
    study = {
        "name": "s",
        "model": {"name": str(save_checkpoint(folder / "tiny", num_hidden_layers=3)), "dtype": "float32"},
        "space": {"importance": {"choice": ["magnitude"]}},
        "budget": {"remove": 0.3},
        "objective": {"search": ["cloze/pydoc"], "items": 4},
        "report": {"tasks": ["cloze/pydoc"], "items": 4},
        "fidelity": {"divergence": 128},
        "trial": {"calibration": SAMPLE},
    }
    return Workbench(study_from_dict(study, "study:", folder / "study.yaml"), folder / "run", threads=1)


def trial(**sections):
    return TrialConfig.from_dict({"calibration": SAMPLE, **sections}, "trial")


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_trial_learns_cuts_recovers_and_is_scored(bench, name):
    recovery = {"type": "lora", "tokens": 128, "length": 16, "batch": 4, "rank": 2}
    config = trial(schedule=SCHEDULES[name], recovery=recovery)
    result, values = run_trial(config.to_dict(), bench)
    structure = bench.structure()
    assert result.parameters <= structure.parameters - removal(structure, bench.study.budget)
    assert result.seconds["learn"] > 0
    assert result.rungs[0].kind == "divergence"
    assert {"loss_first", "loss_last"} <= set(result.notes)
    assert sum(map(len, values.values())) == result.items == 4


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_finalist_is_cut_as_its_trial_was(bench, name):
    config = trial(schedule=SCHEDULES[name], depth={"type": "block_influence", "unit": "sublayer", "share": 0.5})
    one, two = (prune(config, bench, Clock()) for _ in range(2))
    assert one.plan == two.plan
    assert one.plan.outline.gone
    for (key, a), (_, b) in zip(one.model.named_parameters(), two.model.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    bench.assert_unchanged()


def test_hidden_dimensions_are_learnt_and_widths_pay_the_rest(bench):
    recovery = {"type": "lora", "tokens": 128, "length": 16, "batch": 4, "rank": 2}
    config = trial(hidden=PAT, schedule=GATES, recovery=recovery)
    pruned, again = (prune(config, bench, Clock()) for _ in range(2))
    assert len(pruned.plan.outline.hidden) == 18
    assert pruned.plan == again.plan
    for (key, a), (_, b) in zip(pruned.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), key
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.equal(pruned.base.weights[name], bench.outlined(pruned.plan.outline).weights[name])
    bench.assert_unchanged()
    result, _ = run_trial(config.to_dict(), bench)
    structure = bench.structure()
    assert result.parameters <= structure.parameters - removal(structure, bench.study.budget)
    assert result.seconds["learn"] > 0


def test_the_teacher_is_the_dense_model_whatever_was_learnt(bench):
    weights = {name: torch.zeros_like(weight) for name, weight in bench.base.weights.items()}
    config = trial(schedule=GATES)
    _, context = trainings.given("schedule", config, bench.rebased(weights), Outline(), Clock())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(context.teacher(input_ids=ids).logits, bench.dense()(input_ids=ids).logits)
    rebased = bench.rebased(weights)
    own = "self:documents=2:length=16"
    assert rebased.corpus(own) == bench.corpus(own), "own text is that of the dense model"
    assert bench.rebased({}) is bench
