"""Each depth rule against its definition, by brute force, on a tiny model or on losses and cosines made up."""

import itertools
import random
from types import SimpleNamespace

import pytest
import torch

from adasearch import models
from adasearch.config import Component
from adasearch.pruning import calibration, depth
from adasearch.pruning.depth import DepthContext
from adasearch.pruning.depth.two_stage import attention_count
from adasearch.pruning.masking import SublayerLoss
from adasearch.pruning.statistics import Statistics
from adasearch.registry import DEPTH
from tests.pruning.sample import made_boundaries, tokens
from tests.tiny import tiny_config, tiny_structure, tiny_weights

LAYERS = 5
ATTENTION, MLP = 100, 300


def _costs(layers=LAYERS):
    parts = (("self_attn", ATTENTION), ("mlp", MLP))
    return {f"model.layers.{i}.{part}": cost for i in range(layers) for part, cost in parts}


def _context(room, *, loss=None, tensors=None, layers=LAYERS, removed=0.3, seed=0):
    return DepthContext(
        layers=layers,
        costs=_costs(layers),
        room=room,
        share_removed=removed,
        statistics=Statistics(tokens=1, tensors=tensors or {}),
        loss=loss or (lambda gone: 0.0),
        seed=seed,
    )


def _choose(context, name, **options):
    return depth.choose(context, Component(type=name, options=DEPTH.get(name).options(**options)))


def _paths(*layers):
    return tuple(f"model.layers.{i}.{part}" for i in layers for part in ("self_attn", "mlp"))


def _cosines(layers, attention, mlp):
    rows = {"": layers, ".self_attn": attention, ".mlp": mlp}
    return {
        f"cosine/model.layers.{i}{part}/mean": torch.tensor(c) for part, row in rows.items() for i, c in enumerate(row)
    }


@pytest.fixture(scope="module")
def tiny():
    """A tiny model of five layers, its structure, and the loss without some of its sublayers."""
    config = tiny_config(num_hidden_layers=LAYERS)
    structure, _ = tiny_structure(config)
    model = models.assemble(models.empty_model(config), tiny_weights(config, torch.float64)).eval()
    return SimpleNamespace(model=model, structure=structure, loss=SublayerLoss(model, tokens()))


class TestContext:
    def test_items(self):
        context = _context(0)
        assert context.items("layer") == tuple(_paths(i) for i in range(LAYERS))
        assert context.items("layer", 1, 2) == (_paths(1), _paths(2))
        assert context.items("sublayer", 4) == (("model.layers.4.self_attn",), ("model.layers.4.mlp",))
        assert context.items("attention", 3, 1) == (("model.layers.3.self_attn",),)
        assert context.items("mlp", 3, 1) == (("model.layers.3.mlp",),)

    def test_an_item_that_does_not_fit_lets_smaller_ones_pass(self):
        context = _context(450)
        order = [("model.layers.2.mlp",), ("model.layers.1.mlp",), ("model.layers.1.self_attn",)]
        assert context.fitting(order) == (order[0], order[2])

    def test_one_layer_stays_whole(self):
        context = _context(10_000)
        order = [(f"model.layers.{i}.self_attn",) for i in range(LAYERS)]
        assert context.fitting([*order, ("model.layers.0.mlp",)]) == (*order[:-1], ("model.layers.0.mlp",))


