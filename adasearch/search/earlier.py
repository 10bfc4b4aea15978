"""Earlier searches as a later one sees them: their scored trials as points of its space.

What is read is frozen in the later run's ``prior.json``: an earlier run may still be going, or be deleted, and
proposals must not change with it.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from adasearch.config import StudyConfig
from adasearch.documents import Count, Finite, NonNegative, fingerprint, join, parse, read_yaml, value
from adasearch.errors import ConfigError
from adasearch.records import DENSE, Record, job_of, read_prior, read_records, write_prior
from adasearch.search.space import Space

_LOG = logging.getLogger(__name__)

MIN_USABLE = 5
"""Usable trials below which an earlier run is refused: fewer tell nothing of a space."""


@value
class Earlier:
    """One earlier search, n of whose trials are of use.

    Args:
        run: its folder, as the study names it.
        points: n rows of d features in the space of the later search.
        params: the point itself where the later space holds it, None where it holds it in part only.
        scores: n, in its own units.
        variances: n squared standard errors.
        scored: trials of it that have a score.
        reason: why the commonest of the others are of no use, empty where all are.
    """

    run: str
    points: tuple[tuple[Finite, ...], ...]
    params: tuple[dict[str, Any] | None, ...]
    scores: tuple[Finite, ...]
    variances: tuple[NonNegative, ...]
    scored: Count
    reason: str = ""

    @property
    def features(self) -> np.ndarray:
        """Return the points (n×d)."""
        return np.array(self.points)

    @property
    def summary(self) -> str:
        """Return how many trials are of use."""
        whole = sum(params is not None for params in self.params)
        why = f" (others: {self.reason})" if self.reason else ""
        return f"{len(self.scores)} of {self.scored} scored trials are of use, {whole} of them points of the space{why}"


@value
class _Frozen:
    """The content of ``prior.json``; `key` says for which space."""

    key: str
    sources: tuple[Earlier, ...]


def gather(study: StudyConfig, space: Space, run: Path | None, where: str = "") -> tuple[Earlier, ...]:
    """Return what the runs that a study names under `warm_start` tell of its space.

    What is frozen in `run` counts; where nothing is, the runs are read.

    Args:
        study: the later one.
        space: its space.
        run: its run folder, None for ``runs/<study name>``.
        where: the study's file with a colon, for messages.

    Raises:
        ConfigError: a folder is no search, this one, named twice, or has too few trials that are of use.
    """
    if not study.warm_start:
        return ()
    run = run or Path("runs") / study.name
    held = _held(run, _key(study))
    if held is not None:
        return held
    seen = {run.resolve(): "this run itself"}
    found = []
    for i, name in enumerate(study.warm_start):
        key, folder = f"{join(where, 'warm_start')}[{i}]", Path(name)
        if folder.resolve() in seen:
            raise ConfigError(key, f"must be another run, given {seen[folder.resolve()]}: {name}")
        seen[folder.resolve()] = f"that of warm_start[{i}]"
        found.append(_read(folder, name, space, key))
    return tuple(found)


def freeze(study: StudyConfig, space: Space, run: Path) -> tuple[Earlier, ...]:
    """Return what `gather` finds, and write it into the run folder if it is not there.

    Raises:
        ConfigError: as `gather`.
        StorageError: the folder is not writable.
    """
    sources = gather(study, space, run)
    if sources and _held(run, _key(study)) is None:
        if any(record.number >= 0 for record in read_records(run)):
            _LOG.warning("prior.json is missing or damaged: earlier runs are read anew, later proposals may differ")
        write_prior(run, _Frozen(key=_key(study), sources=sources))
    return sources


def _key(study: StudyConfig) -> str:
    return fingerprint([study.warm_start, study.space.dimensions, study.trial, study.seed])


def _held(run: Path, key: str) -> tuple[Earlier, ...] | None:
    body = read_prior(run)
    with contextlib.suppress(ConfigError):
        frozen = parse(_Frozen, body or {}, "prior.json:")
        return frozen.sources if frozen.key == key else None
    return None


def _read(folder: Path, name: str, space: Space, where: str) -> Earlier:
    """Return what one earlier run tells of a space; see `gather`."""
    if not (folder / "config.yaml").is_file():
        raise ConfigError(where, f"must be a run folder, which holds config.yaml, given {name}")
    read_yaml(folder / "config.yaml")
    if job_of(folder) not in {None, "run"}:
        raise ConfigError(where, f"must be a search, given what adasearch {job_of(folder)} makes: {name}")
    rows: list[tuple[Record, np.ndarray, dict[str, Any] | None]] = []
    reasons: Counter[str] = Counter()
    scored = scored_trials(folder)
    for record in scored:
        try:
            features, params = point_of(record.config or {}, space)
        except ConfigError as error:
            reasons[error.problem] += 1
        else:
            rows.append((record, features, params))
    ((reason, _),) = reasons.most_common(1) or [("", 0)]
    if len(rows) < MIN_USABLE:
        others = f", {sum(reasons.values())} are none of this space ({reason})" if reasons else ""
        problem = f"must have at least {MIN_USABLE} trials that are of use, has {len(rows)}: {len(scored)} have a score"
        raise ConfigError(where, f"{problem}{others}; given {name}")
    return Earlier(
        run=name,
        points=tuple(tuple(map(float, features)) for _, features, _ in rows),
        params=tuple(params for _, _, params in rows),
        scores=tuple(record.result.score for record, _, _ in rows if record.result),
        variances=tuple(record.result.stderr**2 for record, _, _ in rows if record.result),
        scored=len(scored),
        reason=reason,
    )


def point_of(config: dict[str, Any], space: Space) -> tuple[np.ndarray, dict[str, Any] | None]:
    """Return the features (d) of a trial of another study, and the point where each of its active parameters is known.

    What the space cannot say of the trial is as if it were inactive, see `Encoding`.

    Raises:
        ConfigError: it says nothing of the trial, see `Space.partial`.
    """
    params = space.partial(config)
    middle = {name: parameter.from_unit(0.5) for name, parameter in space.parameters.items()}
    whole = {**middle, **params} if space.active(params) <= params.keys() else None
    return space.features(params), whole


def scored_trials(run: Path) -> list[Record]:
    """Return the trials of a run that have a score, one record for each configuration, by number."""
    found: dict[str, Record] = {}
    numbers: set[int] = set()
    for record in read_records(run):
        result = record.result
        if record.number == DENSE or result is None or record.config is None or record.number in numbers:
            continue
        if math.isfinite(result.score) and math.isfinite(result.stderr):
            numbers.add(record.number)
            found.setdefault(fingerprint({**record.config, "seed": 0}), record)
    return list(found.values())
