import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adasearch.config import COMPONENTS, SpaceConfig, TrialConfig, merged
from adasearch.errors import ConfigError
from adasearch.search.parameters import CategoricalParameter, Encoding, FloatParameter, IntParameter
from adasearch.search.space import Space
from tests.search.synthetic import BASE, DIMENSIONS, FAKES, RECIPES

UNITS = st.lists(st.floats(0, 1), min_size=10, max_size=10)


def space_of(dimensions, base=BASE, seed=7):
    return Space.from_config(SpaceConfig(name="test", dimensions=dimensions), base, seed=seed)


@pytest.fixture(scope="module")
def space():
    real = dict(COMPONENTS)
    COMPONENTS.update(FAKES)
    yield space_of(DIMENSIONS)
    COMPONENTS.update(real)


def test_parameters_are_named_by_path_in_the_order_of_the_file(space):
    assert list(space.parameters) == [
        "calibration.samples",
        "importance",
        "importance.taylor.grain",
        "importance.taylor.power",
        "recovery",
        "recovery.rank",
        "recovery.lora.lr",
        "allocation.layer_profile.mlp.0",
        "allocation.layer_profile.mlp.1",
        "allocation.layer_profile.attention.0",
    ]


@given(units=UNITS)
def test_every_point_of_the_cube_is_a_trial(space, units):
    config = space.decode(space.encoding.from_units(np.array(units)))
    assert config.seed == 7
    assert TrialConfig.from_dict(config.to_dict(), "") == config


@given(units=UNITS)
def test_encode_gives_back_the_active_parameters(space, units):
    params = space.encoding.from_units(np.array(units))
    config = space.decode(params)
    back = space.encode(config.to_dict())
    assert back is not None
    assert space.decode(back) == config
    active = space.active(params)
    assert space.active(back) == active
    assert {name: back[name] for name in active} == {name: params[name] for name in active}


@given(units=UNITS, other=UNITS)
def test_points_have_equal_features_exactly_if_they_are_the_same_trial(space, units, other):
    one, two = (space.encoding.from_units(np.array(u)) for u in (units, other))
    two["importance"] = one["importance"] = "wanda_sp"
    two = {**two, **{name: one[name] for name in space.active(two) & space.active(one)}}
    two["recovery"] = one["recovery"]
    two = {**two, **{name: one[name] for name in space.active(one)}}
    assert np.array_equal(space.features(one), space.features(two))
    assert space.point_key(one) == space.point_key(two)
    assert space.decode(one).key == space.decode(two).key


@given(units=UNITS, seed=st.integers(0, 1000))
def test_features_lie_in_the_cube_and_mutants_are_trials(space, units, seed):
    params = space.encoding.from_units(np.array(units))
    mutant = space.encoding.mutated(params, np.random.default_rng(seed))
    for point in (params, mutant):
        row = space.features(point)
        assert row.shape == (space.encoding.num_columns,)
        assert ((row >= 0) & (row <= 1)).all()
        space.decode(point)


def test_inactive_parameters_change_nothing(space):
    params = space.encoding.from_units(np.full(10, 0.1)) | {"importance": "obs", "recovery": "none"}
    other = params | {"importance.taylor.power": 1.9, "recovery.rank": 32, "recovery.lora.lr": 5e-4}
    assert space.decode(params) == space.decode(other)
    assert space.decode(params).recovery.to_dict() == {"type": "none"}


def test_recipes_are_points_or_say_why_not(space):
    params = space.encode(merged(BASE, RECIPES["obs_lora"]))
    assert params is not None
    assert params["recovery.rank"] == 16
    assert params["allocation.layer_profile.mlp.0"] == 0.0
    assert space.encode(merged(BASE, RECIPES["elsewhere"])) is None
    assert "allocation.type" in space.obstacle(merged(BASE, RECIPES["elsewhere"]))
    far = merged(BASE, {"recovery": {"type": "lora", "rank": 5}})
    assert "recovery.rank: 5 is not among 4, 8, 16, 32" in space.obstacle(far)


