"""The jobs on a run folder: search and finish it, or compare recipes; check everything first, go on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from adasearch import tradeoff
from adasearch.checks import Checked, check_study, machines, place
from adasearch.config import StudyConfig, load_study
from adasearch.display import open_display
from adasearch.documents import plain
from adasearch.environment import machine, versions
from adasearch.errors import ConfigError, StorageError
from adasearch.records import DENSE, job_of, read_records, write_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from adasearch.placement import Placement
    from adasearch.search.executor import Executor


def open_executor(study: StudyConfig, run: Path, placed: Placement) -> Executor:
    """Return an executor of the workers that were decided on; a worker is opened when it is first needed."""
    from adasearch.worker import open_worker

    factory = functools.partial(open_worker, study, str(run.resolve()), placed.threads, placed.gpu_memory)
    if study.cluster.address == "in_process":
        from adasearch.search.executor import InProcessExecutor

        return InProcessExecutor(factory)
    from adasearch.search.ray_executor import RayExecutor

    return RayExecutor(
        factory, workers=placed.workers, threads=placed.threads, gpus=placed.gpus, address=study.cluster.address
    )


def _going_on(study: StudyConfig, run: Path) -> StudyConfig:
    """Return the study with the workers and recipes that its run began with, where it leaves them open.

    What is proposed depends on both; other memory or cores, more trials or a new recipe must not change it halfway.
    """
    with contextlib.suppress(ConfigError):  # new, damaged, or of another study: `check_owner` says so
        held = load_run(run)
        if study.cluster.workers == "auto":
            cluster = dataclasses.replace(study.cluster, workers=held.cluster.workers)
            study = dataclasses.replace(study, cluster=cluster)
        if study.all_recipes:
            study = dataclasses.replace(study, recipes=held.recipes, all_recipes=held.all_recipes)
    return study


def _placed(study: StudyConfig, placed: Placement) -> StudyConfig:
    """Return the study with its workers decided."""
    cluster = dataclasses.replace(
        study.cluster,
        workers=placed.workers,
        threads=placed.threads,
        gpus_per_worker=placed.gpus,
        gpu_memory=placed.gpu_memory,
    )
    return dataclasses.replace(study, cluster=cluster)


def _say_placement(placed: Placement, say: Callable[[str], None]) -> None:
    for line in (placed.summary, *(f"warning: {warning}" for warning in placed.warnings)):
        say(line)


def _check_job(run: Path, job: str) -> None:
    """Make sure that a run folder is new or for `job`.

    Raises:
        StorageError: it is for another one.
    """
    held = job_of(run)
    if held not in {None, job}:
        raise StorageError(f"{run}: holds what adasearch {held} makes; give adasearch {job} another folder with --out")


def _write_manifest(
    run: Path, job: str, study: StudyConfig, checked: Checked, placements: dict[str, Placement]
) -> None:
    """Write what the figures of a run depend on: versions, seeds, model, items of each split, hardware."""
    write_json(
        run / "manifest.json",
        {
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "job": job,
            "fingerprint": study.fingerprint,
            "seed": study.seed,
            "sampler": plain(checked.sampler),
            "versions": versions(),
            "machine": machine(),
            "placement": {name: {"summary": p.summary, **plain(p)} for name, p in placements.items()},
            "model": {
                "name": study.model.name,
                "digest": checked.model_digest,
                "parameters": checked.structure.parameters,
            },
            "target_parameters": checked.target,
            "budget": {"given": study.budget.to_dict(), "by_equal_ratios": checked.budget.to_dict()},
            "items": {role: {task: list(ids) for task, ids in tasks.items()} for role, tasks in checked.items.items()},
        },
    )


def _write_ending(run: Path, sentence: str) -> None:
    """Add to the manifest how the search ended."""
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    write_json(run / "manifest.json", {**manifest, "search": sentence})


def load_run(run: Path) -> StudyConfig:
    """Return the study that a run folder was made with.

    Raises:
        ConfigError: the folder is no run.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ConfigError(str(run), "must be a run folder, which holds config.yaml")
    return load_study(path)