class TestBlockInfluence:
    tensors = _cosines([0.9, 0.5, 0.95, 0.99, 0.7], [0.8, 0.1, 0.2, 0.97, 0.3], [0.4, 0.6, 0.98, 0.96, 0.5])

    def test_layers_go_by_their_cosine(self):
        context = _context(3 * 400 + 399, tensors=self.tensors)
        assert _choose(context, "block_influence") == _paths(3, 2, 0)
        assert _choose(context, "block_influence", protect_last=2, protect_first=1) == _paths(2, 1)
        assert _choose(context, "block_influence", share=0.6) == _paths(3, 2)

    def test_sublayers_go_by_theirs(self):
        context = _context(750, tensors=self.tensors)
        expected = ("model.layers.2.mlp", "model.layers.3.self_attn", "model.layers.3.mlp")
        assert _choose(context, "block_influence", unit="sublayer") == expected
        assert _choose(context, "block_influence", unit="attention")[:2] == (
            "model.layers.3.self_attn",
            "model.layers.0.self_attn",
        )
        assert _choose(context, "block_influence", unit="mlp") == ("model.layers.2.mlp", "model.layers.3.mlp")

    def test_equal_cosines_go_from_the_input_up(self):
        context = _context(800, tensors=_cosines([0.5] * LAYERS, [0.5] * LAYERS, [0.5] * LAYERS))
        assert _choose(context, "block_influence") == _paths(0, 1)


class TestWindow:
    @pytest.mark.parametrize("distance", ["cosine", "angular"])
    @pytest.mark.parametrize("seed", range(4))
    @pytest.mark.parametrize("size", [1, 2, 3, 4])
    def test_is_the_best_of_all_windows(self, distance, seed, size):
        tensors = made_boundaries(LAYERS, seed)
        cosine, angle = tensors.values()
        starts = range(LAYERS - size + 1)
        if distance == "cosine":
            start = max(starts, key=lambda i: cosine[i, i + size])
        else:
            start = min(starts, key=lambda i: angle[i, i + size])
        chosen = _choose(_context(size * 400 + 300, tensors=tensors), "window", distance=distance)
        assert chosen == _paths(*range(start, start + size))

    def test_boundaries_are_the_cosines_and_angles_of_the_hidden_states(self, tiny):
        after = []
        handle = tiny.model.get_submodule("model.layers.4").register_forward_hook(lambda _, __, out: after.append(out))
        with torch.no_grad():
            states = tiny.model(input_ids=tokens(), use_cache=False, output_hidden_states=True).hidden_states
        handle.remove()
        states = [*states[:-1], after[0]]
        for budget in (1, 24, 1000):
            needs = frozenset({"boundaries", "cosine"})
            found = calibration.collect(tiny.model, tiny.structure, tokens(), needs, token_budget=budget)
            far = found.boundaries()
            assert far.cosine.shape == far.angle.shape == (LAYERS + 1, LAYERS + 1)
            for i, j in itertools.product(range(LAYERS + 1), repeat=2):
                cosines = torch.cosine_similarity(states[i], states[j], dim=-1).clamp(-1, 1)
                assert float(far.cosine[i, j]) == pytest.approx(float(cosines.mean()), abs=1e-6)
                assert float(far.angle[i, j]) == pytest.approx(float(cosines.arccos().mean() / torch.pi), abs=3e-4)
            for i in range(LAYERS):
                assert float(far.cosine[i, i + 1]) == pytest.approx(found.cosine(f"model.layers.{i}"), abs=1e-6)

    def test_boundaries_of_two_samples_merge(self, tiny):
        parts = [
            calibration.accumulate(tiny.model, tiny.structure, part, frozenset({"boundaries"})).boundaries()
            for part in (tokens()[:2], tokens()[2:], tokens())
        ]
        both = parts[0].merge(parts[1])
        assert both.count == parts[2].count
        torch.testing.assert_close(both.cosine, parts[2].cosine, rtol=0, atol=1e-6)
        torch.testing.assert_close(both.angle, parts[2].angle, rtol=0, atol=1e-6)


