"""A table of real trials: every point of a small grid, each measured on all of its rungs, to replay optimizers on.

    python -m benchmarks.recorded --record trials.jsonl --workers 2     # goes on where it was
    python -m benchmarks.recorded --record trials.jsonl --pack benchmarks/smollm2_30.npz

The grid holds importance (with a grain that counts under taylor only), compensation, and two coefficients of the layer
profile: the tilt of the MLP ratios over depth and the ratio of attention over MLP. Every point is there, so a replay
answers whatever an optimizer asks with a trial that was run, and nothing is interpolated. Seconds are processor time of
one thread. Item values are kept for search items (train splits) and report items (test or validation splits).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from adasearch.config import StudyConfig, TrialConfig, load_study, merged
from adasearch.errors import TrialError
from benchmarks.table import METRICS, ROLES, lines_of, pack, save_table

IMPORTANCE = ("wanda_sp", "flap", "act_norm", "taylor")
GRAIN = ("element", "vector")
COMPENSATION = ("none", "least_squares")
TILT = (-1.0, -0.5, 0.0, 0.5)
ATTENTION = (-1.5, -0.75, 0.0, 0.75)
MIDWAY = 1 / 3  # share of the recovery before the second look

Line = dict[str, Any]


def points() -> Iterator[dict[str, Any]]:
    """Yield every point of the grid; `grain` stands in each, and counts under taylor."""
    for importance, compensation, tilt, attention in itertools.product(IMPORTANCE, COMPENSATION, TILT, ATTENTION):
        for grain in GRAIN if importance == "taylor" else GRAIN[:1]:
            yield {"importance": importance, "grain": grain, "compensation": compensation, "tilt": tilt,
                   "attention": attention}  # fmt: skip


def trial_of(point: dict[str, Any]) -> dict[str, Any]:
    """Return the partial trial that a point stands for."""
    importance: Any = point["importance"]
    if importance == "taylor":
        importance = {"type": "taylor", "grain": point["grain"]}
    profile = {"type": "layer_profile", "mlp": [point["tilt"]], "attention": [point["attention"]]}
    return {"importance": importance, "compensation": point["compensation"], "allocation": profile}


class Bench:
    """A worker: turns points into lines."""

    def __init__(self, study: StudyConfig, run: Path) -> None:
        from adasearch.workbench import Workbench

        self.bench = Workbench(study, run, 1)
        self.bench.reference()

    def values(self, model: Any, role: Any) -> dict[str, dict[str, list[float]]]:
        """Return the value of every item, by metric and task."""
        from adasearch.trial import score_blocks
        from adasearch.tuning import evaluation

        tasks = self.bench.items(role)
        found = score_blocks(model, {name: task.encoded for name, task in tasks.items()})
        result: dict[str, dict[str, list[float]]] = {metric: {} for metric in METRICS}
        for name, logliks in found.items():
            items = tasks[name].items[: len(logliks)]
            for metric in ("margin", "acc_norm"):
                result[metric][name] = evaluation.item_values(items, logliks, metric).tolist()
            result["log_odds"][name] = [_log_odds(i, x) for i, x in zip(items, logliks, strict=True)]
        return result

    def measured(self, data: dict[str, Any] | None) -> Line:
        """Return what is found of one trial on its way; of the dense model where there is no trial."""
        from adasearch import registry, trial
        from adasearch.tuning import divergence
        from adasearch.tuning.recovery import RecoveryContext

        seconds: dict[str, float] = {}
        mark = time.process_time()

        def lap(name: str) -> None:
            nonlocal mark
            now = time.process_time()
            seconds[name], mark = round(now - mark, 3), now

        if data is None:
            model = self.bench.dense()
            return {role: self.values(model, role) for role in ROLES}
        config = TrialConfig.from_dict(data, "trial")
        clock = trial.Clock()
        pruned = trial.prune(config, self.bench, clock)
        lap("cut")
        reference = self.bench.reference()
        first = divergence.divergence(pruned.model, reference)
        lap("divergence")
        midway: list[tuple[float, float]] = []

        def look(step: int, steps: int, updates: Any) -> None:
            if step == round(MIDWAY * steps):
                lap("recover_short")
                midway.append(divergence.divergence(pruned.model, reference, updates))
                lap("midway")

        entry = registry.RECOVERY.get(config.recovery.type)
        tokens = self.bench.recovery_tokens(config.recovery, config.calibration.corpus, config.seed,
                                            pruned.structure.outline)  # fmt: skip
        context = RecoveryContext(seed=config.seed, look=look)
        report = entry.function(pruned.model, pruned.structure, tokens, config.recovery.options, context)
        lap("recover_rest")
        search = self.values(pruned.model, "search")
        lap("search")
        held = self.values(pruned.model, "report")
        lap("report")
        self.bench.assert_unchanged()
        self.bench.release()
        return {
            "seconds": seconds, "divergence": first, "midway": midway[0],
            "losses": list(report.losses), "search": search, "report": held,
        }  # fmt: skip

    def line(self, task: tuple[dict[str, Any] | None, dict[str, Any] | None]) -> Line:
        """Return the line of one trial, also where it fails."""
        point, data = task
        try:
            return {"point": point, "failure": None, **self.measured(data)}
        except TrialError as error:
            return {"point": point, "failure": str(error)}


def _log_odds(item: Any, logliks: np.ndarray) -> float:
    """Return the log of the softmax over choices of the log-likelihood per character, at the right choice."""
    rates = logliks / np.maximum(item.lengths, 1) if item.acc_norm else logliks
    top = rates.max()
    return float(rates[item.gold] - top - np.log(np.exp(rates - top).sum()))


_worker: list[Bench] = []


def _open(study: StudyConfig, run: Path) -> None:
    _worker.append(Bench(study, run))


def _work(task: Any) -> Line:
    return _worker[0].line(task)


def record(study: StudyConfig, path: Path, workers: int) -> None:
    """Run the points that are not recorded yet, in an order drawn by the study's seed, and append their lines."""
    known = lines_of(path)
    done = {json.dumps(line["point"]) for line in known}
    grid: list[dict[str, Any]] = list(points())
    order = np.random.default_rng(study.seed).permutation(len(grid))
    base = {**study.trial, "seed": study.seed}
    tasks: list[Any] = [(None, None)] + [(grid[i], merged(base, trial_of(grid[i]))) for i in order]
    tasks = [(p, d and TrialConfig.from_dict(d, "trial").to_dict()) for p, d in tasks if json.dumps(p) not in done]
    spawn = multiprocessing.get_context("spawn")
    begun = time.perf_counter()
    with (
        path.open("a", encoding="utf-8") as file,
        concurrent.futures.ProcessPoolExecutor(
            workers, spawn, _open, (study, path.with_suffix(".run").absolute())
        ) as pool,
    ):
        futures = [pool.submit(_work, task) for task in tasks]
        for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            line = future.result()
            file.write(json.dumps(line) + "\n")
            file.flush()
            text = line["failure"] or line.get("seconds")
            print(f"{number}/{len(tasks)} {line['point']}: {text} [{time.perf_counter() - begun:.0f} s]", flush=True)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--study", type=Path, default=Path(__file__).with_name("recorded.yaml"))
    made.add_argument("--record", type=Path, required=True, help="file of recorded trials, one line each")
    made.add_argument("--workers", type=int, default=2)
    made.add_argument("--pack", type=Path, help="pack what is recorded into this .npz, and record nothing")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.pack:
        table = pack(lines_of(args.record))
        save_table(table, args.pack)
        missing = sum(1 for _ in points()) - len(table.points) - len(table.failed)
        size = args.pack.stat().st_size / 1024
        print(
            f"{args.pack}: {len(table.points)} trials, {len(table.failed)} failed, {missing} not there; {size:.0f} KiB"
        )
        return
    record(load_study(args.study), args.record, args.workers)


if __name__ == "__main__":
    main()
