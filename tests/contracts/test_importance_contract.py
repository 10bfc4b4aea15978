"""What every importance criterion owes its callers; a new file in the folder is tested by being there."""

import dataclasses

import pytest
import torch

from adasearch import text_checks
from adasearch.config import Component
from adasearch.pruning import importance, products
from adasearch.pruning.statistics import FAMILIES, Statistics, by_corpus
from adasearch.registry import IMPORTANCE
from tests.pruning.sample import sample


def _permuted(case, group, order):
    """Weights and statistics of the model whose units of one group stand in another order."""
    weights = dict(case.weights)
    for part in group.slices:
        at = (order[:, None] * part.block + torch.arange(part.block)).flatten()
        weights[part.parameter] = weights[part.parameter].index_select(part.dim, at)
    others = {corpus: _reordered(item, group, order) for corpus, item in case.statistics.others.items()}
    return weights, dataclasses.replace(_reordered(case.statistics, group, order), others=others)


def _reordered(statistics, group, order):
    tensors = dict(statistics.tensors)

    def index(block):
        return (order[:, None] * block + torch.arange(block)).flatten()

    for part in group.slices:
        at = index(part.block)
        for key in [k for k in tensors if f"/{part.parameter}/" in k]:
            tensors[key] = tensors[key][at]
    at = index(group.output_block)
    for key in [k for k in tensors if f"/{group.output}/" in k]:
        if key.endswith("/gram"):
            matrix = products.unpacked_gram(tensors[key], len(at))[at][:, at].float()
            blocks = [matrix[rows, rows.start :].flatten() for rows, _ in products._row_blocks(len(at))]
            tensors[key] = torch.cat(blocks)
        else:
            tensors[key] = tensors[key][at]
    return Statistics(tokens=statistics.tokens, tensors=tensors)


def _part(found, families):
    return Statistics(
        tokens=found.tokens, tensors={k: t for k, t in found.tensors.items() if k.split("/")[0] in families}
    )


@pytest.mark.parametrize("name", IMPORTANCE.names())
class TestImportanceContract:
    def _component(self, name):
        return Component(type=name, options=IMPORTANCE.get(name).options())

    def _score(self, case, name, weights=None, statistics=None, seed=3):
        return importance.score_all(
            case.structure, weights or case.weights, statistics or case.statistics, self._component(name), seed
        )

    def test_registers_its_file_name_and_frozen_options(self, name):
        entry = IMPORTANCE.get(name)
        assert entry.name == name
        options = entry.options()
        assert dataclasses.is_dataclass(options)
        assert hash(options) == hash(entry.options())
        assert entry.function.__doc__

    def test_needs_are_known_families(self, name):
        parts = by_corpus(importance.needs(self._component(name)))
        assert all(families <= FAMILIES for families in parts.values())

    def test_a_setting_named_corpus_says_which_others_it_looks_at(self, name):
        component = self._component(name)
        named = {corpus for corpus, _ in text_checks.named_in(component, "")}
        assert set(by_corpus(importance.needs(component))) == {"", *named}

    @pytest.mark.parametrize("unit", ["kv_group", "head"])
    def test_gives_one_finite_float32_score_per_unit(self, name, unit):
        case = sample(unit)
        for group in case.structure.groups:
            scores = self._score(case, name)[group.name]
            assert scores.shape == (group.units,)
            assert scores.dtype == torch.float32
            assert scores.isfinite().all()
            assert len(scores.unique()) > 1

    def test_reads_no_more_than_it_needs(self, name):
        case = sample()
        needed = by_corpus(importance.needs(self._component(name)))
        own = _part(case.statistics, needed.pop(""))
        others = {corpus: _part(case.statistics.others[corpus], families) for corpus, families in needed.items()}
        few = self._score(case, name, statistics=dataclasses.replace(own, others=others))
        for group, scores in self._score(case, name).items():
            assert torch.equal(scores, few[group])

    def test_bfloat16_weights_give_nearly_the_same_float32_scores(self, name):
        case = sample()
        half = {k: w.bfloat16() for k, w in case.weights.items()}
        for group, scores in self._score(case, name).items():
            rounded = self._score(case, name, weights=half)[group]
            assert rounded.dtype == torch.float32
            torch.testing.assert_close(rounded, scores, rtol=0.03, atol=0.03 * float(scores.abs().max()))

    @pytest.mark.parametrize("unit", ["kv_group", "head"])
    def test_permuting_units_permutes_scores(self, name, unit):
        if name == "random":
            pytest.skip("knows no units")
        case = sample(unit)
        for group in case.structure.groups[:2]:
            order = torch.randperm(group.units, generator=torch.Generator().manual_seed(1))
            weights, statistics = _permuted(case, group, order)
            moved = self._score(case, name, weights, statistics)[group.name]
            expected = self._score(case, name)[group.name][order]
            torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))

    def test_same_seed_same_scores_and_nothing_changed(self, name):
        case = sample()
        before = {k: w.clone() for k, w in case.weights.items()}
        kept = {k: t.clone() for k, t in case.statistics.tensors.items()}
        one, two = self._score(case, name), self._score(case, name)
        assert all(torch.equal(one[g], two[g]) for g in one)
        assert all(torch.equal(before[k], case.weights[k]) for k in before)
        assert all(torch.equal(kept[k], case.statistics.tensors[k]) for k in kept)
