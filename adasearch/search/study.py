"""The study on disk: trials asked and told, with what a reader of the dashboard wants beside them.

The database says which trials there are and serves the samplers; the records say what came of them. It can be made
again from the records, and from ``proposal.json`` in each trial's folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import re
import shutil
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
import yaml
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.trial import TrialState
from optuna_dashboard import save_note
from sqlalchemy.exc import SQLAlchemyError

from adasearch.config import SEARCHED, StudyConfig, TrialResult
from adasearch.documents import plain, read_yaml
from adasearch.errors import ConfigError, StorageError
from adasearch.racing import TaskValues
from adasearch.records import (
    Record,
    read_items,
    read_record,
    read_records,
    storage_errors,
    trial_folder,
    write_atomically,
)
from adasearch.search import lease, telling
from adasearch.search.belief import Scored, expected_gain
from adasearch.search.earlier import freeze
from adasearch.search.executor import printable
from adasearch.search.noise import Consensus
from adasearch.search.notes import study_note, trial_note
from adasearch.search.outcomes import Asked, Proposed, lag_of, settled
from adasearch.search.sampler import NOISE, RECIPE, STDERR, distributions
from adasearch.search.samplers import MODELLED, choose, make_sampler
from adasearch.search.space import Space

if TYPE_CHECKING:
    from adasearch.search.prior import Prior

_LOG = logging.getLogger(__name__)
_NAME, _FINGERPRINT = "study.db", "fingerprint"
GAIN = "expected gain"
_FOLDER = re.compile(r"^(\d+)-(\d+)$")
_BUSY_SECONDS = 60.0


@contextlib.contextmanager
def _database(path: Path) -> Iterator[None]:
    """Turn what the database answers into a `StorageError` that says what to do."""
    try:
        with storage_errors(path):
            yield
    except (optuna.exceptions.StorageInternalError, SQLAlchemyError, sqlite3.Error) as error:
        cause = printable(str(error.__cause__ or error))
        advice = "the records of the trials are not touched: run the same command again, or adasearch rebuild RUN"
        raise StorageError(f"{path}: {cause}; {advice}") from error


def _check_database(path: Path) -> None:
    """Raise `StorageError` if the database is damaged, and set it to write ahead, so that a reader never blocks."""
    try:
        with storage_errors(path), contextlib.closing(sqlite3.connect(path, timeout=_BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            (answer,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.Error as error:
        answer = str(error)
    if answer != "ok":
        problem = "is damaged; adasearch rebuild RUN makes it again from the records of the trials"
        raise StorageError(f"{path}: {problem} ({printable(answer)})")


def check_owner(run: Path, config: StudyConfig, sections: tuple[str, ...] = SEARCHED) -> None:
    """Make sure that a run folder is new or belongs to `config`, and write ``config.yaml`` there.

    Args:
        run: run folder.
        config: the study.
        sections: of it that may not have changed.

    Raises:
        StorageError: it belongs to another study; the message names the sections that differ.
    """
    path = run / "config.yaml"
    data = config.to_dict()
    if path.exists():
        try:
            held = read_yaml(path)
        except ConfigError as error:
            raise StorageError(str(error)) from error
        wanted = json.loads(json.dumps(plain(data)))
        changed = [key for key in sections if held.get(key) != wanted[key]]
        if changed:
            advice = "give another folder, or another name in the study"
            raise StorageError(f"{run}: holds another study: {', '.join(changed)} differ; {advice}")
    write_atomically(path, yaml.safe_dump(plain(data), sort_keys=False, allow_unicode=True).encode())


class SearchStudy:
    """An open study; made by `open_study` and `rebuild`. `sampler` is what proposes its trials, and why."""

    def __init__(self, run: Path, config: StudyConfig, space: Space) -> None:
        self._run = run
        self._config = config
        self._space = space
        self._distributions = distributions(space)
        self.sampler = choose(config, space)
        self._path = run / _NAME
        self._earlier = freeze(config, space, run)
        for earlier in self._earlier:
            _LOG.info("warm start from %s: %s", earlier.run, earlier.summary)
        self._artifacts = FileSystemArtifactStore(run / "artifacts")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with _database(self._path):
            (run / "artifacts").mkdir(exist_ok=True)
            self._study = self._open()
            self._consensus = self._told_consensus()

    def _open(self) -> optuna.Study:
        try:
            engine = {"connect_args": {"timeout": _BUSY_SECONDS}}
            storage = optuna.storages.RDBStorage(f"sqlite:///{self._path}", engine_kwargs=engine)
            names = optuna.get_all_study_names(storage)
            name = names[0] if names else self._config.name
            study = optuna.create_study(
                study_name=name,
                storage=storage,
                directions=telling.directions(self._config.objective),
                load_if_exists=True,
            )
        except (RuntimeError, ValueError) as error:
            raise StorageError(f"{self._path}: is no study of this version: {printable(str(error))}") from error
        held = study.user_attrs.get(_FINGERPRINT)
        if held is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                study.set_metric_names(telling.metric_names(self._config.objective))
            study.set_user_attr("model", self._config.model.name)
            study.set_user_attr("remove", self._config.budget.remove)
            study.set_user_attr(_FINGERPRINT, self._config.fingerprint)
        elif held != self._config.fingerprint:
            problem = f"belongs to a study with fingerprint {held}, this one's is {self._config.fingerprint}"
            raise StorageError(f"{self._path}: {problem}; give another folder, or another name in the study")
        return study

    def trials(self) -> list[Asked]:
        """Return all trials, by number."""
        with _database(self._path):
            frozen = self._study.get_trials(deepcopy=False)
        return [
            Asked(
                number=t.number,
                params=dict(t.params),
                recipe=t.user_attrs.get(RECIPE),
                told=t.state.is_finished(),
                gain=t.user_attrs.get(GAIN),
            )
            for t in frozen
        ]

    def before(self, number: int) -> list[optuna.trial.FrozenTrial]:
        """Return the trials before `number`, which is the next one: all that a proposal of it may know."""
        with _database(self._path):
            before = self._study.get_trials(deepcopy=False)
        assert len(before) == number, f"asked for trial {number} of {len(before)}"
        return before

    def proposed(self, before: list[optuna.trial.FrozenTrial]) -> Proposed:
        """Return what the sampler proposes after `before`. Reads no database, so any thread may call it.

        The sampler is asked on a copy in memory, because a trial that Optuna asks for gets its values one transaction
        after the other; in the study it is whole or not at all.
        """
        start = self._start(before) if self._prior else None
        if start is not None:
            return Proposed(params=start, gain=None)
        settings = dataclasses.replace(self._config.sampler, type=self.sampler.type)
        sampler = make_sampler(settings, self._space, self._config.seed, len(before), self._prior)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copy = optuna.create_study(directions=telling.directions(self._config.objective), sampler=sampler)
            copy.set_metric_names(telling.metric_names(self._config.objective))
            copy.add_trials(before)
            params = dict(copy.ask(self._distributions).params)
        return Proposed(params=params, gain=self._gain(before, params))

    def _gain(self, before: list[optuna.trial.FrozenTrial], params: dict[str, Any]) -> float | None:
        """Return the expected gain of a point that the model proposes, None where no rule asks for it."""
        drawn = sum(RECIPE not in trial.user_attrs for trial in before)
        if self._config.stopping.gain is None or drawn < self._config.sampler.startup:
            return None
        scored = [
            Scored(
                params=t.params,
                score=float(t.values[0]),
                stderr=float(t.user_attrs.get(NOISE, t.user_attrs.get(STDERR, 0.0))),
                full=t.user_attrs.get("state") == "done",
            )
            for t in before
            if t.state == TrialState.COMPLETE and t.values and self._distributions.keys() <= t.params.keys()
        ]
        return expected_gain(self._space, scored, params)

    @functools.cached_property
    def _prior(self) -> Prior | None:
        """Return what earlier searches know, None where there are none."""
        if not self._earlier:
            return None
        from adasearch.search.prior import Prior

        return Prior(self._earlier)

    def _start(self, before: list[optuna.trial.FrozenTrial]) -> dict[str, Any] | None:
        """Return a point of an earlier search, in the place of one of the first that are proposed."""
        assert self._prior is not None
        index = sum(RECIPE not in t.user_attrs for t in before)
        if index == 0 and self.sampler.type not in MODELLED:
            _LOG.info("sampler %s takes start trials from earlier runs, no more", self.sampler.type)
        placed = [t for t in before if self._distributions.keys() <= t.params.keys()]
        known = {self._space.point_key(t.params): t.values[0] if t.values else None for t in placed}
        return self._prior.start(index, self._config.sampler.startup, self._space.point_key, known)

    def tell(self, record: Record, dense: TrialResult | None) -> None:
        """Tell what came of a trial, with its attributes, note and files. Telling again what was told does nothing.

        Raises:
            StorageError: the database cannot be written, or this driver no longer holds the run.
        """
        lease.check(self._run)
        with _database(self._path):
            frozen = self._frozen(record.number)
            if frozen.state.is_finished():
                return
            trial, folder = self._handle(frozen), trial_folder(self._run, record.number, record.attempt)
            items = read_items(folder) if record.result else None
            for key, item in {**telling.attributes(record), **self._noise(record, items)}.items():
                trial.set_user_attr(key, item)
            save_note(trial, trial_note(record, dense))
            self._upload(frozen, folder)
            telling.report_rungs(trial, record)
            telling.constrain(self._study, frozen, self._config.objective, record)
            values = telling.values(self._config.objective, record.result) if record.result else None
            state = TrialState.FAIL if values is None else TrialState.COMPLETE
            self._study.tell(record.number, values, state=state, skip_if_finished=True)
        if items and record.result and not record.result.stopped:
            self._consensus.add(items)

    def _told_consensus(self) -> Consensus:
        """Return the consensus of the trials that were told, in their order."""
        consensus = Consensus()
        for frozen in self._study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]):
            if frozen.user_attrs.get("state") == "done":
                items = read_items(trial_folder(self._run, frozen.number, int(frozen.user_attrs.get("attempt", 1))))
                if items:
                    consensus.add(items)
        return consensus

    def _noise(self, record: Record, items: TaskValues | None) -> dict[str, float]:
        """Return the paired standard error of a trial's score, the plain one of a score that is no mean of items."""
        if record.result is None:
            return {}
        error = self._consensus.error(items) if items else record.result.stderr
        return {} if error is None else {NOISE: error}

    def note(self, dense: TrialResult | None, best: Record | None) -> None:
        """Write where the study stands into its note."""
        with _database(self._path):
            save_note(self._study, study_note(self._config, dense, best))

    def add(self, asked: Asked) -> None:
        """Add a running trial, in one transaction; without a place if it has none in this space."""
        known = asked.params if self._distributions.keys() <= asked.params.keys() else {}
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=known,
            distributions=self._distributions if known else {},
            user_attrs={
                key: said for key, said in {RECIPE: asked.recipe, GAIN: asked.gain}.items() if said is not None
            },
        )
        with _database(self._path):
            self._study.add_trial(trial)

    def close(self) -> None:
        """Close the database's files."""
        # Optuna gives no other way to let go of the connections of a storage
        self._study._storage.remove_session()

    def _frozen(self, number: int) -> optuna.trial.FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    def _handle(self, frozen: optuna.trial.FrozenTrial) -> optuna.Trial:
        # the only way to a live handle of a trial that another process asked for
        return optuna.Trial(self._study, frozen._trial_id)

    def _upload(self, frozen: optuna.trial.FrozenTrial, folder: Path) -> None:
        storage = self._study._storage
        there = {
            meta.filename
            for meta in get_all_artifact_meta(frozen, storage=storage)
            # Optuna writes the entry before the bytes; a driver that was killed in between leaves an entry alone
            if (self._run / "artifacts" / meta.artifact_id).exists()
        }
        for name in ("result.json", "config.yaml"):
            if name not in there and (folder / name).exists():
                file = str(folder / name)
                upload_artifact(artifact_store=self._artifacts, file_path=file, study_or_trial=frozen, storage=storage)