def run_study(path: Path, *, out: Path | None, say: Callable[[str], None]) -> Path:
    """Run the study in the file `path` to its end and return its run folder.

    Args:
        path: study file.
        out: run folder, None for ``runs/<study name>``.
        say: called with each line for the user.

    Raises:
        AdaSearchError: what is wrong, where, and what was kept.
    """
    from adasearch.finalize import finalize
    from adasearch.search.driver import run_search
    from adasearch.search.lease import hold
    from adasearch.search.outcomes import ending
    from adasearch.search.seeds import decided
    from adasearch.search.space import Space
    from adasearch.search.study import check_owner

    quieten()
    study = load_study(path)
    run = out or Path("runs") / study.name
    checked = check_study(study, f"{path}:", run)
    run.mkdir(parents=True, exist_ok=True)
    with hold(run):
        study, offered = _going_on(study, run), machines(study)
        placed = place(study, checked.shape, offered)
        placed_last = place(study, checked.shape, offered, finalists=True)
        space = Space.from_config(study.space, study.trial, seed=study.seed)
        study = decided(_placed(study, placed), space)
        _check_job(run, "run")
        check_owner(run, study)
        _write_manifest(run, "run", study, checked, {"search": placed, "finalists": placed_last})
        say(f"{study.name}: {checked.summary} -> {run}")
        _say_placement(placed, say)
        with contextlib.ExitStack() as stack:
            executor = stack.enter_context(open_executor(study, run, placed))
            with open_display(study.trials, study.name) as display:
                found = run_search(study, space, run, executor, display.observe)
            _write_ending(run, ending(run, study, sum(record.number != DENSE for record in found)))
            if (placed_last.workers, placed_last.gpus) != (placed.workers, placed.gpus):
                executor.close()
                executor = stack.enter_context(open_executor(study, run, placed_last))
            with open_display(0, study.name) as display:
                finalize(study, run, executor, display)
        report = write_report(run)
    for line in status(run):
        say(line)
    say(f"report: {report}")
    return run


def compare_study(path: Path, *, recipes: Sequence[str] | None, out: Path | None, say: Callable[[str], None]) -> Path:
    """Put the recipes under one harness, on the model and budget of the study in `path`, and return the run folder.

    Args:
        path: study file.
        recipes: names, None for all there are.
        out: run folder, None for ``runs/<study name>-compare``.
        say: called with each line for the user.

    Raises:
        AdaSearchError: what is wrong, where, and what was kept.
    """
    from adasearch import comparison
    from adasearch.search.lease import hold
    from adasearch.search.study import check_owner

    quieten()
    study = comparison.with_recipes(load_study(path), recipes, path)
    run = out or Path("runs") / f"{study.name}-compare"
    checked = check_study(study, f"{path}:", run)
    run.mkdir(parents=True, exist_ok=True)
    with hold(run):
        study = _going_on(study, run)
        trained, most = comparison.trained(study), len(study.recipes) + 1
        placed = place(study, checked.shape, machines(study), trained=trained, most=most)
        study = _placed(study, placed)
        _check_job(run, "compare")
        check_owner(run, study, comparison.SHARED)
        _write_manifest(run, "compare", study, checked, {"comparison": placed})
        say(f"{study.name}: {checked.summary}, {len(study.recipes)} recipes -> {run}")
        _say_placement(placed, say)
        with open_executor(study, run, placed) as executor, open_display(0, study.name) as display:
            comparison.compare(study, run, executor, display)
        report = write_report(run)
    found = comparison.gather(run, study)
    for line in comparison.lines(found):
        say(line)
    say(f"report: {report}")
    comparison.require_scores(found)
    return run


