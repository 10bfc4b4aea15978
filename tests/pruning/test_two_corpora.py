"""One criterion on two samples: the scores of both, mixed; corpora are found before any work."""

import dataclasses

import pytest
import torch

from adasearch import data
from adasearch.config import TrialConfig, study_from_dict
from adasearch.library import REPOSITORY, load_recipe
from adasearch.pruning import calibration, importance, schedule
from adasearch.pruning.statistics import by_corpus
from adasearch.sections import CalibrationConfig, UnitsConfig
from adasearch.text_checks import corpora_of
from tests.pruning.sample import component, sample, sequence_gradients, tokens
from tests.test_workbench import bench, corpus  # noqa: F401 - fixtures


def _study(tmp_path, **changes):
    base = {
        "model": {"name": "nowhere"},
        "space": {"calibration.samples": {"int": [8, 16]}},
        "budget": {"remove": 0.2},
        "objective": {"search": ["cloze/pydoc"], "items": 4},
        "report": {"tasks": ["cloze/pydoc"]},
        "trial": {"calibration": {"corpus": "pydoc"}},
    }
    return study_from_dict({**base, **changes}, "study:", tmp_path / "study.yaml")


def _mixed_scores(case, batch):
    """|W g - W^2 F / 2| summed over all that a unit owns, from the gradients of single sequences."""
    found = {}
    gradients = sequence_gradients(case.model, batch)
    for group in case.structure.groups:
        total = torch.zeros(group.units, dtype=torch.float64)
        for part in group.slices:
            w, g = case.weights[part.parameter].double(), gradients[part.parameter].double()
            if w.ndim == 2:
                element = (w * g.mean(0) - w**2 * (g**2).mean(0) / 2).abs()
                for unit in range(group.units):
                    owned = slice(unit * part.block, (unit + 1) * part.block)
                    total[unit] += element[owned].sum() if part.dim == 0 else element[:, owned].sum()
        found[group.name] = total
    return found


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_scores_are_those_of_both_samples_mixed(share):
    case = sample()
    chosen = component("importance", "two_corpora", share=share)
    found = importance.score_all(case.structure, case.weights, case.statistics, chosen, 0)
    domain, general = (_mixed_scores(case, tokens(seed=seed)) for seed in (0, 1))
    for name, scores in found.items():
        own, other = (s[name] / s[name].abs().mean() for s in (domain, general))
        torch.testing.assert_close(scores.double(), (1 - share) * own + share * other, rtol=1e-5, atol=1e-7)


def test_one_inside_another_looks_at_a_third_corpus():
    case = sample()
    inner = component("importance", "two_corpora", of=component("importance", "flap"), corpus="third", share=1.0)
    outer = component("importance", "two_corpora", of=inner, corpus="stdlib", share=1.0)
    assert by_corpus(importance.needs(outer)) == {"": {"moments"}, "stdlib": {"moments"}, "third": {"moments"}}
    third = case.statistics.others["stdlib"]
    statistics = dataclasses.replace(case.statistics, others={"third": third, "stdlib": case.statistics})
    found = importance.score_all(case.structure, case.weights, statistics, outer, 0)
    plain = component("importance", "flap")
    alone = importance.score_all(case.structure, case.weights, third, plain, 0)
    for name, scores in found.items():
        torch.testing.assert_close(scores, alone[name] / alone[name].abs().mean())


def test_the_other_sample_is_as_large_drawn_alike_and_cached(bench, corpus, tmp_path, monkeypatch):  # noqa: F811
    other = tmp_path / "other.txt"
    other.write_text(corpus.read_text().upper())
    chosen = CalibrationConfig(corpus=str(corpus), samples=3, length=16, draw=5)
    needs = frozenset({"moments", "fisher", f"fisher@{other}"})
    found = bench.statistics(bench.structure(), chosen, UnitsConfig(), needs)
    assert bench.statistics(bench.structure(), chosen, UnitsConfig(), needs) is found
    assert set(found.others) == {str(other)}
    for part, sampled in (
        (found, chosen),
        (found.of_corpus(str(other)), dataclasses.replace(chosen, corpus=str(other))),
    ):
        batch = data.token_matrix(bench.base.tokenizer, sampled)
        fresh = calibration.collect(bench.dense(), bench.structure(), batch, part.families)
        assert part.tensors.keys() == fresh.tensors.keys()
        for name, tensor in fresh.tensors.items():
            assert torch.equal(part.tensors[name], tensor)
    assert found.families == {"moments", "fisher"}
    assert found.of_corpus(str(other)).families == {"fisher"}
    bench._last = None
    monkeypatch.setattr(calibration, "accumulate", None)  # the cache has both
    bench.statistics(bench.structure(), chosen, UnitsConfig(), needs)
    # The same families of the same corpus as the trial's own are the same file.
    same = bench.statistics(bench.structure(), chosen, UnitsConfig(), frozenset({"fisher", f"fisher@{corpus}"}))
    assert all(torch.equal(same.of_corpus(str(corpus)).tensors[k], t) for k, t in same.tensors.items())


def test_every_corpus_that_a_study_reads_has_its_place(tmp_path):
    inner = {"type": "spare_bottom", "of": {"type": "two_corpora", "corpus": "general.txt"}}
    study = _study(
        tmp_path,
        trial={"calibration": {"corpus": "pydoc"}, "importance": inner},
        recipes={"r": {"importance": {"type": "two_corpora", "corpus": "recipe.txt"}}},
    )
    assert corpora_of(study) == {
        "pydoc": "trial.calibration.corpus",
        "general.txt": "trial.importance.of.corpus",
        "recipe.txt": "recipes.r.importance.corpus",
    }
    space = {"importance": {"choice": ["flap", "two_corpora"]}}
    searched = _study(tmp_path, space=space, recipes=[])
    assert corpora_of(searched) == {"pydoc": "trial.calibration.corpus", "stdlib": "space.importance"}
    space |= {"importance.two_corpora.corpus": {"choice": ["a.txt", "b.txt", "c.txt"]}}
    found = corpora_of(_study(tmp_path, space=space))
    assert {found[name] for name in ("a.txt", "b.txt", "c.txt")} == {"space.importance.two_corpora.corpus"}


def test_the_recipe_reads_only_what_ships_with_python():
    recipe = load_recipe("d_pruner_like", REPOSITORY / "studies" / "any.yaml", "recipes")
    config = TrialConfig.from_dict({"calibration": {"corpus": "pydoc"}, **recipe}, "")
    assert by_corpus(schedule.needs(config)) == {"": {"fisher"}, "stdlib": {"fisher"}}
