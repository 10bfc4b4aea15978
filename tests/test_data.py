"""Corpora, their parts, and the tokens drawn from them."""

import json

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adasearch import corpora, data, passages
from adasearch.errors import ConfigError, DataError
from adasearch.sections import CalibrationConfig
from tests import tiny
from tests.tuning import sample

TOKENIZER = tiny.tiny_tokenizer()


def repository(root, name="owner/texts", column="text", rows=(), config="default", splits=("train",)):
    """Write a mirrored dataset repository with the same rows in every split."""
    folder = root / name
    files = []
    for split in splits:
        path = folder / config / f"{split}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        records = [row if isinstance(row, dict) else {column: row} for row in rows]
        datasets.Dataset.from_list(records).to_parquet(str(path))
        files.append(f"  - split: {split}\n    path: {config}/{split}.parquet\n")
    header = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n{''.join(files)}---\n"
    (folder / "README.md").write_text(header)
    return str(root)


def texts(count, words=150):
    return [" ".join(f"w{i}x{j}" for j in range(words)) for i in range(count)]


def check_parts(spec, root=None, least=40_000):
    """Check that no document is in two parts and that each part has about its share of the text."""
    parts = {part: data.documents(spec, part, root) for part in data.PARTS}
    everything = [text for found in parts.values() for text in found]
    assert len(everything) == len(set(everything))
    for part, (low, high) in data.PARTS.items():
        size = sum(map(len, parts[part]))
        assert size > least
        assert size / sum(map(len, everything)) == pytest.approx(high - low, abs=0.15)


@pytest.mark.parametrize("spec", passages.EMBEDDED)
def test_embedded_text_is_there_balanced_and_disjoint(spec):
    corpora.check_corpus(spec)
    check_parts(spec)


def test_an_edit_of_one_section_moves_no_other_document(monkeypatch):
    import pydoc_data.topics

    before = set(passages.pydoc())
    changed = dict(pydoc_data.topics.topics)
    changed["assert"] = changed["assert"].replace("debugging", "whatever")
    monkeypatch.setattr(pydoc_data.topics, "topics", changed)
    assert len(before ^ set(passages.pydoc())) == 2


@given(st.lists(st.text(min_size=1), max_size=30))
def test_the_part_of_a_document_depends_on_its_text_alone(found):
    assert [data.part_of(text) for text in found] == [data.part_of(text) for text in found]
    assert all(data.part_of(text) in data.PARTS for text in found)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pydco", "did you mean 'pydoc'"),
        ("missing.txt", "must exist"),
        ("owner/texts:defualt", "did you mean 'default'"),
        ("owner/texts::test", "no split 'test'; known: train"),
        ("owner/other", "HF_HUB_OFFLINE"),
        ("owner/a:b:c:d", "owner/name[:config[:split]]"),
    ],
)
def test_unknown_corpora_are_refused_without_reading(tmp_path, monkeypatch, spec, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = repository(tmp_path, rows=["a"])
    with pytest.raises(ConfigError) as caught:
        corpora.check_corpus(spec, root, "trial.calibration.corpus")
    assert caught.value.where == "trial.calibration.corpus"
    assert words in str(caught.value)


def test_known_corpora_pass_the_check(tmp_path):
    root = repository(tmp_path, rows=["a"])
    for spec in ("pydoc", "owner/texts", "owner/texts:default", "owner/texts::train"):
        corpora.check_corpus(spec, root)
    corpora.check_corpus("owner/name:config:split", None)


def test_a_repository_is_read_from_the_mirror(tmp_path):
    rows = texts(60)
    root = repository(tmp_path, rows=rows)
    found = [text for part in data.PARTS for text in data.documents("owner/texts", part, root)]
    assert sorted(found) == sorted(rows)


def test_instructions_become_one_text_each(tmp_path):
    rows = [{"instruction": f"Do {i}", "input": "", "output": "done " * i} for i in range(1, 40)]
    root = repository(tmp_path, rows=rows)
    text = data.documents("owner/texts", "fit", root)[0]
    assert text.startswith("### Instruction:\nDo ")
    assert "### Response:\ndone" in text
    assert "### Input" not in text


@pytest.mark.parametrize("column", ["sentence", "text"])
def test_lines_are_joined_into_passages(tmp_path, column):
    root = repository(tmp_path, column=column, rows=[f"line {i} of a corpus" for i in range(3000)])
    assert 1000 < len(data.documents("owner/texts", "fit", root)[0]) < 2000


def test_headers_of_mirrors_are_read_as_far_as_they_go(tmp_path):
    for text, splits in (
        ("a title\n---\nis: no: header\n---\n", {}),
        ("---\nis: no: header\n---\n", {}),
        ("---\nconfigs:\n- data_files:\n  - path: a.parquet\n---\n", {"default": ["train"]}),
        ("---\nconfigs:\n- config_name: x\n  data_files:\n  - {split: test, path: a}\n---\n", {"x": ["test"]}),
    ):
        (tmp_path / "README.md").write_text(text)
        assert corpora._mirror_splits(tmp_path) == splits


def test_long_documents_are_cut(tmp_path):
    paragraphs = [f"{i} " * 100 for i in range(300)]
    root = repository(
        tmp_path, column="page", rows=["\n\n".join(paragraphs), "\n".join(paragraphs), " ".join(paragraphs)]
    )
    corpus = corpora.parse_corpus("owner/texts", root)
    found = data._documents(corpus)
    assert len(found) > 10
    assert max(map(len, found[:-1])) < 12_000


def test_rows_without_text_and_bad_splits_say_what_there_is(tmp_path):
    root = repository(tmp_path, column="audio", rows=["a"], splits=("train",))
    with pytest.raises(DataError, match="they have audio"):
        data.documents("owner/texts", "fit", root)
    with pytest.raises(DataError, match="has no split 'test'"):
        data.documents("owner/texts::test", "fit", root)
    with pytest.raises(DataError, match="Available: \\['default'\\]"):
        data.documents("owner/texts:other", "fit", root)


def test_files_are_corpora(tmp_path):
    rows = texts(50)
    (tmp_path / "a.txt").write_text("\n\n".join(rows))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    datasets.Dataset.from_list([{"text": row} for row in rows]).to_parquet(str(tmp_path / "c.parquet"))
    found = [data.documents(str(tmp_path / name), "fit") for name in ("a.txt", "b.jsonl", "c.parquet")]
    assert found[0] == found[1] == found[2]
    (tmp_path / "gaps.jsonl").write_text('{"text": null}\n' + (tmp_path / "b.jsonl").read_text())
    assert data.documents(str(tmp_path / "gaps.jsonl"), "fit") == found[0]
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match=r"none\.jsonl"):
        data.documents(str(tmp_path / "none.jsonl"), "fit")
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"bad\.jsonl"):
        data.documents(str(tmp_path / "bad.jsonl"), "fit")