def quieten() -> None:
    """Keep libraries from writing between the lines of the display."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("optuna", "lm_eval", "lm-eval", "ray", "datasets", "transformers", "filelock", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)


def write_report(run: Path) -> Path:
    """Write ``leaderboard.csv`` and ``report.html`` of a run and return the report's path."""
    from adasearch import comparison, comparison_html, dashboard, report

    study = load_run(run)
    if job_of(run) == "compare":
        found = comparison.gather(run, study)
        comparison.write_leaderboard(run, found)
        return report.write_page(run, comparison_html.page(found))
    findings = report.gather(run, study)
    dashboard.add_figures(run, findings)
    return report.write_findings(run, findings)


def rebuild(run: Path) -> str:
    """Make ``study.db`` again from the trial records and return what was done."""
    from adasearch.search.space import Space
    from adasearch.search.study import rebuild as rebuild_study

    study = load_run(run)
    count = rebuild_study(run, study, Space.from_config(study.space, study.trial, seed=study.seed))
    return f"{run / 'study.db'} rebuilt from {count} trial records"


def status(run: Path) -> Iterator[str]:
    """Yield lines that say where a run stands."""
    from adasearch.search.outcomes import ending

    study = load_run(run)
    if job_of(run) == "compare":
        from adasearch import comparison

        yield from comparison.lines(comparison.gather(run, study))
        return
    records = read_records(run)
    dense = next((r.result for r in records if r.number == DENSE and r.result), None)
    scored = [r for r in records if r.number != DENSE and r.result]
    stopped = sum(r.result.stopped for r in scored if r.result)
    failed = {r.number for r in records if r.failure} - {r.number for r in scored}
    done = len({r.number for r in scored} | failed)
    yield f"trials: {done} of {study.trials} done, {stopped} stopped early, {len(failed)} failed"
    ended = ending(run, study, done)
    if ended:
        yield ended
    if dense:
        yield f"dense search score: {dense.score:.4f} ± {dense.stderr:.4f}"
    full = [r for r in scored if r.result and not r.result.stopped and study.objective.admits(r.result.shares)]
    if full:
        best = max(full, key=lambda r: r.result.score if r.result else 0.0)
        assert best.result is not None
        name = f" ({best.recipe})" if best.recipe else ""
        yield f"best search score:  {best.result.score:.4f} ± {best.result.stderr:.4f}, trial {best.number}{name}"
    found = tradeoff.tradeoff(study.objective, scored, dense)
    yield from tradeoff.lines(found) if found else ()
    if study.warm_start:
        from adasearch.search.prior import weights_lines

        yield from (f"warm start: {line}" for line in weights_lines(run, study))
    for number in sorted(failed):
        last = [r.failure for r in records if r.number == number and r.failure][-1]
        yield f"trial {number} failed: {last.kind}: {last.message}"
    for folder in sorted((run / "export").glob("[!.]*")):
        yield f"exported: {folder}"


def replay(run: Path, number: int) -> Iterator[str]:
    """Run one recorded trial again, in this process, and yield how its score compares.

    Raises:
        ConfigError: the run has no such trial.
    """
    from adasearch.trial import run_trial
    from adasearch.workbench import Workbench

    quieten()
    study = load_run(run)
    record = next((r for r in read_records(run) if r.number == number and r.result), None)
    if record is None or record.config is None or record.result is None:
        numbers = sorted({r.number for r in read_records(run) if r.result and r.number != DENSE})
        raise ConfigError("--trial", f"must be a trial with a score, given {number}; the run has {numbers}")
    threads = int(record.environment.get("threads", "1"))
    bench = Workbench(study, run.resolve(), threads)
    yield f"trial {number}: recorded score {record.result.score:.6f} on {record.result.items} items"
    result, _ = run_trial(record.config, bench)
    yield f"trial {number}: replayed score {result.score:.6f} on {result.items} items"
    same = result.score == record.result.score
    yield (
        "equal"
        if same
        else f"difference {result.score - record.result.score:+.6f}"
        + (" (the recorded trial had stopped early)" if record.result.stopped else "")
    )
