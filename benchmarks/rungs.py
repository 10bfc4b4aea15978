"""How well each rung ranks trials as their final score does (Spearman), and what it costs. Real trials, no racing.

    python -m benchmarks.rungs --study studies/quickstart.yaml --sample 40 --out rungs.jsonl --threads 2
    python -m benchmarks.rungs --out rungs.jsonl            # the tables again, of what is recorded
    python -m benchmarks.rungs runs/quickstart runs/other   # of the rungs in the records of runs

Trials are the study's recipes, then points of its space drawn by its seed. One line of JSON is appended per trial; the
same command goes on where it was, and a greater `--sample` begins with the trials of a smaller one. Each is measured
right after its cut (divergence from the dense model, all search items) and after its recovery (all search items, all
select items); the rungs on a share of the items are the beginnings of those. Final scores: on search items, which the
rungs share, and on select items, which none of them saw.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adasearch.config import StudyConfig, TrialConfig, load_study
from adasearch.errors import AdaSearchError, TrialError
from adasearch.records import DENSE, read_records
from adasearch.report_rungs import FEW_TRIALS, rung_rows, spearman
from adasearch.search.seeds import find_seeds
from adasearch.search.space import Space
from benchmarks.table import lines_of

METRICS = {"margin": "margin", "accuracy": "acc_norm"}
UNRECOVERED, RECOVERED = (0.3, 1.0), (0.1, 0.3, 0.6, 1.0)
BEFORE = ("calibrate", "plan", "cut")
RESAMPLES = 2_000

Line = dict[str, Any]


def sampled(study: StudyConfig, count: int) -> Iterator[tuple[str | None, dict[str, Any]]]:
    """Yield the name of the recipe, if it is one, and the configuration of `count` distinct trials."""
    space = Space.from_config(study.space, study.trial, seed=study.seed)
    seen: set[str] = set()

    def new(name: str | None, params: dict[str, Any]) -> Iterator[tuple[str | None, dict[str, Any]]]:
        config = space.decode(params)
        if config.key not in seen and len(seen) < count:
            seen.add(config.key)
            yield name, config.to_dict()

    for recipe in find_seeds(study, space).recipes:
        yield from new(recipe.name, recipe.params)
    draws = np.random.default_rng(study.seed)
    for _ in range(100 * count):  # a small space has no more to give
        if len(seen) < count:
            yield from new(None, space.encoding.from_units(draws.random(len(space.encoding.parameters))))


class Bench:
    """A worker: turns configurations into lines."""

    def __init__(self, study: StudyConfig, run: Path, threads: int) -> None:
        from adasearch.workbench import Workbench

        self.bench = Workbench(study, run, threads)
        self.bench.reference()  # made once per worker and no part of any trial

    def values(self, model: Any, role: str) -> dict[str, dict[str, list[float]]]:
        """Return the value of every item, by metric and task."""
        from adasearch.trial import score_blocks
        from adasearch.tuning import evaluation

        tasks = self.bench.items(role)
        logliks = score_blocks(model, {name: task.encoded for name, task in tasks.items()})
        return {
            name: {t: evaluation.item_values(task.items, logliks[t], metric).tolist() for t, task in tasks.items()}
            for name, metric in METRICS.items()
        }

    def measured(self, data: dict[str, Any]) -> Line:
        """Return what is found of one trial on its way.

        Raises:
            TrialError: it has no score.
        """
        from adasearch import trial
        from adasearch.tuning import divergence

        config = TrialConfig.from_dict(data, "trial")
        clock = trial.Clock()
        pruned = trial.prune(config, self.bench, clock)
        clock.enter("divergence")
        mean, error = divergence.divergence(pruned.model, self.bench.reference())
        clock.enter("unrecovered")
        unrecovered = self.values(pruned.model, "search")
        trial.recover(pruned, config.recovery, config, self.bench, clock)
        clock.enter("recovered")
        recovered = self.values(pruned.model, "search")
        clock.enter("select")
        select = self.values(pruned.model, "select")
        clock.enter("done")
        self.bench.assert_unchanged()
        self.bench.release()
        return {
            "seconds": clock.seconds, "divergence": mean, "divergence_stderr": error,
            "unrecovered": unrecovered, "recovered": recovered, "select": select,
        }  # fmt: skip

    def line(self, task: tuple[str | None, dict[str, Any]]) -> Line:
        """Return the line of one trial, also where it fails."""
        recipe, data = task
        key = TrialConfig.from_dict(data, "trial").key
        try:
            found: Line = {"failure": None, **self.measured(data)}
        except TrialError as error:
            found = {"failure": str(error)}
        return {"study": self.bench.study.fingerprint, "key": key, "recipe": recipe, "config": data, **found}


_worker: list[Bench] = []


def _open(study: StudyConfig, run: Path, threads: int) -> None:
    _worker.append(Bench(study, run, threads))


def _work(task: tuple[str | None, dict[str, Any]]) -> Line:
    return _worker[0].line(task)


def measure(study: StudyConfig, args: argparse.Namespace) -> None:
    """Run the trials that are not recorded yet and append their lines."""
    path, known = args.out, lines_of(args.out)
    if any(line["study"] != study.fingerprint for line in known):
        raise SystemExit(f"{path}: holds trials of another study or of other items; give another --out")
    if path.exists():
        path.write_text("".join(json.dumps(line) + "\n" for line in known), encoding="utf-8")
    done = {line["key"] for line in known}
    tasks = [t for t in sampled(study, args.sample) if TrialConfig.from_dict(t[1], "trial").key not in done]
    if not tasks:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    opening = (study, path.with_suffix(".run").absolute(), args.threads)
    begun = time.perf_counter()
    with path.open("a", encoding="utf-8") as file:
        for number, line in enumerate(_results(tasks, args.workers, opening), start=1):
            file.write(json.dumps(line) + "\n")
            file.flush()
            text = line["failure"] or f"divergence {line['divergence']:.3f}, {sum(line['seconds'].values()):.1f} s"
            print(f"{number}/{len(tasks)} {line['recipe'] or 'drawn'}: {text} "
                  f"[{time.perf_counter() - begun:.0f} s]", flush=True)  # fmt: skip


def _results(tasks: Sequence[Any], workers: int, opening: tuple[StudyConfig, Path, int]) -> Iterator[Line]:
    if workers == 1:
        yield from map(Bench(*opening).line, tasks)
        return
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn, _open, opening) as pool:
        for future in concurrent.futures.as_completed([pool.submit(_work, task) for task in tasks]):
            yield future.result()


def _score(values: dict[str, list[float]], share: float = 1.0) -> float:
    """Return the mean over tasks of the mean of the first `share` of the items."""
    return float(np.mean([np.mean(x[: max(2, round(share * len(x)))]) for x in values.values()]))


def interval(a: np.ndarray, b: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Return Spearman's correlation and the ends of its 95 % percentile bootstrap interval over trials."""
    chosen = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    low, high = np.nanquantile(spearman(a[chosen], b[chosen]), (0.025, 0.975))
    return float(spearman(a, b)), float(low), float(high)


