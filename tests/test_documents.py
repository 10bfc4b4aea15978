"""YAML documents: what is read, what is refused, and where the message points."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasearch.documents import fingerprint, join, parse, plain, read_yaml
from adasearch.errors import ConfigError
from adasearch.racing import RacingConfig
from adasearch.sections import BudgetConfig, CalibrationConfig


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1e-4", {"a": 1e-4}),
        ("a: no", {"a": "no"}),
        ("a: true", {"a": True}),
        ("a: 2_000", {"a": 2000}),
        ("a: 1.5", {"a": 1.5}),
        ("a: on", {"a": "on"}),
    ],
)
def test_scalars_read_as_a_user_means_them(tmp_path, text, expected):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    assert read_yaml(path) == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: 1\na: 2", "stands twice"),
        ("- 1\n- 2", "must be a mapping"),
        ("a: [1, 2", "must be YAML"),
        ("a: !!python/object/apply:os.system ['true']", "must be YAML"),
        ("a: &a [1,1,1,1,1,1,1,1,1]\n" + "".join(
            f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(7)), "at most"),
    ],
)  # fmt: skip
def test_documents_that_are_refused(tmp_path, text, part):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=part) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="must be a readable text file"):
        read_yaml(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (BudgetConfig, {"remove": 1.5}, "s.yaml: budget.remove: .*less than 1, given 1.5"),
        (BudgetConfig, {"remove": float("nan")}, "s.yaml: budget.remove: .*finite"),
        (BudgetConfig, {"remov": 0.2}, "s.yaml: budget.remov: unknown key 'remov'; did you mean 'remove'"),
        (BudgetConfig, {}, "s.yaml: budget: must hold one of remove, latency and memory, holds none, given {}"),
        (BudgetConfig, {"remove": "much"}, "budget.remove: .*valid number.*given 'much'"),
        (CalibrationConfig, {"corpus": "pydoc", "length": 3}, "length: .*greater than or equal to 8, given 3"),
        (RacingConfig, {"rungs": [0.1, 2]}, "budget.rungs.1: .*less than 1"),
    ],
)
def test_wrong_values_name_file_key_and_value(cls, data, message):
    with pytest.raises(ConfigError, match=message):
        parse(cls, data, "s.yaml: budget")


def test_join_builds_the_path_of_a_key():
    assert join("a.yaml:", "b", "c") == "a.yaml: b.c"
    assert join("a.yaml: b", "c") == "a.yaml: b.c"
    assert join("", "b") == "b"
    assert join("a.yaml:") == "a.yaml"


_plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-10, 10)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(_plain)
def test_plain_is_idempotent_and_keeps_the_fingerprint(data):
    assert plain(plain(data)) == plain(data)
    assert fingerprint(data) == fingerprint(plain(data))


@given(st.dictionaries(st.text(max_size=4), st.integers(), min_size=2, max_size=5))
def test_fingerprint_does_not_see_the_order_of_keys(data):
    assert fingerprint(data) == fingerprint(dict(reversed(list(data.items()))))
