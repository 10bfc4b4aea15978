"""What a worker keeps between trials: base weights, items, statistics. Read only for every trial."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adasearch import data, models
from adasearch.config import CalibrationConfig, Component, StudyConfig, UnitsConfig
from adasearch.documents import fingerprint
from adasearch.errors import DataError, TrialError
from adasearch.pruning import architectures, calibration, statistics
from adasearch.pruning.statistics import Statistics
from adasearch.pruning.statistics_cache import Cache
from adasearch.tuning import divergence, scoring, tasks
from adasearch.tuning.items import Item, Role

if TYPE_CHECKING:
    from torch import nn

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
        sample = dataclasses.replace(self.sample, samples=stop)
        tokens = data.token_matrix(self.bench.base.tokenizer, sample, self.bench.study.data_root)
        return calibration.accumulate(self.bench.dense(), self.structure, tokens[first:], families)

    def read(self, merged: Statistics, needs: frozenset[str], sequences: int) -> Statistics:
        """Return the families in `needs` that follow from `merged`."""
        return calibration.read(merged, needs, self.structure, self.bench.base.weights, sequences)


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
        self._checksum = models.checksum(self.base)
        self._structures: dict[UnitsConfig, ModelStructure] = {}
        self._items: dict[str, dict[str, TaskItems]] = {}
        self._texts: dict[str, torch.Tensor] = {}
        self._dense: nn.Module | None = None
        self._last: tuple[tuple[_Asked, ...], Statistics] | None = None
        self._reference: divergence.Reference | None = None

    def structure(self, units: UnitsConfig | None = None) -> ModelStructure:
        """Return the model's structure with the units asked for."""
        units = units or UnitsConfig()
        if units not in self._structures:
            self._structures[units] = architectures.describe(self.base.shape, units)
        return self._structures[units]

    def dense(self) -> nn.Module:
        """Return the dense model; callers must not change it."""
        if self._dense is None:
            self._dense = models.dense_model(self.base).to(self.device)
        return self._dense

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
            corpus: self._asked(dataclasses.replace(sample, corpus=corpus or sample.corpus), units, families)
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

    def _asked(self, sample: CalibrationConfig, units: UnitsConfig, families: frozenset[str]) -> _Asked:
        version = data.corpus_version(sample.corpus, self.study.data_root)
        content = (self._checksum, str(self.base.dtype), units, self.study.data_root, version, _STATISTICS_VERSION)
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
            study, corpora = self.study, self.study.calibration_corpora
            windows = divergence.num_windows(study.fidelity.divergence / len(corpora))
            samples = [
                CalibrationConfig(corpus=corpus, samples=windows, length=divergence.WINDOW, draw=study.seed)
                for corpus in corpora
            ]
            try:
                found = [data.token_matrix(self.base.tokenizer, s, study.data_root, "search") for s in samples]
            except DataError as error:
                raise DataError(f"fidelity.divergence: {error}; 0 leaves the comparison out") from error
            self._reference = divergence.reference(self.dense(), torch.cat(found))
            self.release()
        return self._reference

    def items(self, role: Role) -> dict[str, TaskItems]:
        """Return the items of every task in a role (``search``, ``select`` or ``report``), by task."""
        if role not in self._items:
            limit = scoring.max_length(self.base.config, self.base.tokenizer)
            self._items[role] = {
                name: TaskItems(items=items, encoded=scoring.encode(items, self.base.tokenizer, limit))
                for name, items in tasks.study_items(self.study, role).items()
            }
        return self._items[role]

    def perplexity_tokens(self, corpus: str) -> torch.Tensor:
        """Return the tokens (T-vector) that the perplexity on a corpus is taken of, as many as the report wants."""
        if corpus not in self._texts:
            report = self.study.report
            tokens = data.perplexity_tokens(self.base.tokenizer, corpus, self.study.data_root)
            self._texts[corpus] = tokens[: report.perplexity_tokens].clone()
        return self._texts[corpus]

    def recovery_tokens(self, recovery: Component, calibration_corpus: str, seed: int) -> torch.Tensor:
        """Return the training tokens of a recovery, one stream; empty for a recovery that trains on nothing."""
        amount = getattr(recovery.options, "tokens", 0)
        if not amount:
            return torch.zeros(0, dtype=torch.long)
        corpus = recovery.options.corpus or calibration_corpus
        stream = data.token_stream(self.base.tokenizer, corpus, amount, seed, self.study.data_root)
        tokens: torch.Tensor = stream.tokens
        return tokens

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
