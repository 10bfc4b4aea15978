"""The study in Optuna dashboard, on this machine only; and what of Optuna the report needs."""

from __future__ import annotations

import contextlib
import math
import sqlite3
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import optuna

    from adasearch.report import Findings

HOST = "127.0.0.1"
FEW_TRIALS = 10
TOP_TRIALS = 10


def _path(run: Path) -> Path:
    path = run / "study.db"
    if not path.is_file():
        raise StorageError(f"{path}: must exist; `adasearch rebuild {run}` makes it from the trial records")
    return path


def copy_database(run: Path, target: Path) -> None:
    """Write a consistent copy of a run's study database, also while a driver writes to it.

    Raises:
        StorageError: there is no database, or it cannot be read.
    """
    try:
        with (
            contextlib.closing(sqlite3.connect(f"{_path(run).resolve().as_uri()}?mode=ro", uri=True)) as source,
            contextlib.closing(sqlite3.connect(target)) as copy,
        ):
            source.backup(copy)
    except sqlite3.Error as error:
        raise StorageError(f"{run / 'study.db'}: cannot be copied: {error}") from error


@contextlib.contextmanager
def _storage(path: Path) -> Iterator[optuna.storages.RDBStorage]:
    """Open a study database with patience for its writer, and close it again."""
    import optuna

    options = {"connect_args": {"timeout": 60.0}}
    storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}", engine_kwargs=options)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _study(storage: optuna.storages.RDBStorage) -> optuna.Study:
    import optuna

    names = optuna.get_all_study_names(storage)
    if not names:
        raise StorageError(f"{storage.url}: must hold a study; `adasearch rebuild` makes it from the trial records")
    return optuna.load_study(study_name=names[0], storage=storage)


def parameter_importance(run: Path) -> dict[str, float]:
    """Return the share of each parameter in what sets good trials apart, by PED-ANOVA (Watanabe et al. 2023).

    Empty where there is no database, or where the trials do not differ enough.
    """
    import optuna

    if not (run / "study.db").is_file():
        return {}
    with tempfile.TemporaryDirectory() as room:
        copy = Path(room) / "study.db"
        copy_database(run, copy)  # a report must never lock the driver out
        with _storage(copy) as storage:
            try:
                evaluator = optuna.importance.PedAnovaImportanceEvaluator()
                study = _study(storage)
                # of several values the score; a target counts as better the lower it is
                target = (lambda trial: -trial.values[0]) if len(study.directions) > 1 else None
                found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
            except (ValueError, RuntimeError, StorageError):
                return {}
    return {name: float(share) for name, share in found.items() if not math.isnan(share)}


def _incumbent_figure(findings: Findings) -> Any:
    """Return the search score of every trial with its 95 % interval, and the best so far."""
    import plotly.graph_objects as go

    full = [r for r in findings.records if r.result is not None]
    number = [r.number for r in full]
    score = [r.result.score for r in full if r.result]
    best = [max(score[: i + 1]) for i in range(len(score))]
    error = {"type": "data", "array": [1.96 * r.result.stderr for r in full if r.result], "thickness": 1}
    text = [r.recipe or "proposal" for r in full]
    figure = go.Figure()
    figure.add_scatter(x=number, y=score, error_y=error, mode="markers", text=text, name="trial, 95 % interval")
    figure.add_scatter(x=number, y=best, mode="lines", line={"shape": "hv"}, name="best so far")
    dense = findings.dense_record
    if dense is not None and dense.result is not None:
        figure.add_hline(y=dense.result.score, line_dash="dash", annotation_text="dense")
    figure.update_layout(title="Search score by trial", xaxis_title="trial", yaxis_title="search score")
    return figure


def _widths_figure(findings: Findings) -> Any:
    """Return the kept width of every layer of the best trials as one heatmap."""
    import plotly.graph_objects as go

    from adasearch.report import kept_widths

    rows = kept_widths(findings, TOP_TRIALS)
    labels = [f"{row.label}, {kind}" for row in rows for kind in row.kept]
    values = [list(kept) for row in rows for kept in row.kept.values()]
    figure = go.Figure(go.Heatmap(z=values, y=labels, zmin=0, zmax=1, colorscale="Viridis", colorbar={"title": "kept"}))
    figure.update_layout(title="Kept width by layer, best trials first", xaxis_title="layer")
    figure.update_yaxes(autorange="reversed")
    return figure


def add_figures(run: Path, findings: Findings, *, database: Path | None = None) -> tuple[str, ...]:
    """Store our own figures in a run's study, where the dashboard shows them, and return their ids.

    Args:
        run: run folder.
        findings: what `adasearch.report.gather` returned for it.
        database: the study database, None for that of the run; only its driver may write to that one.

    Raises:
        StorageError: there is no study database.
    """
    from optuna_dashboard import save_plotly_graph_object

    figures = {"adasearch-incumbent": _incumbent_figure(findings), "adasearch-widths": _widths_figure(findings)}
    with _storage(database or _path(run)) as storage:
        study = _study(storage)
        return tuple(save_plotly_graph_object(study, figure, graph_object_id=name) for name, figure in figures.items())


@contextlib.contextmanager
def application(run: Path, *, snapshot: bool = False) -> Iterator[Any]:
    """Give the dashboard of a run as a WSGI application.

    Args:
        run: run folder.
        snapshot: serve a copy of the database, so that nothing a visitor does reaches the run; artifacts are left out.

    Raises:
        StorageError: there is no study database.
    """
    from optuna.artifacts import FileSystemArtifactStore
    from optuna_dashboard import wsgi

    with tempfile.TemporaryDirectory() as room:
        path = _path(run)
        if snapshot:
            path = Path(room) / "study.db"
            copy_database(run, path)
        artifacts = run / "artifacts"
        store = FileSystemArtifactStore(artifacts) if artifacts.is_dir() and not snapshot else None
        with _storage(path) as storage:
            _study(storage)
            yield wsgi(storage, artifact_store=store)


def serve(run: Path, *, port: int, say: Callable[[str], None], snapshot: bool = False) -> None:
    """Serve the dashboard of a run on 127.0.0.1 until interrupted.

    The dashboard has no accounts and whoever reaches it can delete the study, so no other address is offered.

    Args:
        run: run folder.
        port: port on 127.0.0.1; 0 takes a free one.
        say: called with each line for the user.
        snapshot: serve a copy, so that nothing can be changed.

    Raises:
        StorageError: there is no study database, or the port is taken.
    """
    from wsgiref.simple_server import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_message(self, *_: object) -> None:
            """Say nothing about single requests."""

    with application(run, snapshot=snapshot) as app:
        try:
            server = make_server(HOST, port, app, handler_class=Quiet)
        except OSError as error:
            raise StorageError(f"port {port} on {HOST} must be free: {error}; give another with --port") from error
        with server:
            bound = server.server_port
            say(f"{run}: http://{HOST}:{bound}/" + (" (a copy: changes are lost)" if snapshot else ""))
            say(f"from another machine: ssh -L {bound}:{HOST}:{bound} <user>@<this host>, then open the same address")
            say("stop with Ctrl-C")
            server.serve_forever()
