"""What `adasearch validate` says of the text that a study reads: by key, without weights."""

import json

import pytest

from adasearch import checkpoints, data, text_checks
from adasearch.checkpoints import ModelSource
from adasearch.config import study_from_dict
from adasearch.errors import ConfigError
from adasearch.library import REPOSITORY
from adasearch.tuning import tasks
from tests import tiny
from tests.test_checks import BASE, study_of
from tests.test_streams import TEMPLATE, lines, talks

MIX = {"mix": [{"corpus": "pydoc", "weight": 2}, {"corpus": "stdlib", "weight": 1}]}


def tuned(**options):
    return {"trial": {**BASE["trial"], "recovery": {"type": "lora", **options}}}


def test_a_mixture_names_all_of_its_corpora_wherever_it_stands():
    study = study_of(
        space={"recovery.corpus": {"choice": ["pydoc", {"mix": [{"corpus": "self", "weight": 1}]}]}},
        recipes={"r": {"recovery": {"type": "full", "corpus": {"mix": [{"corpus": "a.txt", "weight": 1}]}}}},
        finalize={"recovery": {"type": "full", "corpus": {"mix": [{"corpus": "ptb", "weight": 3}]}}},
        **tuned(corpus=MIX),
    )
    assert text_checks.corpora_of(study) == {
        "pydoc": "trial.calibration.corpus",
        "stdlib": "trial.recovery.corpus.mix.1.corpus",
        "ptb": "finalize.recovery.corpus.mix.0.corpus",
        "a.txt": "recipes.r.recovery.corpus.mix.0.corpus",
        "self": "space.recovery.corpus",
    }


def test_text_that_says_which_tokens_stay_is_looked_at():
    def study(corpora):
        rule = {"type": "by_use", "remove": 0.2, "corpora": corpora}
        return study_of(trial={**BASE["trial"], "vocabulary": rule}, report={"tasks": [], "perplexity": ["pydoc"]})

    text_checks.check_corpora(study(["stdlib"]))
    with pytest.raises(ConfigError) as caught:
        text_checks.check_corpora(study(["pydoc", "stdlb"]))
    assert caught.value.where == "trial.vocabulary.corpora.1"


def test_a_mixture_is_searched_whole():
    from tests.test_checks import space_of

    study = study_of(space={"recovery.corpus": {"choice": ["stdlib", MIX]}}, **tuned(corpus=MIX, tokens=64))
    space = space_of(study)
    (name,) = space.parameters
    found = [space.decode({name: label}).recovery.to_dict()["corpus"] for label in space.parameters[name].choices]
    assert found == ["stdlib", MIX]
    assert space.encode(study.trial) == {name: json.dumps(MIX, sort_keys=True)}


@pytest.mark.parametrize(("options", "where", "words"), [
    ({"corpus": "pydco"}, "trial.recovery.corpus", "did you mean 'pydoc'"),
    ({"corpus": {"mix": [{"corpus": "pydoc", "weight": 1}, {"corpus": "stdlb", "weight": 1}]}},
     "trial.recovery.corpus.mix.1.corpus", "did you mean 'stdlib'"),
    ({"corpus": {"mix": [{"corpus": "pydoc", "weight": 1}, {"corpus": "pydoc", "weight": 1}]}},
     "trial.recovery.corpus.mix", "'pydoc' stands twice"),
    ({"corpus": "self:length=9000"}, "trial.recovery.corpus.length", "less than or equal to 8192"),
])  # fmt: skip
def test_corpora_that_cannot_be_are_refused(options, where, words):
    with pytest.raises(ConfigError) as caught:
        text_checks.check_corpora(study_of(**tuned(**options)))
    assert caught.value.where == where
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("section", "name"),
    [("schedule", "gates"), ("schedule", "lora_prune"), ("schedule", "movement"), ("hidden", "pat")],
)
def test_text_that_a_cut_is_learnt_from_is_looked_at(section, name):
    for corpus, words in (("pydco", "did you mean"), ({"mix": [MIX["mix"][0], MIX["mix"][0]]}, "stands twice")):
        with pytest.raises(ConfigError, match=words) as caught:
            text_checks.check_corpora(study_of(trial={**BASE["trial"], section: {"type": name, "corpus": corpus}}))
        assert caught.value.where.startswith(f"trial.{section}.corpus")


