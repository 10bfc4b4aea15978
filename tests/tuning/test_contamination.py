"""Report items in training text: planted ones are found, by the rule as it is written and no other."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adasearch.errors import ConfigError
from adasearch.tuning import contamination
from adasearch.tuning.contamination import Index, Watch, words
from adasearch.tuning.items import Item


def item(context, right, wrong=" nothing of it", name="0"):
    return Item(task="t", id=name, contexts=(context,), choices=(wrong, right), gold=1, lengths=(1, 1))


LONG = item("Question: The committee met on a rainy Tuesday to decide who should pay for the bridge.\nAnswer:",
            " The town paid for it in the end", name="long")  # fmt: skip
SHORT = item("The sun is responsible for", " plants sprouting, blooming and wilting", name="short")
ASKED = item("Question: How do you open a very stuck jar?\nAnswer:", " Run hot water over it", name="asked")
TINY = item("Is it", " blue", name="tiny")
ALL = Index.of([LONG, SHORT, ASKED, TINY])


@pytest.mark.parametrize(("text", "found"), [
    ("They say the COMMITTEE met, on a rainy Tuesday, to decide who should pay for the bridge!", "t long"),
    ("who should pay for the bridge? The town paid for it in the end.", "t long"),  # across context and choice
    ("on a rainy Tuesday to decide who should pay for the road", None),  # 11 words in a row
    ("The sun is responsible for plants sprouting, blooming, and wilting each year.", "t short"),
    ("The sun is responsible for the weather", None),
    ("### Instruction:\nHow do you open a very stuck jar?\n\n### Response:\nHit it.", "t asked"),
    ("How do you open a stuck jar?", None),
    ("Is it blue? Is it blue.", None),  # too few words to tell
    ("The sun is responsible for nothing of it", None),  # a wrong choice is no part of an item
    ("", None),
])  # fmt: skip
def test_planted_items_are_found(text, found):
    assert ALL.find(text) == found
    assert ALL.find(f"Something before. {text} Something after.") == found


def test_the_context_of_the_right_choice_counts():
    varied = Item(task="t", id="v", contexts=("a b c d e f Tom g h i j k", "a b c d e f Ann g h i j k"),
                  choices=(" l m n",) * 2, gold=1, lengths=(1, 1))  # fmt: skip
    assert Index.of([varied]).find("a b c d e f Ann g h i j k l m n") == "t v"
    assert Index.of([varied]).find("a b c d e f Tom g h i j k l m n") is None


def by_the_rule(items, text):
    """The rule, word for word as the module states it."""
    line = f" {' '.join(words(text))} "
    for one in items:
        context, right = one.pairs()[one.gold]
        asked, whole = words(context), words(f"{context} {right}")
        runs = [whole[i : i + 13] for i in range(len(whole) - 12)]
        runs += [whole] if 5 <= len(whole) < 13 else []
        runs += [asked] if 8 <= len(asked) < 13 else []
        if any(f" {' '.join(run)} " in line for run in runs):
            return True
    return False


@given(st.integers(0, 10_000), st.sampled_from([2, 3, 40]))
def test_found_by_hashes_as_by_the_rule(seed, vocabulary):
    draw = random.Random(seed)
    some = [f"w{i}" for i in range(vocabulary)]
    items = [
        item(" ".join(draw.choices(some, k=draw.randint(1, 18))), " " + " ".join(draw.choices(some, k=3)), name=str(i))
        for i in range(3)
    ]
    text = draw.choices(some, k=draw.randint(0, 60))
    if seed % 2:
        planted = words(" ".join(items[0].pairs()[1]))
        place = draw.randrange(len(text) + 1)
        text[place:place] = planted[: draw.randint(1, len(planted))]
    assert (Index.of(items).find(" ".join(text)) is not None) == by_the_rule(items, " ".join(text))


def test_equal_hashes_of_other_words_are_no_hit(monkeypatch):
    monkeypatch.setattr(contamination, "_rolled", lambda hashes, length: hashes[: max(0, len(hashes) - length + 1)] * 0)
    assert Index.of([SHORT]).find("ten other words that are not those of the item at all") is None
    assert Index.of([SHORT]).find("The sun is responsible for plants sprouting blooming and wilting") == "t short"


def test_a_watch_counts_or_refuses():
    watch = Watch(index=ALL)
    texts = ["clean text", "How do you open a very stuck jar", "more", "sun is responsible for plants"]
    assert [watch(text) for text in texts] == [False, True, False, False]
    assert watch.dropped == 1
    refusing = Watch(index=ALL, refuse=True)
    assert not refusing("clean text")
    with pytest.raises(ConfigError, match="the item t asked stands in text") as caught:
        refusing(texts[1])
    assert caught.value.where == "report.contamination"


def test_no_items_find_nothing():
    assert Index.of([]).find("any text at all") is None
