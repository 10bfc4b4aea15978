"""Losses on disk: computed once, whoever asks, whatever happened to the file."""

import json

import pytest

from adasearch.losses import LossBook

SETS = [frozenset(), frozenset({"model.layers.0.mlp"}), frozenset({"model.layers.0.mlp", "model.layers.1.self_attn"})]


def counted():
    asked = []

    def compute(gone):
        asked.append(gone)
        return 1.0 / 3.0 + len(gone)

    return compute, asked


def test_is_computed_once_and_read_by_the_next(tmp_path):
    compute, asked = counted()
    first = LossBook(tmp_path / "a" / "book.jsonl", compute)
    assert [first(gone) for gone in (*SETS, *SETS)] == [1 / 3 + n for n in (0, 1, 2, 0, 1, 2)]
    assert asked == SETS
    again = LossBook(tmp_path / "a" / "book.jsonl", compute)
    assert [again(gone) for gone in SETS] == [1 / 3 + n for n in range(3)]
    assert asked == SETS


@pytest.mark.parametrize(
    "damage", ["", "{", "[]\n", '{"gone": 3, "loss": 1}\n', '{"gone": [], "loss": NaN}\n', "\x00" * 9]
)
def test_a_damaged_line_is_computed_again(tmp_path, damage):
    compute, asked = counted()
    path = tmp_path / "book.jsonl"
    path.write_text(json.dumps({"gone": sorted(SETS[1]), "loss": 7.0}) + "\n" + damage)
    book = LossBook(path, compute)
    assert book(SETS[1]) == 7.0
    assert book(SETS[0]) == 1 / 3
    assert asked == [SETS[0]]


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path):
    compute, asked = counted()
    (tmp_path / "file").write_text("no folder")
    book = LossBook(tmp_path / "file" / "book.jsonl", compute)
    assert book(SETS[0]) == book(SETS[0]) == 1 / 3
    assert len(asked) == 1
