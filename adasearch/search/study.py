"""The study on disk: trials asked and told, with what a reader of the dashboard wants beside them.

The database says which trials there are and serves the samplers; the records say what came of them. It can be made
again from the records, and from ``proposal.json`` in each trial's folder.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import sqlite3
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.artifacts import FileSystemArtifactStore, get_all_artifact_meta, upload_artifact
from optuna.study import StudyDirection
from optuna.trial import TrialState
from optuna_dashboard import save_note
from sqlalchemy.exc import SQLAlchemyError

from adasearch.config import SEARCHED, StudyConfig, TrialResult
from adasearch.documents import plain, read_yaml
from adasearch.errors import ConfigError, StorageError
from adasearch.records import (
    Record,
    read_record,
    read_records,
    storage_errors,
    trial_folder,
    write_atomically,
)
from adasearch.search import lease
from adasearch.search.executor import printable
from adasearch.search.notes import study_note, trial_note
from adasearch.search.outcomes import Asked, Recipe, lag, num_workers, settled
from adasearch.search.sampler import RECIPE, STDERR, distributions
from adasearch.search.samplers import make_sampler
from adasearch.search.space import Space
from adasearch.sections import ObjectiveConfig

_NAME, _FINGERPRINT = "study.db", "fingerprint"
CONSTRAINTS = "constraints"
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
    """An open study; made by `open_study` and `rebuild`."""

    def __init__(self, run: Path, config: StudyConfig, space: Space) -> None:
        self._run = run
        self._config = config
        self._space = space
        self._distributions = distributions(space)
        self._path = run / _NAME
        self._artifacts = FileSystemArtifactStore(run / "artifacts")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with _database(self._path):
            (run / "artifacts").mkdir(exist_ok=True)
            self._study = self._open()

    def _open(self) -> optuna.Study:
        try:
            engine = {"connect_args": {"timeout": _BUSY_SECONDS}}
            storage = optuna.storages.RDBStorage(f"sqlite:///{self._path}", engine_kwargs=engine)
            names = optuna.get_all_study_names(storage)
            name = names[0] if names else self._config.name
            study = optuna.create_study(
                study_name=name, storage=storage, directions=directions(self._config.objective), load_if_exists=True
            )
        except (RuntimeError, ValueError) as error:
            raise StorageError(f"{self._path}: is no study of this version: {printable(str(error))}") from error
        held = study.user_attrs.get(_FINGERPRINT)
        if held is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                study.set_metric_names(metric_names(self._config.objective))
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
            Asked(number=t.number, params=dict(t.params), recipe=t.user_attrs.get(RECIPE), told=t.state.is_finished())
            for t in frozen
        ]

    def ask(self, number: int, recipe: Recipe | None) -> Asked:
        """Return the new trial `number`: a recipe, or what the sampler proposes given all that was told.

        The sampler is asked on a copy in memory, because a trial that Optuna asks for gets its values one transaction
        after the other; here it is in the study whole or not at all.
        """
        with _database(self._path):
            before = self._study.get_trials(deepcopy=False)
        assert len(before) == number, f"asked for trial {number} of {len(before)}"
        params = recipe.params if recipe else self._proposed(before)
        asked = Asked(number=number, params=params, recipe=recipe.name if recipe else None, told=False)
        self.add(asked)
        return asked

    def _proposed(self, before: list[optuna.trial.FrozenTrial]) -> dict[str, Any]:
        sampler = make_sampler(self._config.sampler, self._space, self._config.seed, len(before))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copy = optuna.create_study(directions=directions(self._config.objective), sampler=sampler)
            copy.set_metric_names(metric_names(self._config.objective))
            copy.add_trials(before)
            return dict(copy.ask(self._distributions).params)

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
            trial = self._handle(frozen)
            for key, item in _attributes(record).items():
                trial.set_user_attr(key, item)
            save_note(trial, trial_note(record, dense))
            self._upload(frozen, trial_folder(self._run, record.number, record.attempt))
            self._report_rungs(trial, record)
            self._constrain(frozen, record)
            values = told_values(self._config.objective, record.result) if record.result else None
            state = TrialState.FAIL if values is None else TrialState.COMPLETE
            self._study.tell(record.number, values, state=state, skip_if_finished=True)

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
            user_attrs={RECIPE: asked.recipe} if asked.recipe else {},
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

    def _constrain(self, frozen: optuna.trial.FrozenTrial, record: Record) -> None:
        """Tell how far a trial is beyond each hard limit, whatever came of it: a GP sampler fails where one is missing.

        Under the key of Optuna 4, a list, which the samplers of Optuna 5 and the dashboard both read; the dashboard
        does not know the key that `Trial.set_constraint` writes.
        """
        found = self._config.objective.violations(record.result.shares if record.result else {})
        if found:
            storage = self._study._storage
            storage.set_trial_system_attr(frozen._trial_id, CONSTRAINTS, list(found.values()))

    @staticmethod
    def _report_rungs(trial: optuna.Trial, record: Record) -> None:
        """Tell the rungs as intermediate values, higher is better: a divergence is told with the other sign.

        With several objectives Optuna takes no intermediate values; there they are an attribute.
        """
        rungs = record.result.rungs if record.result else ()
        if len(trial.study.directions) > 1:
            trial.set_user_attr("rungs", {str(rung.step): rung.merit for rung in rungs})
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a driver that was killed while telling has told some of them
            for rung in rungs:
                trial.report(rung.merit, rung.step)

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


def directions(objective: ObjectiveConfig) -> list[StudyDirection]:
    """Return what Optuna is to do with each value: the score goes up, the costs beside it go down."""
    return [StudyDirection.MAXIMIZE, *(StudyDirection.MINIMIZE for _ in objective.also)]


def metric_names(objective: ObjectiveConfig) -> list[str]:
    """Return what each value is called."""
    return [f"{objective.metric}, mean of the search tasks", *map(_metric, objective.also)]


def _metric(cost: str) -> str:
    return f"{cost}, fraction of dense"


def told_values(objective: ObjectiveConfig, result: TrialResult) -> list[float]:
    """Return the values of a trial in the order of `directions`: its score, then costs as fractions of the dense."""
    return [result.score, *(result.shares[cost] for cost in objective.also)]


def _attributes(record: Record) -> dict[str, Any]:
    """Return what the dashboard shows in columns; `STDERR` is also what the sampler takes the noise from."""
    if record.result is None:
        assert record.failure is not None
        return {"state": "failed", "attempt": record.attempt, "failure": plain(record.failure)}
    result = record.result
    early: dict[str, Any] = {rung.kind: rung.value for rung in result.rungs if rung.kind != "recovered"}
    return {
        **early,
        STDERR: result.stderr,
        **{f"{STDERR} {_metric(cost)}": spread for cost, spread in result.spreads.items()},
        **{_metric(cost): round(share, 5) for cost, share in result.shares.items()},
        "state": "stopped" if result.stopped else "done",
        "attempt": record.attempt,
        "parameters": result.parameters,
        "items": result.items,
        "seconds": round(sum(result.seconds.values()), 2),
        "tasks": {task.task: round(task.acc, 4) for task in result.tasks},
    }


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
    last = len(trials) if done else len(trials) - lag(num_workers(config)) + 1
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
        return Asked(number=number, params=dict(data["params"]), recipe=data["recipe"], told=False)
    except (OSError, ValueError, KeyError, TypeError):
        record = read_record(folder)
    if record is None or record.config is None:
        return None
    try:
        params = space.encode(record.config)
    except ConfigError:
        params = None
    return Asked(number=number, params=params or {}, recipe=record.recipe, told=False)