@pytest.mark.parametrize(("corpus", "where", "words"), [
    ({"mix": [{"corpus": "pydoc", "weight": 0}]}, "corpus.mix.0.weight", "greater than 0, given 0"),
    ({"mix": [{"corpus": "pydoc", "weight": -1.5}]}, "corpus.mix.0.weight", "greater than 0"),
    ({"mix": [{"corpus": "pydoc"}]}, "corpus.mix.0.weight", "must be given"),
    ({"mix": [{"corpus": "pydoc", "wieght": 1}]}, "corpus.mix.0.wieght", "did you mean 'weight'"),
    ({"mix": []}, "corpus.mix", "must name a corpus"),
    ({"mx": []}, "corpus.mx", "did you mean 'mix'"),
    (7, "corpus", "must be a corpus or {mix:"),
])  # fmt: skip
def test_mixtures_that_are_none_are_refused_when_they_are_read(corpus, where, words):
    with pytest.raises(ConfigError) as caught:
        study_of(**tuned(corpus=corpus))
    assert caught.value.where == f"study.yaml: trial.recovery.{where}"
    assert words in str(caught.value)


@pytest.mark.parametrize("tasks_", [["cloze/self"], ["cloze/chat/owner/name"]])
def test_items_are_made_of_text_as_it_was_written(tasks_):
    with pytest.raises(ConfigError, match=r"report\.tasks: must be text as it was written"):
        tasks.check_tasks(study_of(report={"tasks": tasks_}))


def test_a_model_without_chat_template_is_told_before_anything_is_loaded(tmp_path):
    folder = tiny.save_checkpoint(tmp_path / "model")
    source = ModelSource(kind="folder", name="mine", path=str(folder))
    corpus = talks(tmp_path)
    study = study_of(**tuned(corpus={"mix": [{"corpus": corpus, "weight": 1}]}))
    with pytest.raises(ConfigError, match="needs a chat template, and the tokenizer of mine has none") as caught:
        text_checks.check_templates(study, source)
    assert caught.value.where == "trial.recovery.corpus.mix.0.corpus"
    text_checks.check_templates(study, ModelSource(kind="hub", name="owner/name"))
    text_checks.check_templates(study_of(**tuned(corpus=MIX)), source)
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    assert checkpoints.has_chat_template(source) is True
    text_checks.check_templates(study, source)


def test_files_with_too_little_text_are_told(tmp_path):
    small = lines(tmp_path, "small", "a", count=16, words=1)
    held = sum(map(len, data.documents(small, "fit")))
    with pytest.raises(ConfigError, match=f"yields at most {held} tokens, a sequence needs 128") as caught:
        text_checks.check_amounts(study_of(**tuned(corpus=small)))
    assert caught.value.where == "trial.recovery.corpus"
    text_checks.check_amounts(study_of(**tuned(corpus=small, length=8)))
    (tmp_path / "bad.jsonl").write_text('{"audio": 1}\n')
    finalize = {"recovery": {"type": "full", "corpus": str(tmp_path / "bad.jsonl")}}
    with pytest.raises(ConfigError, match="they have audio") as caught:
        text_checks.check_amounts(study_of(finalize=finalize))
    assert caught.value.where == "finalize.recovery.corpus"


def test_refused_contamination_is_told_by_validate(tmp_path):
    near = REPOSITORY / "studies" / "any.yaml"
    clean = study_from_dict({**BASE, **tuned(corpus=lines(tmp_path, "a", "a"))}, "study.yaml:", near)
    (item, *_) = tasks.study_items(clean, "report")["cloze/pydoc"]
    context, right = item.pairs()[item.gold]
    rows = [{"document": f"{i} {context}{right} {i}"} for i in range(20)]
    path = tmp_path / "dirty.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {**tuned(corpus=str(path)), "trial": {"calibration": {"corpus": str(path)}, "recovery": "none"}}
    for mode, refused in (("refuse", True), ("drop", False), ("allow", False)):
        study = study_of(**{**changes, "report": {"tasks": ["cloze/pydoc"], "contamination": mode}})
        reported = tasks.study_items(study, "report")["cloze/pydoc"]
        if not refused:
            text_checks.check_contamination(study, reported)
            continue
        with pytest.raises(ConfigError, match="of the report items stand in") as caught:
            text_checks.check_contamination(study, reported)
        assert caught.value.where == "trial.calibration.corpus"
