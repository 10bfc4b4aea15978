"""The dashboard as a WSGI application: no port is opened except where that is the point."""

from __future__ import annotations

import io
import json
import sqlite3
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution, IntDistribution

from adasearch import dashboard, report
from adasearch.errors import StorageError
from tests.test_report import run, study  # noqa: F401 - a fixture


@pytest.fixture
def study_run(run: Path) -> Path:  # noqa: F811
    """The run of the report's tests with a study of 24 trials, of which `strong` decides and `idle` does nothing."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = f"sqlite:///{run / 'study.db'}"
    made = optuna.create_study(storage=url, study_name="synthetic", direction="maximize")
    space = {"strong": FloatDistribution(0, 1), "idle": IntDistribution(1, 9)}
    made.sampler = optuna.samplers.RandomSampler(seed=1)
    for _ in range(24):
        trial = made.ask(space)
        made.tell(trial, trial.params["strong"])
    with sqlite3.connect(run / "study.db") as connection:
        connection.execute("PRAGMA journal_mode=WAL")
    (run / "artifacts").mkdir()
    return run


def call(app: Callable[..., Any], path: str, method: str = "GET") -> tuple[int, bytes]:
    """Ask a WSGI application as a browser would."""
    answer: list[str] = []
    environ = {
        "REQUEST_METHOD": method, "PATH_INFO": path, "QUERY_STRING": "", "SERVER_NAME": "localhost",
        "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "CONTENT_LENGTH": "0", "wsgi.input": io.BytesIO(),
        "wsgi.errors": io.StringIO(), "wsgi.url_scheme": "http", "wsgi.version": (1, 0), "wsgi.multithread": False,
        "wsgi.multiprocess": False, "wsgi.run_once": False,
    }  # fmt: skip
    body = b"".join(app(environ, lambda status, *_: answer.append(status)))
    return int(answer[0].split()[0]), body


def study_names(app: Callable[..., Any]) -> list[str]:
    status, body = call(app, "/api/studies")
    assert status == 200
    return [s["study_name"] for s in json.loads(body)["study_summaries"]]


def test_shows_the_study(study_run: Path) -> None:
    with dashboard.application(study_run) as app:
        assert study_names(app) == ["synthetic"]
        status, body = call(app, "/api/studies/1")
        assert status == 200
        assert len(json.loads(body)["trials"]) == 24


def test_snapshot_protects_the_run(study_run: Path) -> None:
    with dashboard.application(study_run, snapshot=True) as app:
        assert study_names(app) == ["synthetic"]
        assert call(app, "/api/studies/1", "DELETE")[0] == 204
        assert study_names(app) == []
    assert optuna.get_all_study_names(f"sqlite:///{study_run / 'study.db'}") == ["synthetic"]


def test_snapshot_while_a_writer_holds_the_database(study_run: Path, tmp_path: Path) -> None:
    writer = sqlite3.connect(study_run / "study.db")
    writer.execute("BEGIN IMMEDIATE")
    try:
        dashboard.copy_database(study_run, tmp_path / "copy.db")
    finally:
        writer.close()
    assert optuna.get_all_study_names(f"sqlite:///{tmp_path / 'copy.db'}") == ["synthetic"]


def test_missing_database_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="rebuild"), dashboard.application(tmp_path):
        pass
    assert not (tmp_path / "study.db").exists()


def test_damaged_database(tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StorageError, match="cannot be copied"), dashboard.application(tmp_path, snapshot=True):
        pass


def test_figures_are_stored_and_served(study_run: Path) -> None:
    findings = report.gather(study_run, study())
    assert set(dashboard.add_figures(study_run, findings)) == {"adasearch-incumbent", "adasearch-widths"}
    dashboard.add_figures(study_run, findings)  # again: replaced, not doubled
    with dashboard.application(study_run) as app:
        stored = json.loads(call(app, "/api/studies/1")[1])["plotly_graph_objects"]
    assert {g["id"] for g in stored} == {"adasearch-incumbent", "adasearch-widths"}
    assert all(len(g["graph_object"]) < 200_000 for g in stored)


def test_importance(study_run: Path) -> None:
    found = dashboard.parameter_importance(study_run)
    assert set(found) == {"strong", "idle"}
    assert found["strong"] > found["idle"]
    assert dashboard.parameter_importance(study_run.parent / "nowhere") == {}


def test_importance_is_in_the_report(study_run: Path) -> None:
    text = report.write(study_run, study()).read_text()
    assert "strong" in text
    assert "PED-ANOVA" in text


def test_serve_binds_to_this_machine_only(study_run: Path) -> None:
    said: list[str] = []
    ready = threading.Event()

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("stop"):
            ready.set()

    serve = threading.Thread(target=dashboard.serve, args=(study_run,), kwargs={"port": 0, "say": say}, daemon=True)
    serve.start()
    assert ready.wait(30)
    url = said[0].split()[1]
    assert url.startswith("http://127.0.0.1:")
    assert "ssh -L" in said[1]
    with urllib.request.urlopen(f"{url}api/studies", timeout=30) as answer:
        assert b"synthetic" in answer.read()
    port = int(url.rstrip("/").rsplit(":", 1)[1])
    with pytest.raises(StorageError, match="must be free"):
        dashboard.serve(study_run, port=port, say=lambda _: None)
