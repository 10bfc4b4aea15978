"""What every rule for hidden dimensions owes its callers; a new file in the folder is tested by being there."""

import dataclasses

import pytest
import torch

from adasearch import models
from adasearch.config import Component
from adasearch.pruning import hidden
from adasearch.pruning.hidden import HiddenContext
from adasearch.pruning.statistics import FAMILIES, Statistics
from adasearch.registry import HIDDEN
from adasearch.tuning.recovery import RecoveryContext
from adasearch.tuning.sparsification import Goal, sparsify
from tests.pruning.sample import sample


@pytest.mark.parametrize("name", HIDDEN.names())
class TestHiddenContract:
    def _component(self, name):
        return Component(type=name, options=HIDDEN.get(name).options())

    def _context(self, case, statistics=None):
        def train(start, number, options):
            run = dataclasses.replace(options, tokens=120, length=10, batch=3, distill=0.0)
            model = models.assemble(models.empty_model(case.config), case.weights)
            return sparsify(model, case.structure, case.tokens.flatten(), Goal(start, number, run), RecoveryContext())

        given = {"structure": case.structure, "weights": case.weights, "train": train}
        return HiddenContext(statistics=statistics or case.statistics, **given)

    def test_registers_its_file_name_and_frozen_options_that_say_how_much_goes(self, name):
        entry = HIDDEN.get(name)
        assert entry.name == name
        options = entry.options()
        assert dataclasses.is_dataclass(options)
        assert 0 <= options.remove < 1
        assert entry.function.__doc__
        assert hidden.needs(self._component(name)) <= FAMILIES
        ranked = {"check"} if hasattr(options, "rank") else set()
        assert set(entry.facts) == {"needs", "learns"} | ranked

    def test_keeps_as_many_as_asked_ascending_and_says_so_again(self, name):
        case = sample()
        before = {k: w.clone() for k, w in case.weights.items()}
        for number in (1, 18, 24):
            found = hidden.kept(self._context(case), self._component(name), number)
            assert list(found) == sorted(set(found))
            assert len(found) == number
            assert set(found) <= set(range(24))
            assert found == hidden.kept(self._context(case), self._component(name), number)
        assert all(torch.equal(before[k], case.weights[k]) for k in before)

    def test_reads_no_more_than_it_needs(self, name):
        case = sample()
        needed = hidden.needs(self._component(name))
        part = {k: t for k, t in case.statistics.tensors.items() if k.split("/")[0] in needed}
        few = Statistics(tokens=case.statistics.tokens, tensors=part)
        args = (self._component(name), 12)
        assert hidden.kept(self._context(case, few), *args) == hidden.kept(self._context(case), *args)
