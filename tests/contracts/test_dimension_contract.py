"""What every file in search/dimensions must do. A new kind needs one line: an example of its domain."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasearch.documents import parse
from adasearch.registry import DIMENSIONS
from adasearch.search.parameters import CategoricalParameter, FloatParameter, IntParameter

EXAMPLES = {
    "choice": [{"choices": [1, "a", None, {"type": "lora"}]}, {"choices": [4]}],
    "int": [{"range": [8, 128], "log": True}, {"range": [-4, 5], "step": 3}],
    "float": [{"range": [1e-5, 1e-3], "log": True}, {"range": [-1.0, 1.0]}],
    "layer_levels": [{"layers": 3}, {"layers": 2, "levels": 5, "attention": False}],
    "layer_profile": [{"terms": 5}, {"mlp": 3, "attention": 2, "bound": 0.7}],
}
CASES = [(kind, domain) for kind, domains in EXAMPLES.items() for domain in domains]


def test_every_kind_has_an_example():
    assert set(EXAMPLES) == set(DIMENSIONS.names())


@pytest.mark.parametrize(("kind", "domain"), CASES)
class TestDimensionContract:
    def made(self, kind, domain):
        entry = DIMENSIONS.get(kind)
        options = parse(entry.options, domain, kind)
        return entry, options, entry.function("a.path", options)

    def test_registers_its_file_name_and_has_defaults(self, kind, domain):
        entry = DIMENSIONS.get(kind)
        assert entry.name == kind
        entry.options()

    def test_parameters_are_named_below_the_path_in_a_stable_order(self, kind, domain):
        _, _, parameters = self.made(kind, domain)
        assert parameters
        assert list(parameters) == list(self.made(kind, domain)[2])
        assert all(name == "a.path" or name.startswith("a.path.") for name in parameters)
        assert all(isinstance(p, FloatParameter | IntParameter | CategoricalParameter) for p in parameters.values())

    @given(seed=st.integers(0, 10_000))
    def test_any_point_decodes_and_encodes_back(self, kind, domain, seed):
        entry, options, parameters = self.made(kind, domain)
        units = np.random.default_rng(seed).random(len(parameters))
        values = {name: p.from_unit(u) for (name, p), u in zip(parameters.items(), units, strict=True)}
        item = entry.facts["decode"](values, "a.path", options)
        assert entry.facts["encode"](item, "a.path", options) == values

    def test_what_is_outside_is_refused_with_a_reason(self, kind, domain):
        entry, options, _ = self.made(kind, domain)
        profiles = [{"mlp": [99.0]}, {"mlp": [99.0, 0.0, 0.0], "attention": [0.0] * 3}]
        for outside in profiles if kind.startswith("layer_") else ["elsewhere"]:
            with pytest.raises(ValueError, match=r"is|has"):
                entry.facts["encode"](outside, "a.path", options)
