"""Outlines: what is left is an ordinary smaller model, counted in closed form, that computes what it should."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adasearch import loading, models, outlined
from adasearch.models import BaseModel
from adasearch.pruning import architectures, calibration, surgery
from adasearch.pruning.plan import PruningPlan, check_plan, make_plan
from adasearch.pruning.projection import project, removal
from adasearch.pruning.structure import Outline, count_outlined, sizes
from adasearch.registry import EXPORT
from adasearch.sections import BudgetConfig
from adasearch.tuning import decoder
from adasearch.tuning.export import Goods, ModelCard
from tests.tiny import FAMILIES, tiny_config, tiny_structure, tiny_tokenizer, tiny_weights

LAYERS = 4
SUBLAYERS = [f"model.layers.{i}.{part}" for i in range(3) for part in ("self_attn", "mlp")]
OUTLINES = {
    "layer": Outline(gone=("model.layers.1.self_attn", "model.layers.1.mlp")),
    "attention": Outline(gone=("model.layers.0.self_attn", "model.layers.2.self_attn")),
    "mlp": Outline(gone=("model.layers.3.mlp",)),
    "mixed": Outline(
        gone=("model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.mlp", "model.layers.3.self_attn")
    ),
    "hidden": Outline(hidden=(*range(5), *range(7, 20))),
    "all": Outline(gone=("model.layers.2.mlp",), hidden=(*range(3, 21),)),
}  # fmt: skip
IDS = torch.randint(3, 200, (3, 17), generator=torch.Generator().manual_seed(5))


def make_base(family="llama", **changes):
    config = tiny_config(family, num_hidden_layers=LAYERS, **changes)
    weights = tiny_weights(config)
    shape = models.shape_of(config)
    return BaseModel(folder=Path("/nowhere"), config=config, tokenizer=tiny_tokenizer(), shape=shape, weights=weights,
                     dtype=torch.float32)  # fmt: skip


def cut_to(base, outline):
    """The smaller base, and its structure."""
    dense = architectures.describe(base.shape, tiny_structure(base.config)[1])
    small = outlined.outlined(base, dense, outline)
    left = architectures.describe(small.shape, tiny_structure(base.config)[1])
    return small, dataclasses.replace(left, outline=outline, origin=dense)


@torch.no_grad()
def logits(base):
    return models.dense_model(base)(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", OUTLINES)
class TestOutlined:
    def test_is_counted_in_closed_form(self, family, name):
        base, outline = make_base(family), OUTLINES[name]
        small, structure = cut_to(base, outline)
        dense = structure.dense
        assert sum(p.numel() for p in models.dense_model(small).parameters()) == structure.parameters
        assert count_outlined(base.shape, dense, outline) == structure.parameters
        named = {outline.dense_name(key, LAYERS): dims for key, dims in small.shape.shapes.items()}
        assert named == sizes(base.shape, dense, outline)
        assert small.outline == outline
        assert not any(w.data_ptr() == base.weights[key].data_ptr() and w.shape != base.weights[key].shape
                       for key, w in small.weights.items() if key in base.weights)  # fmt: skip

    def test_fast_decoder_computes_what_transformers_does(self, family, name):
        small, _ = cut_to(make_base(family), OUTLINES[name])
        model = models.dense_model(small)
        with torch.no_grad():
            expected = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state
            torch.testing.assert_close(decoder.hidden_states(model, IDS), expected, rtol=1e-4, atol=1e-5)

    def test_generates_the_same_with_a_cache(self, family, name):
        small, _ = cut_to(make_base(family), OUTLINES[name])
        model = models.dense_model(small)
        options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(
            model.generate(IDS, use_cache=True, **options), model.generate(IDS, use_cache=False, **options)
        )

    def test_widths_are_cut_and_calibrated_on_it(self, family, name):
        small, structure = cut_to(make_base(family), OUTLINES[name])
        found = calibration.collect(
            models.dense_model(small), structure, IDS, frozenset({"moments", "gradient", "cosine"})
        )
        for group in structure.groups:
            assert found.moments(group.output).mean.shape == (group.units * group.output_block,)
        scores = {g.name: torch.arange(float(g.units)) for g in structure.groups}
        widths = {g.name: g.width - 1 for g in structure.groups}
        plan = make_plan(structure, tiny_structure(small.config)[1], scores, widths)
        model = surgery.cut(small.config, small.weights, structure, plan)
        assert sum(p.numel() for p in model.parameters()) == plan.parameters
        assert plan.dense_parameters == structure.dense.parameters
        zeroed = surgery.zeroed(small.config, small.weights, structure, plan)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=IDS).logits, zeroed(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
        by_dense_name = plan.dense_widths(structure)
        assert set(by_dense_name) == {g.name for g in structure.dense.groups}
        assert all(by_dense_name[path] == 0 for path in OUTLINES[name].gone)
        assert sum(by_dense_name.values()) == sum(plan.widths(structure).values())


@pytest.mark.parametrize("family", FAMILIES)
class TestMeaning:
    def test_a_layer_that_goes_is_a_model_without_it(self, family):
        base = make_base(family)
        small, _ = cut_to(base, OUTLINES["layer"])
        config = copy.deepcopy(base.config)
        model = models.assemble(models.empty_model(config), {k: w.clone() for k, w in base.weights.items()})
        model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i != 1)
        with torch.no_grad():
            torch.testing.assert_close(logits(small), model(input_ids=IDS, use_cache=False).logits)

    @pytest.mark.parametrize("name", ["attention", "mlp", "mixed"])
    def test_a_sublayer_that_goes_adds_nothing(self, family, name):
        base = make_base(family)
        weights = {k: w.clone() for k, w in base.weights.items()}
        for path in OUTLINES[name].gone:
            for key in [k for k in weights if k.startswith((f"{path}.o_proj", f"{path}.down_proj"))]:
                weights[key].zero_()
        expected = logits(dataclasses.replace(base, weights=weights))
        torch.testing.assert_close(logits(cut_to(base, OUTLINES[name])[0]), expected, rtol=1e-5, atol=1e-6)

    def test_dimensions_that_are_always_zero_may_go(self, family):
        """Zero columns of all that writes to the stream: only the mean in the norm sees how many there are."""
        base, outline = make_base(family), OUTLINES["hidden"]
        gone = sorted(set(range(24)) - set(outline.hidden))
        weights = {k: w.clone() for k, w in base.weights.items()}
        structure = architectures.describe(base.shape, tiny_structure(base.config)[1])
        for piece in structure.stream:
            if piece.parameter.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight", "proj.bias")):
                weights[piece.parameter].index_fill_(piece.dim, torch.tensor(gone), 0.0)
        whole = dataclasses.replace(base, weights=weights)
        scaled = {k: w * math.sqrt(24 / 18) if "norm" in k and w.numel() == 24 else w for k, w in weights.items()}
        small, _ = cut_to(dataclasses.replace(base, weights=scaled), outline)
        small.config.rms_norm_eps = whole.config.rms_norm_eps * 24 / 18
        torch.testing.assert_close(logits(small), logits(whole), rtol=1e-4, atol=1e-5)


class TestBudget:
    @settings(max_examples=60, deadline=None)
    @given(
        remove=st.floats(0.05, 0.6),
        gone=st.sets(st.sampled_from([f"model.layers.{i}.{p}" for i in range(3) for p in ("self_attn", "mlp")])),
    )
    def test_widths_pay_what_the_outline_left(self, remove, gone):
        base = make_base()
        outline = Outline(gone=tuple(sorted(gone)))
        _, structure = cut_to(base, outline)
        budget = BudgetConfig(remove=round(remove, 4))
        need = removal(structure, budget)
        dense = structure.dense.parameters
        assert need == math.ceil(round(remove, 4) * dense - 1e-6) - (dense - structure.parameters)
        most = sum((g.width - 1) * g.step_cost for g in structure.groups)
        if need > most:
            return
        widths = project(structure, {g.name: 1.0 for g in structure.groups}, budget)
        left = structure.count(widths)
        assert dense - left >= remove * dense - 1
        if need <= 0:
            assert widths == structure.dense_widths()

    def test_a_plan_of_another_outline_is_refused(self):
        small, structure = cut_to(make_base(), OUTLINES["mlp"])
        units = tiny_structure(small.config)[1]
        plan = make_plan(structure, units, {}, {})
        check_plan(plan, structure)
        with pytest.raises(Exception, match="outline must be that of the model"):
            check_plan(plan, cut_to(make_base(), OUTLINES["attention"])[1])

    def test_a_plan_on_disk_holds_its_outline(self, tmp_path):
        small, structure = cut_to(make_base(), OUTLINES["all"])
        plan = make_plan(structure, tiny_structure(small.config)[1], {}, {})
        plan.save(tmp_path / "plan.json")
        assert PruningPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(("name", "layout"), [("layer", "stock"), ("mixed", "per_layer"), ("all", "per_layer")])
def test_an_export_opens_as_the_same_model(tmp_path, name, layout):
    small, structure = cut_to(make_base("qwen3"), OUTLINES[name])
    plan = make_plan(structure, tiny_structure(small.config)[1], {}, {})
    model = surgery.cut(small.config, small.weights, structure, plan)
    card = ModelCard(model="tiny", study="s")
    goods = Goods(model=model, base=small, structure=structure, plan=plan, card=card)
    entry = EXPORT.get("hf")
    report = entry.function(goods, tmp_path / "out", entry.options())
    assert report.layout == layout
    assert report.verified.sound
    opened = loading.load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(opened(input_ids=IDS).logits, model(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(OUTLINES[name].layers(LAYERS))