def rungs_of(lines: Sequence[Line], metric: str) -> Iterator[tuple[str, np.ndarray, float, float]]:
    """Yield label, merit of each trial (higher is better), seconds of its own and seconds until it is known."""
    seconds = {phase: float(np.mean([line["seconds"].get(phase, 0.0) for line in lines]))
               for phase in (*BEFORE, "divergence", "unrecovered", "recover", "recovered")}  # fmt: skip
    cut = sum(seconds[phase] for phase in BEFORE)
    merit = np.array([-line["divergence"] for line in lines])
    yield "divergence", merit, seconds["divergence"], cut + seconds["divergence"]
    for kind, shares, start in (
        ("unrecovered", UNRECOVERED, cut),
        ("recovered", RECOVERED, cut + seconds["recover"]),
    ):
        for share in shares:
            own = share * seconds[kind]
            merit = np.array([_score(line[kind][metric], share) for line in lines])
            yield f"{kind}, {100 * share:.0f} % of items", merit, own, start + own


def tables(lines: Sequence[Line]) -> Iterator[str]:
    """Yield the tables as Markdown, one for each metric."""
    sound = [line for line in lines if line["failure"] is None]
    yield f"{len(sound)} trials, {len(lines) - len(sound)} without a score"
    if len(sound) < FEW_TRIALS:
        yield f"a correlation needs {FEW_TRIALS}"
        return
    phases = (*BEFORE, "recover", "recovered")
    trial = float(np.mean([sum(line["seconds"].get(phase, 0.0) for phase in phases) for line in sound]))
    items = {role: sum(map(len, sound[0][role]["margin"].values())) for role in ("recovered", "select")}
    yield f"a trial takes {trial:.1f} s; {items['recovered']} search items, {items['select']} select items"
    for metric in METRICS:
        search, select = (np.array([_score(line[role][metric]) for line in sound]) for role in ("recovered", "select"))
        yield ""
        yield f"| {metric} | cost | known after | Spearman, search items | Spearman, select items |"
        yield "|---|---|---|---|---|"
        for label, merit, own, known in rungs_of(sound, metric):
            found = ["{:+.2f} ({:+.2f} to {:+.2f})".format(*interval(merit, final)) for final in (search, select)]
            found[0] = "the score itself" if label == f"recovered, {100:.0f} % of items" else found[0]
            yield f"| {label} | {own / trial:.1%} | {known / trial:.0%} | {found[0]} | {found[1]} |"