@pytest.mark.usefixtures("fakes")
def test_what_a_recipe_leaves_to_a_study_that_leaves_it_open_is_the_middle_of_the_space():
    space = space_of({"calibration.samples": {"int": [2, 6]}})  # the default lies outside
    recipe = {key: item for key, item in BASE.items() if key != "calibration"}
    corpus = BASE["calibration"]
    params = space.encode({**recipe, "calibration": corpus})
    assert params == {"calibration.samples": 4}
    assert space.encode({**recipe, "calibration": {**corpus, "samples": 3}}) == {"calibration.samples": 3}
    assert space.encode({**recipe, "calibration": {**corpus, "samples": 32}}) is None


@pytest.mark.usefixtures("fakes")
def test_mappings_may_be_choices():
    space = space_of({"recovery": {"choice": ["none", {"type": "lora", "rank": 4}, {"type": "lora", "rank": 32}]}})
    for rank in (4, 32):
        params = space.encode(merged(BASE, {"recovery": {"type": "lora", "rank": rank}}))
        assert params is not None
        assert space.decode(params).recovery.options.rank == rank


@pytest.mark.usefixtures("fakes")
def test_an_option_that_only_some_entries_have_is_active_only_there():
    space = space_of({"recovery": {"choice": ["none", "lora"]}, "recovery.rank": {"int": [2, 64], "log": True}})
    assert space.active({"recovery": "none", "recovery.rank": 4}) == {"recovery"}
    assert space.active({"recovery": "lora", "recovery.rank": 4}) == {"recovery", "recovery.rank"}


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(
    ("dimensions", "where", "problem"),
    [
        ({"calibraton.samples": {"int": [1, 2]}}, "space.calibraton.samples", "did you mean 'calibration'"),
        ({"calibration.sampels": {"int": [1, 2]}}, "space.calibration.sampels", "did you mean 'samples'"),
        ({"importance": {"choice": ["taylr"]}}, "space.importance", "did you mean 'taylor'"),
        ({"importance": {"int": [1, 2]}}, "space.importance", "must be a choice"),
        ({"importance.taylor.gran": {"choice": ["element"]}}, "space.importance.taylor.gran", "did you mean 'grain'"),
        ({"recovery.rank": {"int": [1, 4]}}, "space.recovery.rank", "recovery is only ever none"),
        ({"importance.taylor.grain": {"choice": ["element"]}}, "space.importance.taylor.grain", "never active"),
        ({"importance.taylr.grain": {"choice": ["element"]}}, "space.importance.taylr.grain", "did you mean 'taylor'"),
        ({"importance.nosuch.grain": {"choice": ["element"]}}, "space.importance.nosuch.grain", "known: obs, taylor"),
        ({"importance": {"choice": []}}, "space.importance.choice", "at least one value"),
        ({"calibration.samples": {"float": [0.2, 0.1]}}, "space.calibration.samples.float", "low <= high"),
        ({"allocation.layer_profile": {"layer_levels": {}}}, "space.allocation.layer_profile.layer_levels", "layers"),
        (
            {"allocation.layer_profile": {"layer_levels": {"layers": 3, "levels": 1}}},
            "space.allocation.layer_profile.layer_levels.levels",
            "greater than or equal to 2",
        ),
        ({"calibration.samples": {"int": [0, 4]}}, "space.calibration.samples", "greater than or equal to 1"),
        ({"calibration.samples": {"int": [9, 4]}}, "space.calibration.samples.int", "low <= high"),
        ({"calibration.samples": {"int": [0, 4], "log": True}}, "space.calibration.samples.int", "start at 1"),
        ({"calibration.samples": {"int": [1, 4], "lgo": True}}, "space.calibration.samples.int.lgo", "mean 'log'"),
        ({"calibration.samples": {"itn": [1, 4]}}, "space.calibration.samples", "did you mean 'int'"),
        ({"units.attention": {"choice": ["head", "heads"]}}, "space.units.attention", "given 'heads'"),
        ({"units.attention": {"choice": ["head", "head"]}}, "space.units.attention.choice", "twice"),
        ({"allocation.layer_profile": {"layer_profile": {}}}, "space.allocation.layer_profile.layer_profile", "term"),
    ],
)
def test_errors_name_the_line(dimensions, where, problem):
    with pytest.raises(ConfigError) as caught:
        space_of(dimensions)
    assert caught.value.where == where
    assert problem in str(caught.value)


