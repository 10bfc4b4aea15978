"""What a worker keeps between trials: base weights, items, statistics. Read only for every trial."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adasearch import corpora, data, models, outlined, streams
from adasearch.config import Component, StudyConfig
from adasearch.documents import fingerprint
from adasearch.errors import ConfigError, DataError, TrialError
from adasearch.pruning import architectures, calibration, statistics, vocabulary
from adasearch.pruning.statistics import Statistics
from adasearch.pruning.statistics_cache import Cache
from adasearch.pruning.structure import WHOLE, Outline
from adasearch.sections import CalibrationConfig, Mix, UnitsConfig, ValidationConfig
from adasearch.tuning import contamination, divergence, generation, scoring, tasks
from adasearch.tuning.items import Item, Role

if TYPE_CHECKING:
    from torch import nn

    from adasearch.models import BaseModel
    from adasearch.pruning.structure import ModelStructure


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskItems:
    """The items of one task, and their token sequences in the same order."""

    items: tuple[Item, ...]
    encoded: tuple[scoring.EncodedItem, ...]


_STATISTICS_VERSION = 2
"""Raised when the same sample would give other statistics than before, or the same in another form."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """What is asked of the cache: families of one calibration sample, by the fingerprint of all but its size."""

    key: str
    sample: CalibrationConfig
    families: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Origin:
    """Computes the statistics of one calibration sample."""

    bench: Workbench
    structure: ModelStructure
    sample: CalibrationConfig

    def accumulate(self, first: int, stop: int, families: frozenset[str]) -> Statistics:
        """Return families that merge of the sequences from `first` to `stop`."""
        tokens = self.bench.sample_tokens(dataclasses.replace(self.sample, samples=stop), self.structure.outline)
        model = self.bench.dense(self.structure.outline)
        return calibration.accumulate(model, self.structure, tokens[first:], families)

    def read(self, merged: Statistics, needs: frozenset[str], sequences: int) -> Statistics:
        """Return the families in `needs` that follow from `merged`."""
        weights = self.bench.outlined(self.structure.outline).weights
        return calibration.read(merged, needs, self.structure, weights, sequences)


def _kept(guard: data.Guard | None, share: float | None, *, held: bool = False) -> data.Guard | None:
    """Return what leaves out, beside what `guard` does, a `share` of the documents, or with `held` all others."""
    if share is None:
        return guard

    def left_out(text: str) -> bool:
        return data.held_out(text, share) != held or (guard is not None and guard(text))

    return left_out


def cache_folder(run: Path) -> Path:
    """Return where weights and statistics are kept: ``ADASEARCH_CACHE``, or ``cache/`` in the run folder."""
    return Path(os.environ.get("ADASEARCH_CACHE") or run / "cache")


class Workbench:
    """Base weights once per worker, tokenizer, items and caches, built from a study; a trial never changes it.

    Args:
        study: the resolved study.
        run: run folder.
        threads: CPU threads of this worker.

    Raises:
        ModelError: the model cannot be read.
    """

    def __init__(self, study: StudyConfig, run: Path, threads: int) -> None:
        models.set_threads(threads)
        models.keep_freed_memory()
        self.study = study
        self.run = run
        self.threads = threads
        self.device = models.pick_device()
        self.cache = cache_folder(run)
        dtype = models.pick_dtype(study.model.dtype, self.device)
        folder = models.fetch_weights(models.resolve(study.model), self.cache / "models", dtype)
        self.base = models.open_base(folder, dtype)
        models.set_libraries_aside()
        self._checksum = models.checksum(self.base)
        self.origin = self
        self._structures: dict[UnitsConfig, ModelStructure] = {}
        self._items: dict[str, dict[str, TaskItems]] = {}
        self._texts: dict[str, torch.Tensor] = {}
        self._dense: nn.Module | None = None
        self._small: tuple[BaseModel, nn.Module | None] = (self.base, None)
        self._use: dict[tuple[str, int], torch.Tensor] = {}
        self._last: tuple[tuple[_Asked, ...], Statistics] | None = None
        self._reference: divergence.Reference | None = None
        self._reported: contamination.Index | None = None
        self._dropped: dict[tuple[CalibrationConfig, Outline], int] = {}

    @property
    def model_key(self) -> str:
        """Return what identifies the base weights and their number format."""
        return f"{self._checksum} {self.base.dtype}"

    def rebased(self, weights: dict[str, torch.Tensor]) -> Workbench:
        """Return a workbench over the model with other weights, whose `origin` is this one; without any this one.

        Args:
            weights: of the same shapes, in place of some of the model's.
        """
        if not weights:
            return self
        found = copy.copy(self)
        found.base = dataclasses.replace(self.base, weights={**self.base.weights, **weights})
        found._checksum = models.checksum(found.base)
        found._dense, found._small, found._last = None, (found.base, None), None
        return found

    def structure(self, units: UnitsConfig | None = None, outline: Outline = WHOLE) -> ModelStructure:
        """Return the structure, with the units asked for, of the model that an outline leaves."""
        units = units or UnitsConfig()
        if units not in self._structures:
            self._structures[units] = architectures.describe(self.base.shape, units)
        whole = self._structures[units]
        if outline.whole:
            return whole
        left = architectures.describe(self.outlined(outline).shape, units)
        return dataclasses.replace(left, outline=outline, origin=whole)

    def outlined(self, outline: Outline) -> BaseModel:
        """Return what an outline leaves of the model, the last one kept; callers must not change it."""
        if outline.whole:
            return self.base
        if self._small[0].outline != outline:
            self._small = (self.base, None)  # before the next is made: two of them need not fit into memory
            self._small = (outlined.outlined(self.base, self.structure(), outline), None)
        return self._small[0]

    def dense(self, outline: Outline = WHOLE) -> nn.Module:
        """Return the model that an outline leaves, all its widths as they were; callers must not change it."""
        if outline.whole:
            if self._dense is None:
                self._dense = models.dense_model(self.base).to(self.device)
            return self._dense
        base = self.outlined(outline)
        model = self._small[1]
        if model is None:
            model = models.dense_model(base).to(self.device)
            self._small = (base, model)
        return model

    def corpus(self, spec: str) -> str:
        """Return the spec of a corpus that can be read: text of the dense model itself is made, once for all workers.

        That is the model which the study names, also where this is a workbench of other weights.

        Raises:
            ConfigError: the model cannot make it.
        """
        sampling = corpora.sampling(spec)
        if sampling is None:
            return spec

        def made() -> list[str]:
            texts = generation.documents(origin.dense(), origin.base.tokenizer, sampling)
            self.release()
            return texts

        origin = self.origin
        return str(generation.obtain(self.cache / "generated", origin.model_key, sampling, made))

    def guard(self) -> contamination.Watch | None:
        """Return what keeps documents with report items out of a text, and counts them; None where all may be read."""
        report = self.study.report
        if report.contamination == "allow" or not report.tasks:
            return None
        if self._reported is None:
            found = tasks.study_items(self.study, "report")
            self._reported = contamination.Index.of(item for items in found.values() for item in items)
        return contamination.Watch(index=self._reported, refuse=report.contamination == "refuse")

    def _guard_key(self) -> tuple[object, ...]:
        """Return what decides which documents are left out, known without reading the items."""
        study = self.study
        if study.report.contamination != "drop" or not study.report.tasks:
            return ()
        return (study.report.tasks, study.report.items, study.objective, study.seed)

    def sample_tokens(self, sample: CalibrationConfig, outline: Outline = WHOLE) -> torch.Tensor:
        """Return the tokens of a calibration sample (N × T)."""
        tokenizer, guard = self.outlined(outline).tokenizer, self.guard()
        read = dataclasses.replace(sample, corpus=self.corpus(sample.corpus))
        tokens: torch.Tensor = data.token_matrix(tokenizer, read, self.study.data_root, guard=guard)
        self._dropped[sample, outline] = guard.dropped if guard is not None else 0
        return tokens

    def sample_dropped(self, sample: CalibrationConfig, outline: Outline = WHOLE) -> int:
        """Return how many documents a calibration sample passes over because a report item stands in them."""
        if self.guard() is None:
            return 0
        if (sample, outline) not in self._dropped:  # its statistics were on disk
            self.sample_tokens(sample, outline)
        return self._dropped[sample, outline]

    def sample_key(self, sample: CalibrationConfig) -> str:
        """Return what identifies the dense model and a calibration sample, text and all."""
        version = corpora.corpus_version(sample.corpus, self.study.data_root)
        guard = self._guard_key()
        return fingerprint((self._checksum, str(self.base.dtype), self.study.data_root, version, sample, guard))

    def token_use(self, names: tuple[str, ...], tokens: int) -> torch.Tensor:
        """Return how often each token of the dense vocabulary occurs in the calibration parts of corpora (V, int64).

        Args:
            names: of the corpora.
            tokens: how many of each are counted at most.
        """
        total = torch.zeros(self.base.shape.vocabulary, dtype=torch.long)
        for corpus in names:
            if (corpus, tokens) not in self._use:
                source, root = self.corpus(corpus), self.study.data_root
                ids = data.first_tokens(self.base.tokenizer, source, tokens, root, guard=self.guard())
                self._use[corpus, tokens] = vocabulary.counts(ids, len(total))
            total += self._use[corpus, tokens]
        return total

    def statistics(
        self, structure: ModelStructure, sample: CalibrationConfig, units: UnitsConfig, needs: frozenset[str]
    ) -> Statistics | None:
        """Return the statistics of a calibration sample, from the cache where they are known; None for no needs.

        Where a need names another corpus, `others` holds the statistics of its sample: as many sequences, as long,
        drawn by the same seed, from the same part of the text. What the last trial used is at hand without a look at
        the disk.
        """
        if not needs:
            return None
        parts = {
            corpus: self._asked(
                structure.outline, dataclasses.replace(sample, corpus=corpus or sample.corpus), units, families
            )
            for corpus, families in statistics.by_corpus(needs).items()
        }
        asked = tuple(parts.values())
        if self._last is None or self._last[0] != asked:
            self._last = None  # before the next are made: two of them need not fit into memory
            cache = Cache(folder=self.cache / "statistics")
            found = {}
            for corpus, part in parts.items():
                origin = _Origin(bench=self, structure=structure, sample=part.sample)
                found[corpus] = cache.obtain(part.key, part.sample.samples, part.families, origin)
            own = found.pop("")
            self._last = (asked, dataclasses.replace(own, others=found))
            self.release()
        return self._last[1]

    def _asked(
        self, outline: Outline, sample: CalibrationConfig, units: UnitsConfig, families: frozenset[str]
    ) -> _Asked:
        version = corpora.corpus_version(sample.corpus, self.study.data_root)
        model = (self._checksum, str(self.base.dtype), outline)
        content = (*model, units, self.study.data_root, version, _STATISTICS_VERSION, *self._guard_key())
        key = fingerprint((*content, dataclasses.replace(sample, samples=1)))
        return _Asked(key=key, sample=sample, families=families)

    def reference(self) -> divergence.Reference:
        """Return what every trial's model is compared with after its cut, the same for all; made once.

        The text is drawn by the study's seed, as much from each corpus that trials may calibrate on, from the part
        ``search``: it is disjoint from what calibration and recovery read, and from all that is reported.

        Raises:
            DataError: a corpus has too little text in that part.
        """
        if self._reference is None:
            study, names = self.study, self.study.calibration_corpora
            windows = divergence.num_windows(study.fidelity.divergence / len(names))
            samples = [
                CalibrationConfig(
                    corpus=self.corpus(corpus), samples=windows, length=divergence.WINDOW, draw=study.seed
                )
                for corpus in names
            ]
            try:
                found = [data.token_matrix(self.base.tokenizer, s, study.data_root, "search") for s in samples]
            except DataError as error:
                raise DataError(f"fidelity.divergence: {error}; 0 leaves the comparison out") from error
            self._reference = divergence.reference(self.dense(), torch.cat(found))
            self.release()
        return self._reference

    def items(self, role: Role, outline: Outline = WHOLE) -> dict[str, TaskItems]:
        """Return the items of every task in a role (``search``, ``select`` or ``report``), by task.

        Their texts are the same for every model; a smaller vocabulary writes them in other tokens.
        """
        if role not in self._items:
            self._items[role] = self._encoded(tasks.study_items(self.study, role), WHOLE)
        if outline.tokens is None:
            return self._items[role]
        return self._encoded({name: task.items for name, task in self._items[role].items()}, outline)

    def _encoded(self, items: Mapping[str, tuple[Item, ...]], outline: Outline) -> dict[str, TaskItems]:
        base = self.outlined(outline)
        limit = scoring.max_length(base.config, base.tokenizer)
        return {
            name: TaskItems(items=found, encoded=scoring.encode(found, base.tokenizer, limit))
            for name, found in items.items()
        }

    def perplexity_tokens(self, corpus: str) -> torch.Tensor:
        """Return the tokens (T-vector) that the perplexity on a corpus is taken of, as many as the report wants."""
        if corpus not in self._texts:
            report = self.study.report
            tokens = data.perplexity_tokens(self.base.tokenizer, corpus, self.study.data_root)
            self._texts[corpus] = tokens[: report.perplexity_tokens].clone()
        return self._texts[corpus]

    def recovery_text(
        self,
        part: Component,
        calibration_corpus: str,
        seed: int,
        outline: Outline = WHOLE,
        section: str = "recovery",
        validation: ValidationConfig | None = None,
    ) -> streams.TrainingText:
        """Return what a component trains on, which is a `section` of a trial; empty for one that trains on nothing.

        With `validation` some documents are held out of it, and are the text `held` of what is returned.

        Raises:
            TrialError: kind ``config``, the text cannot be had, or yields too little.
        """
        options = part.options
        amount = getattr(options, "tokens", 0)
        if not amount:
            return streams.TrainingText(tokens=torch.zeros(0, dtype=torch.long))
        guard = self.guard()
        try:
            mixed = Mix.of(options.corpus or calibration_corpus).mix
            reading = streams.Reading(
                text=Mix(mix=tuple(dataclasses.replace(each, corpus=self.corpus(each.corpus)) for each in mixed)),
                tokens=amount,
                length=options.length,
                seed=seed,
                packing=options.packing,
                loss=options.loss,
            )
            tokenizer = self.outlined(outline).tokenizer
            share = None if validation is None else validation.share
            text = streams.training_text(tokenizer, reading, self.study.data_root, _kept(guard, share))
        except (ConfigError, DataError) as error:
            raise TrialError("config", f"{section}.corpus: {error}", "recover") from error
        held = None if validation is None else self._held_text(validation, reading, outline)
        return dataclasses.replace(text, dropped=guard.dropped if guard is not None else 0, held=held)

    def _held_text(
        self, validation: ValidationConfig, reading: streams.Reading, outline: Outline
    ) -> streams.TrainingText:
        """Return whole sequences of the documents that a recovery must not train on, from one pass over them."""
        tokens = -(-validation.tokens // reading.length) * reading.length
        asked = dataclasses.replace(reading, tokens=tokens)
        guard = _kept(self.guard(), validation.share, held=True)
        try:
            text = streams.training_text(self.outlined(outline).tokenizer, asked, self.study.data_root, guard)
        except DataError as error:
            problem = f"finalize.training.validation: {error}; or hold out a greater share"
            raise TrialError("config", problem, "recover") from error
        return streams.one_pass(text, reading.length)

    def recovery_tokens(
        self, recovery: Component, calibration_corpus: str, seed: int, outline: Outline = WHOLE
    ) -> torch.Tensor:
        """Return the tokens of `recovery_text` alone."""
        tokens: torch.Tensor = self.recovery_text(recovery, calibration_corpus, seed, outline).tokens
        return tokens

    def set_aside(self) -> None:
        """Give up the dense model's place on a GPU, for a training that needs it; it is made again when asked for."""
        if self.device.type != "cpu":
            self._dense, self._small = None, (self._small[0], None)
            self.release()

    def release(self) -> None:
        """Give memory that a trial no longer uses back to the system."""
        models.release_memory()

    def assert_unchanged(self) -> None:
        """Check that no trial wrote into the base weights.

        Raises:
            TrialError: it did.
        """
        if models.checksum(self.base) != self._checksum:
            raise TrialError("error", "the trial wrote into the base weights of its worker", "done")