def run_tables(runs: Sequence[Path]) -> Iterator[str]:
    """Yield a table for each run, of the rungs in its records."""
    for run in runs:
        results = [r.result for r in read_records(run) if r.number != DENSE and r.result is not None]
        yield f"{run.name}: {len(results)} trials with a score, {sum(r.stopped for r in results)} of them stopped early"
        yield "| rung | trials | cost | Spearman, search items |"
        yield "|---|---|---|---|"
        for row in rung_rows(results):
            known = f"needs {FEW_TRIALS} trials" if row.correlation is None else f"{row.correlation:+.2f}"
            yield f"| {row.label} | {row.trials} | {row.share:.1%} | {known} |"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("runs", nargs="*", type=Path, help="run folders whose recorded rungs are shown")
    made.add_argument("--study", type=Path, help="study file that trials are drawn from")
    made.add_argument("--sample", type=int, default=40, help="trials in all (default: 40)")
    made.add_argument("--out", type=Path, help="file of recorded trials, one line each")
    made.add_argument("--items", type=int, help="search items of each task, in place of the study's")
    made.add_argument("--select", type=int, help="select items of each task, in place of the study's")
    made.add_argument("--workers", type=int, default=1, help="trials at the same time (default: 1)")
    made.add_argument("--threads", type=int, default=2, help="CPU threads of each worker (default: 2)")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.study:
        if args.out is None:
            raise SystemExit("--study needs --out, the file that the trials are recorded in")
        study = load_study(args.study)
        chosen = {key: number for key, number in (("items", args.items), ("select", args.select)) if number}
        study = dataclasses.replace(study, objective=dataclasses.replace(study.objective, **chosen))
        if not study.fidelity.divergence:
            raise SystemExit(f"{args.study}: fidelity.divergence must not be 0")
        try:
            measure(study, args)
        except AdaSearchError as error:
            raise SystemExit(f"{error}") from error
    lines = lines_of(args.out) if args.out else []
    for text in (*(tables(lines) if args.out else ()), *run_tables(args.runs)):
        print(text)


if __name__ == "__main__":
    main()