def test_a_part_without_documents_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text("one word")
    empty = next(part for part in data.PARTS if part != data.part_of("one word"))
    with pytest.raises(DataError, match="too small"):
        data.documents(str(tmp_path / "a.txt"), empty)


@pytest.mark.parametrize("length", [16, 128, 2048])
def test_calibration_samples_are_drawn_by_seed(length):
    config = CalibrationConfig(corpus="pydoc", samples=6, length=length, draw=3)
    matrix = data.token_matrix(TOKENIZER, config)
    assert matrix.shape == (6, length)
    assert matrix.dtype == torch.long
    assert torch.equal(matrix, data.token_matrix(TOKENIZER, config))
    other = CalibrationConfig(corpus="pydoc", samples=6, length=length, draw=4)
    assert not torch.equal(matrix, data.token_matrix(TOKENIZER, other))


@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from([7, 64, 300]), st.integers(0, 5), st.booleans())
def test_calibration_samples_are_nested(tmp_path_factory, few, more, length, draw, embedded):
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.txt").write_text("\n\n".join(texts(25)))
    corpus = "pydoc" if embedded else str(folder / "a.txt")
    small, large = (
        data.token_matrix(TOKENIZER, CalibrationConfig(corpus=corpus, samples=n, length=length, draw=draw))
        for n in (few, few + more)
    )
    assert torch.equal(large[:few], small)


def test_the_version_of_a_corpus_changes_with_its_files(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = corpora.corpus_version(str(file))
    assert corpora.corpus_version(str(file)) == first
    file.write_text("two more")
    corpora.corpus_version.cache_clear()
    assert corpora.corpus_version(str(file)) != first
    root = repository(tmp_path, rows=texts(3))
    assert corpora.corpus_version("owner/texts", root) not in {first, corpora.corpus_version("pydoc")}


def test_calibration_windows_lie_in_the_fit_part_and_differ(tmp_path):
    root = repository(tmp_path, rows=texts(30))
    config = CalibrationConfig(corpus="owner/texts", samples=40, length=64, draw=0)
    matrix = data.token_matrix(TOKENIZER, config, root)
    fit = data.documents("owner/texts", "fit", root)
    windows = [TOKENIZER.decode(line) for line in matrix]
    assert all(any(window.strip() in text for text in fit) for window in windows)
    assert len(set(windows)) > 35


def test_too_little_text_for_one_window_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("some words\n\n" * 3 + "\n\n".join(texts(8, words=5)))
    config = CalibrationConfig(corpus=str(tmp_path / "a.txt"), samples=1, length=4096)
    with pytest.raises(DataError, match="a window needs 4096"):
        data.token_matrix(TOKENIZER, config)


def test_perplexity_reads_a_named_split_whole_and_else_the_report_part(tmp_path):
    rows = ["one line", "", "another"]
    root = repository(tmp_path, rows=rows, splits=("train", "test"))
    ids = data.perplexity_tokens(TOKENIZER, "owner/texts::test", root)
    assert TOKENIZER.decode(ids) == "one line\n\n\n\nanother"
    ids = data.perplexity_tokens(TOKENIZER, "pydoc")
    assert TOKENIZER.decode(ids[:40]) == data.documents("pydoc", "report")[0][:40]
    with pytest.raises(DataError, match="2048 are needed"):
        data.perplexity_tokens(TOKENIZER, "owner/texts::test", root, least=2048)


@pytest.mark.parametrize(
    "spec",
    [
        "allenai/c4:demo",
        "wikimedia/wikipedia:demo",
        "yahma/alpaca-cleaned:demo",
        "Salesforce/wikitext:wikitext-2-v1",
        "ptb",
    ],
)
def test_real_corpora_read_and_are_balanced(spec):
    root = sample.data_root()
    corpora.check_corpus(spec, root)
    check_parts(spec, root)