@pytest.mark.usefixtures("fakes")
@pytest.mark.parametrize(("dimensions", "number"), [
    ({"importance": {"choice": ["taylor", "obs"]}, "importance.taylor.grain": {"choice": ["element", "vector"]}}, 3),
    ({"calibration.samples": {"int": [8, 40], "log": True}, "calibration.length": {"int": [8, 32], "step": 8}}, 132),
    ({"calibration.samples": {"int": [8, 8]}, "importance": {"choice": ["obs"]}}, 1),
    ({"importance": {"choice": ["taylor"]}, "importance.taylor.power": {"float": [0.5, 0.5]}}, 1),
    ({"importance": {"choice": ["taylor"]}, "importance.taylor.power": {"float": [0.5, 0.6]}}, np.inf),
    ({"allocation.layer_profile": {"layer_levels": {"layers": 20}}}, np.inf),
])  # fmt: skip
def test_points_are_counted_by_what_has_an_effect(dimensions, number):
    assert space_of(dimensions).num_points == number


@pytest.mark.usefixtures("fakes")
def test_a_space_is_exhausted_when_every_point_is_known():
    space = space_of(
        {"importance": {"choice": ["taylor", "obs"]}, "importance.taylor.grain": {"choice": ["element", "vector"]}}
    )
    points = [{"importance": i, "importance.taylor.grain": g} for i, g in (("taylor", "element"), ("obs", "element"))]
    assert space.exhausted(points) is None
    assert space.exhausted([*points, {**points[1], "importance.taylor.grain": "vector"}]) is None  # the same trial
    last = {"importance": "taylor", "importance.taylor.grain": "vector"}
    assert space.exhausted([*points, last]) == "all 3 points of the space have been tried"


@pytest.mark.usefixtures("fakes")
def test_columns_are_counted():
    space = space_of({"allocation.layer_profile": {"layer_profile": {"terms": 25}}})
    assert space.encoding.num_columns == 25


PARAMETERS = st.one_of(
    st.builds(lambda a, b: FloatParameter(low=min(a, b), high=max(a, b)), st.floats(-9, 9), st.floats(-9, 9)),
    st.builds(lambda a, b: FloatParameter(low=a, high=a * b, log=True), st.floats(1e-6, 1), st.floats(1, 1e6)),
    st.builds(lambda a, n, s: IntParameter(low=a, high=a + n * s, step=s), *[st.integers(1, 9)] * 3),
    st.builds(lambda a, n: IntParameter(low=a, high=a + n, log=True), st.integers(1, 9), st.integers(0, 500)),
)  # fmt: skip


@given(parameter=PARAMETERS, unit=st.floats(0, 1))
@settings(suppress_health_check=[HealthCheck.filter_too_much])
def test_numbers_survive_the_way_through_the_cube(parameter, unit):
    item = parameter.from_unit(unit)
    assert parameter.low <= item <= parameter.high
    assert 0 <= parameter.to_unit(item) <= 1
    again = parameter.from_unit(parameter.to_unit(item))
    assert again == item if isinstance(parameter, IntParameter) else again == pytest.approx(item, rel=1e-9, abs=1e-12)


def test_different_choices_lie_at_distance_one():
    encoding = Encoding(
        {"three": CategoricalParameter(choices=("a", "b", "c")), "two": CategoricalParameter(choices=(1, 2))}
    )
    rows = [encoding.features({"three": item, "two": 1}, {"three", "two"}) for item in "abc"]
    assert encoding.num_columns == 4
    assert np.linalg.norm(rows[0] - rows[1]) == pytest.approx(1.0)
    assert np.linalg.norm(rows[0] - encoding.features({"three": "a", "two": 2}, {"three", "two"})) == pytest.approx(1.0)