class TestGreedyLoss:
    @pytest.mark.parametrize(("unit", "room"), [("layer", 800), ("sublayer", 900), ("attention", 300), ("mlp", 900)])
    def test_each_step_is_the_best_of_all_that_fit(self, tiny, unit, room):
        context = _context(room, loss=tiny.loss)
        chosen = _choose(context, "greedy_loss", unit=unit)
        gone = ()
        while True:
            left = [i for i in context.items(unit) if i[0] not in gone and context.fits(frozenset((*gone, *i)))]
            if not left:
                break
            losses = [tiny.loss(frozenset((*gone, *item))) for item in left]
            gone = (*gone, *left[losses.index(min(losses))])
        assert chosen == gone
        assert len(chosen) > 1

    def test_removals_interact(self):
        """Each of 1 and 2 may go, not both: asked once the two cheapest go, asked again the next one does."""
        single = [0.5, 0.1, 0.2, 0.3, 0.9]

        def loss(gone):
            layers = {depth.layer_of(path) for path in gone}
            return sum(single[i] for i in layers) + 5.0 * (layers >= {1, 2})

        assert _choose(_context(800, loss=loss), "greedy_loss", again=False) == _paths(1, 2)
        assert _choose(_context(800, loss=loss), "greedy_loss") == _paths(1, 3)
        assert _choose(_context(800, loss=loss), "greedy_loss", protect_first=2, protect_last=1) == _paths(2, 3)

    def test_asks_from_the_top_down(self):
        asked = []
        _choose(_context(400, loss=lambda gone: asked.append(min(map(depth.layer_of, gone))) or 0.0), "greedy_loss")
        assert asked == [4, 3, 2, 1, 0]


class TestTwoStage:
    @pytest.mark.parametrize("removed", [0.0, 0.1, 0.4, 0.7, 1.0])
    @pytest.mark.parametrize("alpha", [0.5, 1.5, 4.0])
    def test_count_is_its_formula(self, removed, alpha):
        context = _context(0, layers=12, removed=removed)
        assert attention_count(context, alpha) == round(12 * removed ** ((MLP / ATTENTION) / alpha))

    def test_takes_attention_greedily_within_the_room(self, tiny):
        greedy = _choose(_context(400, loss=tiny.loss), "greedy_loss", unit="attention")
        assert len(greedy) == 4
        # round(5 * 0.7 ** (3 / 1.5)) = 2
        assert _choose(_context(400, loss=tiny.loss, removed=0.7), "two_stage") == greedy[:2]
        assert _choose(_context(400, loss=tiny.loss, removed=0.9), "two_stage") == greedy[:4]
        assert _choose(_context(199, loss=tiny.loss, removed=0.7), "two_stage") == greedy[:1]


class TestGenetic:
    @pytest.mark.parametrize("seed", range(5))
    def test_finds_the_optimum_of_a_small_problem(self, seed):
        draw = random.Random(seed)
        parts = [draw.random() for _ in range(10)]
        pairs = {pair: draw.random() * 0.3 for pair in itertools.combinations(range(10), 2)}

        def loss(gone):
            layers = sorted({depth.layer_of(path) for path in gone})
            return sum(parts[i] for i in layers) + sum(pairs[p] for p in itertools.combinations(layers, 2))

        best = min(itertools.combinations(range(10), 4), key=lambda layers: loss(_paths(*layers)))
        context = _context(4 * 400, loss=loss, layers=10, seed=seed)
        assert _choose(context, "genetic", generations=15, population=30) == _paths(*best)

    @pytest.mark.parametrize("unit", ["layer", "sublayer"])
    def test_sets_fill_the_room_and_are_measured_once(self, unit):
        asked = []

        def loss(gone):
            asked.append(gone)
            return random.Random(len(asked)).random()

        context = _context(1200, loss=loss, layers=8)
        _choose(context, "genetic", unit=unit)
        assert len(set(asked)) == len(asked) > 20
        for gone in asked:
            assert context.fits(gone)
            assert not [i for i in context.items(unit) if i[0] not in gone and context.fits(gone | set(i))]

    def test_follows_its_seed(self):
        def run(seed):
            asked = []
            context = _context(1600, loss=lambda gone: asked.append(gone) or 0.0, layers=12, seed=seed)
            _choose(context, "genetic")
            return asked

        assert run(1) == run(1) != run(2)
