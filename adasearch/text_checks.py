"""What can be found out about the text that a study reads without weights: every corpus, by the key that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from adasearch import checkpoints, corpora, data
from adasearch.config import COMPONENTS, Component, StudyConfig, TrialConfig, merged
from adasearch.documents import join
from adasearch.errors import ConfigError, DataError
from adasearch.search.space import Space
from adasearch.sections import Mix
from adasearch.tuning import contamination

if TYPE_CHECKING:
    from adasearch.checkpoints import ModelSource
    from adasearch.tuning.items import Item


def corpora_of(study: StudyConfig) -> dict[str, str]:
    """Return every corpus that trials of a study read, and the key that names it.

    Trials read the corpus they are calibrated on, and those that a setting ``corpus`` or ``corpora`` of any component
    names: what a recovery trains on, another sample that a criterion looks at, or what tells the tokens that are used.
    Of a mixture that is each of its parts.
    """
    trial = TrialConfig.from_dict(study.trial, "trial")
    searched = "calibration.corpus" in study.space.dimensions
    key = "space.calibration.corpus" if searched else "trial.calibration.corpus"
    named = [(corpus, key) for corpus in study.calibration_corpora]
    named += _named_by(trial, "trial")
    named += named_in(study.finalize.recovery, "finalize.recovery")
    for name, recipe in study.recipes.items():
        config = TrialConfig.from_dict(merged(study.trial, recipe), name)
        if "calibration" in recipe:
            named.append((config.calibration.corpus, f"recipes.{name}.calibration.corpus"))
        named += _named_by(config, f"recipes.{name}")
    space = Space.from_config(study.space, study.trial, seed=study.seed)
    # The dimension that names a corpus before those at whose corners it is merely there.
    for path, corner in sorted(space.corners(), key=lambda found: not found[0].endswith("corpus")):
        named += [(corpus, join("space", path)) for corpus, _ in _named_by(corner, "")]
    return dict(reversed(named))  # the first key of each


def _named_by(trial: TrialConfig, where: str) -> list[tuple[str, str]]:
    """Return the corpora that the components of a trial name, and their keys."""
    return [found for name in COMPONENTS for found in named_in(getattr(trial, name), join(where, name))]


def named_in(part: Component, where: str) -> list[tuple[str, str]]:
    """Return the corpora that a component names, or those that it is built from."""
    found: list[tuple[str, str]] = []
    for field in dataclasses.fields(part.options):
        item, key = getattr(part.options, field.name), join(where, field.name)
        if isinstance(item, Component):
            found += named_in(item, key)
        elif isinstance(item, Mix):
            found += [(each.corpus, join(key, "mix", index, "corpus")) for index, each in enumerate(item.mix)]
        elif field.name == "corpus" and item:
            found.append((item, key))
        elif field.name == "corpora":
            found += [(each, join(key, index)) for index, each in enumerate(item)]
    return found


def check_corpora(study: StudyConfig) -> None:
    """Check that every corpus of a study can be, and that what is reported is not read before.

    Raises:
        ConfigError: an unknown corpus, one that a mixture names twice, or perplexity of text that trials read.
    """
    for corpus, key in corpora_of(study).items():
        corpora.check_corpus(corpus, study.data_root, key)
    for part, where in _training(study):
        parts = Mix.of(getattr(part.options, "corpus", None) or "").mix
        twice = sorted({part.corpus for part in parts if [p.corpus for p in parts].count(part.corpus) > 1})
        if twice:
            raise ConfigError(join(where, "corpus.mix"), f"must name each corpus once, {twice[0]!r} stands twice")
    _check_perplexity(study)


def _training(study: StudyConfig) -> Iterator[tuple[Component, str]]:
    """Yield what trains by the files of a study, and the keys; what its space names shows in the corners."""
    yield study.finalize.recovery, "finalize.recovery"
    for where, given in (("trial", {}), *((f"recipes.{name}", r) for name, r in study.recipes.items())):
        config = TrialConfig.from_dict(merged(study.trial, given), where)
        for section in ("recovery", "schedule", "hidden"):
            if where == "trial" or section in given:
                yield getattr(config, section), join(where, section)


def _check_perplexity(study: StudyConfig) -> None:
    """Refuse to take the perplexity of text that trials are calibrated or tuned on."""
    if study.objective.allow_shared_splits:
        return
    used = {corpora.parse_corpus(name, study.data_root).plain: key for name, key in corpora_of(study).items()}
    for corpus in study.report.perplexity:
        parsed = corpora.parse_corpus(corpus, study.data_root)
        if parsed.whole and parsed in used:
            problem = f"{corpus!r} is read whole and {used[parsed]} reads it too; name another split in one of them"
            raise ConfigError("report.perplexity", problem)


def check_templates(study: StudyConfig, source: ModelSource) -> None:
    """Check that the model's tokenizer has a chat template where a corpus asks for one; a hub's is not looked at.

    Raises:
        ConfigError: it has none.
    """
    for corpus, key in corpora_of(study).items():
        asked = corpora.parse_corpus(corpus, study.data_root).chat
        if asked and checkpoints.has_chat_template(source) is False:
            problem = f"{corpus!r} needs a chat template, and the tokenizer of {source.name} has none; name the corpus "
            raise ConfigError(key, f"{problem}without {corpora.CHAT}, or take an instruction-tuned model")


def check_amounts(study: StudyConfig) -> None:
    """Check that files on this machine hold text for one sequence of all that trains: a token is a byte at least.

    Raises:
        ConfigError: a file that holds too little, or cannot be read.
    """
    for part, where in _training(study):
        options: Any = part.options
        needed = min(getattr(options, "length", 0), getattr(options, "tokens", 0))
        for corpus, key in named_in(part, where) if needed else ():
            if corpora.parse_corpus(corpus, study.data_root).kind != "file":
                continue
            try:
                held = sum(len(text.encode()) for text in data.documents(corpus, "fit", study.data_root))
            except DataError as error:
                raise ConfigError(key, str(error)) from error
            if held < needed:
                problem = f"{corpus!r} yields at most {held} tokens, a sequence needs {needed}; name a larger corpus"
                raise ConfigError(key, problem)


def check_contamination(study: StudyConfig, items: Iterable[Item]) -> None:
    """Check that no report item stands in what trials read, where the study refuses that.

    It reads the corpora, which only this option asks for; text that the model makes is looked at when it is made.

    Raises:
        ConfigError: an item does.
        DataError: a corpus cannot be read.
    """
    if study.report.contamination != "refuse":
        return
    index = contamination.Index.of(items)
    for corpus, key in corpora_of(study).items():
        if corpora.parse_corpus(corpus, study.data_root).kind == "generated":
            continue
        texts = data.documents(corpus, "fit", study.data_root)
        hits = _hits(index, texts)
        if hits:
            item, text = next(iter(hits.items()))
            problem = f"{len(hits)} of the report items stand in {corpus!r}, such as {item} in {text!r}"
            raise ConfigError(key, f"{problem}; name another corpus, or set report.contamination to drop")


def _hits(index: contamination.Index, texts: Iterable[str]) -> Mapping[str, str]:
    """Return the items that stand in texts, and how the first text that holds each begins."""
    found: dict[str, str] = {}
    for text in texts:
        item = index.find(text)
        if item is not None:
            found.setdefault(item, " ".join(text.split())[:80])
    return found