def open_study(run: Path, config: StudyConfig, space: Space) -> SearchStudy:
    """Return the study in the folder `run`, made if there is none; the caller holds its lease.

    Raises:
        StorageError: the folder belongs to another study, or its database is damaged or missing.
    """
    check_owner(run, config)
    path = run / _NAME
    if not path.exists() and any(record.number >= 0 for record in read_records(run)):
        problem = "is missing though there are records of trials; adasearch rebuild RUN makes it again from them"
        raise StorageError(f"{path}: {problem}")
    _check_database(path)
    study = SearchStudy(run, config, space)
    num_asked = len(study.trials())
    missing = [r.number for r in read_records(run) if r.number >= num_asked]
    if missing:
        problem = f"lacks trial {missing[0]}, of which there is a record; adasearch rebuild RUN makes it again"
        raise StorageError(f"{path}: {problem}")
    return study


def rebuild(run: Path, config: StudyConfig, space: Space) -> int:
    """Make ``study.db`` again from what lies in the trials' folders.

    Trials that were running are running again and are taken up by the next search; their order of telling is kept, so
    that it goes on as it would have. Returns the number of trials that have a record.

    Raises:
        StorageError: the folder is held by another driver, belongs to another study or cannot be written.
    """
    run = run.resolve()
    with lease.hold(run):
        check_owner(run, config)
        _remove_database(run)
        return _rebuilt(run, config, space)


