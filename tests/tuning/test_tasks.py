"""Items by role: disjoint, drawn by seed, the same everywhere; unknown and unfit tasks refused before data are read."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adasearch.config import study_from_dict
from adasearch.data import documents
from adasearch.errors import ConfigError, DataError
from adasearch.tuning import tasks
from adasearch.tuning.cloze import CHOICES, cloze_items
from adasearch.tuning.items import Draw, shuffled
from tests.test_config import MINIMAL, ROOT
from tests.test_data import repository
from tests.tuning import sample

ROLES = ("search", "select", "report")
SEVEN = ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")


def study(search, tasks_reported, **changes):
    objective = {"search": search, "items": 6, "select": 4, **changes.pop("objective", {})}
    data = {
        **MINIMAL,
        "objective": objective,
        "report": {"tasks": tasks_reported, **changes.pop("report", {})},
        **changes,
    }
    return study_from_dict(data, "s.yaml:", ROOT / "studies" / "s.yaml")


def piqa_mirror(root, count=40):
    rows = [
        {"goal": f"goal {i}", "sol1": f"first {i}", "sol2": f"second way {i}", "label": i % 2} for i in range(count)
    ]
    return repository(root, "baber/piqa", rows=rows, splits=("train", "validation"))


def test_cloze_items_are_whole():
    items = cloze_items("cloze/pydoc", "search", Draw(seed=1, search=60, select=30))
    assert len({item.id for item in items}) == 60
    words = " ".join(" ".join(documents("pydoc", "search")).split())
    for item in items:
        assert len(item.choices) == CHOICES == len(set(item.choices))
        assert len({len(choice.split()) for choice in item.choices}) == 1
        assert all(choice.startswith(" ") for choice in item.choices)
        assert item.contexts[0] + item.choices[item.gold] in words
        assert all(choice not in item.contexts[0] for choice in item.choices)
        assert item.lengths == tuple(len(choice) - 1 for choice in item.choices)
    counts = [sum(item.gold == place for item in items) for place in range(CHOICES)]
    assert min(counts) > 5


def test_right_continuations_are_used_once():
    items = cloze_items("cloze/pydoc", "report", Draw(seed=1, search=10, select=10))
    runs = [item.choices[item.gold].split() for item in items]
    seen = [tuple(words[i : i + 8]) for words in runs for i in range(len(words) - 7)]
    assert len(set(seen)) > 0.97 * len(seen)  # the text itself repeats a phrase now and then


def test_cloze_roles_read_disjoint_documents():
    draw = Draw(seed=5, search=50, select=25)
    sources = {}
    for role in ROLES:
        part = "report" if role == "report" else "search"
        texts = [" ".join(text.split()) for text in documents("pydoc", part)]
        found = cloze_items("cloze/pydoc", role, draw)
        sources[role] = {text for item in found for text in texts if item.contexts[0] in text}
    assert not sources["search"] & sources["select"]
    assert not (sources["search"] | sources["select"]) & sources["report"]


def test_cloze_items_depend_on_the_seed_alone():
    draw = Draw(seed=5, search=20, select=20)
    assert cloze_items("cloze/pydoc", "select", draw) == cloze_items("cloze/pydoc", "select", draw)
    other = Draw(seed=6, search=20, select=20)
    assert cloze_items("cloze/pydoc", "select", draw) != cloze_items("cloze/pydoc", "select", other)


def test_too_little_text_says_how_many_items_there_are(tmp_path):
    with pytest.raises(DataError, match=r"must give 5000 search items, its corpus gives \d+"):
        cloze_items("cloze/pydoc", "search", Draw(seed=1, search=5000, select=10))
    (tmp_path / "a.txt").write_text("\n\n".join(f"short text {i} " * 200 for i in range(40)))
    assert cloze_items(f"cloze/{tmp_path / 'a.txt'}", "report", Draw(seed=1, search=1, select=1, report=100_000))


@settings(max_examples=10)
@given(st.lists(st.text(), unique=True), st.integers(0, 99))
def test_the_order_of_items_does_not_depend_on_the_others(names, seed):
    whole = shuffled(names, seed)
    assert shuffled(names[::2], seed) == [name for name in whole if name in names[::2]]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("pika", "nearest: piqa"),
        ("qqqqqqqq", "lm-eval has no name near it"),
        ("lambada_openai", "output_type is loglikelihood"),
        ("gsm8k", "output_type is generate_until"),
        ("truthfulqa_mc2", "code of its own"),
    ],
)
def test_tasks_that_cannot_be_scored_are_refused(spec, words):
    with pytest.raises(ConfigError) as caught:
        tasks.check_tasks(study([spec], ["cloze/pydoc"]))
    assert caught.value.where == "objective.search"
    assert words in str(caught.value)


def test_task_files_are_read_with_what_they_include():
    facts = tasks.task_facts("arc_challenge")
    assert facts.source == ("allenai/ai2_arc", "ARC-Challenge", "test")
    assert tasks.task_facts("arc_challenge:train").split == "train"
    assert tasks.task_facts("blimp_adjunct_island").source == ("nyu-mll/blimp", "adjunct_island", "train")


@pytest.mark.parametrize(
    ("search", "report", "words"),
    [
        (["piqa"], ["piqa"], "reads the split that objective.search reads"),
        (["piqa:validation"], ["piqa"], "baber/piqa None validation"),
        (["piqa:train", "piqa:train"], ["piqa"], "reads the same questions"),
        (["cloze/pydco"], ["piqa"], "did you mean 'pydoc'"),
    ],
)
def test_shared_and_repeated_splits_are_refused(search, report, words):
    with pytest.raises(ConfigError, match=words):
        tasks.check_tasks(study(search, report))


def test_what_may_share_passes():
    tasks.check_tasks(study(["piqa:train", "arc_easy:train", "cloze/pydoc"], [*SEVEN, "cloze/pydoc"]))
    tasks.check_tasks(study(["piqa"], ["piqa"], objective={"allow_shared_splits": True}))


def test_perplexity_must_not_read_what_the_search_reads():
    corpus = "owner/name:config:test"
    with pytest.raises(ConfigError, match="is read whole"):
        tasks.check_tasks(study([f"cloze/{corpus}"], ["piqa"], report={"perplexity": [corpus]}))
    with pytest.raises(ConfigError, match="unknown corpus"):
        tasks.check_tasks(study(["cloze/pydoc"], ["piqa"], report={"perplexity": ["nothing"]}))


def test_the_mirror_is_asked_for_splits_before_data_are_read(tmp_path):
    root = piqa_mirror(tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'train'"):
        tasks.check_tasks(study(["piqa:trian"], ["piqa"], data_root=root))


def test_roles_of_one_split_are_disjoint(tmp_path):
    draw = Draw(seed=3, search=10, select=8, data_root=piqa_mirror(tmp_path))
    found = {role: tasks.load_items("piqa:train", role, draw) for role in ("search", "select")}
    assert [len(items) for items in found.values()] == [10, 8]
    assert not {i.id for i in found["search"]} & {i.id for i in found["select"]}
    assert found["search"] == tasks.load_items("piqa:train", "search", draw)
    assert len(tasks.load_items("piqa", "report", draw)) == 40


def test_an_item_is_what_lm_eval_would_ask(tmp_path):
    draw = Draw(seed=3, search=1, select=1, data_root=piqa_mirror(tmp_path))
    item = tasks.load_items("piqa", "report", draw)[0]
    number = item.contexts[0].split()[2]
    assert item.contexts == (f"Question: goal {number}\nAnswer:",)
    assert item.choices == (f" first {number}", f" second way {number}")
    assert item.gold == int(number) % 2
    assert item.lengths == (len(item.choices[0]) - 1, len(item.choices[1]) - 1)
    assert item.acc_norm


def test_a_split_that_may_be_shared_still_gives_disjoint_items(tmp_path):
    one = study(["piqa"], ["piqa"], objective={"allow_shared_splits": True}, data_root=piqa_mirror(tmp_path))
    ids = [{item.id for item in tasks.study_items(one, role)["piqa"]} for role in ROLES]
    assert [len(some) for some in ids] == [6, 4, 30]
    assert len(set.union(*ids)) == 40


def test_too_few_documents_say_how_many_there_are(tmp_path):
    draw = Draw(seed=3, search=30, select=30, data_root=piqa_mirror(tmp_path))
    with pytest.raises(DataError, match="must give 60 items for search and select, its split has 40"):
        tasks.load_items("piqa:train", "select", draw)


def test_data_that_cannot_be_read_name_task_and_place(tmp_path):
    with pytest.raises(DataError, match=r"'piqa:other': its split 'other' cannot be read"):
        tasks.load_task("piqa:other", piqa_mirror(tmp_path))
    rows = [{"goal": "g", "sol1": "a", "sol2": "b", "label": -1}]
    draw = Draw(seed=3, search=1, select=1, data_root=repository(tmp_path / "x", "baber/piqa", rows=rows))
    with pytest.raises(DataError, match="one right choice"):
        tasks.load_items("piqa:train", "report", draw)


@pytest.mark.parametrize("name", [*SEVEN, "blimp_adjunct_island"])
def test_real_tasks_load(name):
    draw = Draw(seed=3, search=12, select=6, report=9, data_root=sample.data_root())
    search = tasks.load_items(f"{name}:train", "search", draw)
    assert len(search) == 12
    assert all(0 <= item.gold < len(item.choices) for item in search)
    assert search[0].acc_norm == (name not in {"boolq", "winogrande", "blimp_adjunct_island"})
    assert (len(search[0].contexts) == 2) == (name == "winogrande")
    assert len(tasks.load_items(name, "report", draw)) == 9
