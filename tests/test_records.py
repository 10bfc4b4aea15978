"""Records: written whole or not at all, checked when read."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from adasearch import records
from adasearch.config import TaskScore, TrialResult
from adasearch.errors import StorageError
from adasearch.racing import Rung
from adasearch.records import (
    DENSE,
    Failure,
    FinalRecord,
    Record,
    read_failures,
    read_finals,
    read_items,
    read_record,
    read_records,
    trial_folder,
    write_atomically,
    write_failure,
    write_final,
    write_items,
    write_record,
)

SCORE = TaskScore(
    task="t", n=3, acc=1 / 3, acc_stderr=0.1, acc_norm=None, acc_norm_stderr=None, margin=0.2, margin_stderr=0.01
)
RESULT = TrialResult(score=0.25, stderr=0.01, tasks=(SCORE,), parameters=10, widths={"g": 3}, items=3, stopped=False,
                     seconds={"cut": 0.5}, peak_bytes=5, notes={"loss_first": 2.0, "x": "y"},
                     rungs=(Rung(kind="divergence", share=0.0, value=0.4, stderr=0.1, seconds=0.2),
                            Rung(kind="recovered", share=0.3, value=0.2, stderr=0.1, seconds=1.0, gap=-0.1,
                                 bound=-0.01)))  # fmt: skip


def record(number=0, attempt=1, *, result=RESULT, failure=None) -> Record:
    return Record(number=number, attempt=attempt, recipe=None, config={"seed": 1}, result=result, failure=failure,
                  environment={"host": "h"})  # fmt: skip


def test_a_record_reads_back_equal(tmp_path):
    write_record(tmp_path, record())
    assert read_record(trial_folder(tmp_path, 0, 1)) == record()


def test_records_come_in_order_of_number_and_attempt(tmp_path):
    bad = record(2, 1, result=None, failure=Failure(kind="nan", message="m"))
    for one in (record(10), bad, record(2, 2), record(DENSE)):
        write_record(tmp_path, one)
    assert [(r.number, r.attempt) for r in read_records(tmp_path)] == [(DENSE, 1), (2, 1), (2, 2), (10, 1)]


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b.replace(b"0.25", b"0.75"), lambda b: b"\x00" * 9]
)
def test_a_damaged_record_counts_as_absent(tmp_path, damage):
    write_record(tmp_path, record())
    path = trial_folder(tmp_path, 0, 1) / "result.json"
    path.write_bytes(damage(path.read_bytes()))
    assert read_record(path.parent) is None
    assert read_records(tmp_path) == []


def test_items_keep_their_names_and_values(tmp_path):
    items = {"cloze/pydoc": np.array([0.1, -0.2]), "piqa:train": np.array([1.0])}
    write_items(tmp_path, items)
    again = read_items(tmp_path)
    assert again is not None
    assert {k: v.tolist() for k, v in again.items()} == {k: v.tolist() for k, v in items.items()}
    (tmp_path / "items.npz").write_bytes(b"junk")
    assert read_items(tmp_path) is None


def test_finals_read_back(tmp_path):
    facts = {"perplexity": {"pydoc@128": 9.5}, "parameters": 8, "removed": 0.2, "seconds": {}, "losses": (2.0, 1.5)}
    final = FinalRecord(
        name="trial3", trial=3, role="finalist", recipe=None, selected=(SCORE,), report=(SCORE,), export=None, **facts
    )
    write_final(tmp_path, final)
    assert read_finals(tmp_path) == [final]


def without(key: str, data):
    """Return plain data without `key` at any depth."""
    if isinstance(data, dict):
        return {name: without(key, item) for name, item in data.items() if name != key}
    return [without(key, item) for item in data] if isinstance(data, list) else data


def test_records_older_than_the_log_score_can_be_read(tmp_path):
    new = dataclasses.replace(SCORE, log_score=-0.5, log_score_stderr=0.1)
    write_record(tmp_path, record(result=dataclasses.replace(RESULT, tasks=(new,))))
    path = trial_folder(tmp_path, 0, 1) / "result.json"
    found = read_record(path.parent)
    assert found is not None
    assert found.result is not None
    assert found.result.tasks == (new,)
    body = json.loads(path.read_text())["body"]
    old = without("log_score", without("log_score_stderr", body))
    assert old != body
    records._write_checked(path, old)
    assert read_record(path.parent) == record()
    assert SCORE.log_score is None


def test_a_full_disk_leaves_the_old_file_and_no_draft(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_atomically(path, b"old")

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full; nothing finished is lost"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in Path(tmp_path).iterdir()] == ["a.json"]


def test_a_failure_counts_until_there_is_a_record(tmp_path):
    failure = Failure(kind="config", message="budget.remove: must be at most 0.4", phase="plan")
    write_failure(tmp_path, "flap-0123", failure)
    assert read_failures(tmp_path) == {"flap-0123": failure}
    facts = {"perplexity": {}, "parameters": 8, "removed": 0.2, "seconds": {}, "losses": (), "export": None}
    write_final(
        tmp_path,
        FinalRecord(name="flap-0123", trial=0, role="compared", recipe="flap", selected=(), report=(SCORE,), **facts),
    )
    assert read_failures(tmp_path) == {}


def test_what_a_reader_should_know_of_a_training_is_in_sentences():
    facts = {"trial": 0, "role": "finalist", "recipe": None, "selected": (), "report": (), "perplexity": {},
             "parameters": 1, "removed": 0.2, "seconds": {}, "export": None}  # fmt: skip
    assert FinalRecord(name="a", losses=(), **facts).training == ()
    curve = ((2, 2.5), (4, 2.0), (6, 2.25))
    told = FinalRecord(name="a", losses=(4.0, 3.0, 3.0, 3.0, 2.5, 2.5, 2.0, 1.0), validation=curve, ended="it was late",
                       dropped=3, epochs=3.36, **facts)  # fmt: skip
    assert told.training == (
        "loss 4.000 at first, 1.500 over the last quarter",
        "on text held out 2.000 at best, after 4 of 8 steps",
        "its text was gone through 3.4 times",
        "ended early: it was late",
        "3 documents with report items in them were left out",
    )