def _remove_database(run: Path) -> None:
    with storage_errors(run / _NAME):
        for end in ("", "-wal", "-shm", "-journal"):
            (run / f"{_NAME}{end}").unlink(missing_ok=True)
        shutil.rmtree(run / "artifacts", ignore_errors=True)


def _rebuilt(run: Path, config: StudyConfig, space: Space) -> int:
    _check_database(run / _NAME)
    study = SearchStudy(run, config, space)
    by_number: dict[int, list[Record]] = {}
    for record in read_records(run):
        by_number.setdefault(record.number, []).append(record)
    trials = _trials_on_disk(run, space)
    for asked in trials:
        study.add(asked)
    done = len(trials) >= config.trials
    last = len(trials) if done else len(trials) - lag_of(config) + 1
    dense = next((r.result for r in by_number.get(-1, []) if r.result), None)
    for asked in trials[: max(last, 0)]:
        final = settled(by_number.get(asked.number, []), config.limits.attempts)
        if final is None:
            break
        study.tell(final, dense)
    study.close()
    return sum(number >= 0 for number in by_number)


def _trials_on_disk(run: Path, space: Space) -> list[Asked]:
    """Return all trials of which there is a folder, without gaps; where no point is known, none is given."""
    found: dict[int, Asked] = {}
    for folder in sorted((run / "trials").glob("*-*")):
        match = _FOLDER.match(folder.name)
        if match is not None:
            asked = _trial_on_disk(folder, int(match[1]), space)
            if asked is not None:
                found[asked.number] = asked
    numbers = range(max(found, default=-1) + 1)
    return [found.get(n, Asked(number=n, params={}, recipe=None, told=False)) for n in numbers]


def _trial_on_disk(folder: Path, number: int, space: Space) -> Asked | None:
    try:
        data = json.loads((folder / "proposal.json").read_text(encoding="utf-8"))
        point, gain = dict(data["params"]), data.get("gain")
        return Asked(number=number, params=point, recipe=data["recipe"], told=False, gain=gain)
    except (OSError, ValueError, KeyError, TypeError):
        record = read_record(folder)
    if record is None or record.config is None:
        return None
    try:
        params = space.encode(record.config)
    except ConfigError:
        params = None
    return Asked(number=number, params=params or {}, recipe=record.recipe, told=False)
