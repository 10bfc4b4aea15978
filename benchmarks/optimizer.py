"""Optimizers side by side, replayed under a virtual clock: what the chosen configuration is worth, against its cost.

    python -m benchmarks.optimizer --out sweep.jsonl --quick --jobs 2                          # minutes, cheap samplers
    python -m benchmarks.optimizer --out sweep.jsonl --table benchmarks/smollm2_30.npz --jobs 2
    python -m benchmarks.optimizer --out sweep.jsonl --report curves.svg                       # tables of what is there

One line of JSON is appended for each run of a problem, a sampler, a number of workers, an order of telling and a seed;
the same command goes on where it was, and several may write to files of their own that `--out` names together. A
sampler is a name, with what goes with it: ``tpe``, ``botorch+seeds`` (recipes first), ``botorch+seeds+halving``
(rungs stop trials), ``botorch+seeds+gates`` (by `adasearch.promotion`, where that is there).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import itertools
import json
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna

from adasearch.records import Evidence
from adasearch.search.sampler import RECIPE, STDERR, BoTorchSampler, derived_seed, distributions
from adasearch.search.samplers import make_sampler
from adasearch.sections import SamplerConfig
from adasearch.winner import merits
from benchmarks.optimizer_report import chart, tables
from benchmarks.problems import FORMS, Problem, analytic
from benchmarks.replayed import Replayed, table_of
from benchmarks.simulation import Halving, Order, Policy, Replay, Setting, Told, chosen
from benchmarks.table import lines_of

PAIRED = "paired_stderr"
QUICK = ("random", "tpe", "tpe+seeds", "tpe+seeds+halving")
SAMPLERS = (
    "random", "tpe", "gp", "integration", "evolution", "botorch", "botorch+seeds", "botorch+seeds+halving",
    "botorch+seeds+gates",
)  # fmt: skip
OURS = frozenset({"botorch", "auto"})
FINALISTS = 3  # trials that are made and scored again at the end
STEP = 5  # trials between two looks at what the posterior mean would choose

Row = dict[str, Any]


class UnavailableError(Exception):
    """A sampler or a policy that is not there; the message says which and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One run of the sweep; `table` is the file of recorded trials, for problems that are named ``table_<metric>``."""

    problem: str
    sampler: str
    workers: int
    order: Order
    seed: int
    trials: int
    table: str | None = None

    @property
    def key(self) -> str:
        """Return what a recorded run is known by."""
        return json.dumps([self.problem, self.sampler, self.workers, self.order, self.seed, self.trials])


def problem_of(task: Task) -> Problem:
    """Return the problem of a run; made-up models differ from seed to seed, the table's items do."""
    if task.problem in FORMS:
        return analytic(task.problem)(task.seed)
    if task.table is None:
        raise SystemExit(f"{task.problem}: needs --table")
    return Replayed(table_of(Path(task.table)), task.problem.removeprefix("table_"))


def sampler_of(name: str, problem: Problem, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """Return a new sampler for trial `number`, as a search makes one.

    Raises:
        UnavailableError: it cannot be imported, or `make_sampler` does not know it.
    """
    if name == "integration":
        try:
            from optuna_integration import BoTorchSampler as Integrated
        except ImportError as error:
            raise UnavailableError(f"integration: pip install optuna-integration botorch ({error})") from error
        return Integrated(seed=derived_seed(seed, number, name), n_startup_trials=6, consider_running_trials=True)
    space: Any = problem
    try:
        made = make_sampler(SamplerConfig(type=name), space, seed, number)  # type: ignore[arg-type]
    except (ImportError, ValueError) as error:
        raise UnavailableError(f"{name}: {error}") from error
    if isinstance(made, BoTorchSampler) and name not in OURS:
        raise UnavailableError(f"{name}: adasearch.search.samplers does not make one yet")
    return made


def policy_of(names: Sequence[str]) -> Policy | None:
    """Return what stops trials, None for nothing.

    Raises:
        UnavailableError: it is not there.
    """
    if "halving" in names:
        return Halving()
    if "gates" in names:
        try:
            policy: Policy = importlib.import_module("benchmarks.gates").Gates()
        except ImportError as error:
            raise UnavailableError(f"gates: {error}") from error
        return policy
    return None


class OptunaBook:
    """Asks a sampler by Optuna, in memory."""

    def __init__(self, problem: Problem, name: str, seed: int) -> None:
        self._problem, self._name, self._seed = problem, name, seed
        self._distributions = distributions(problem)  # type: ignore[arg-type]
        self._study = optuna.create_study(direction="maximize")

    def ask(self, number: int, recipe: dict[str, Any] | None) -> dict[str, Any]:
        """Return where trial `number` lies."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if recipe is None:
                self._study.sampler = sampler_of(self._name, self._problem, self._seed, number)
                return dict(self._study.ask(self._distributions).params)
        state = optuna.trial.TrialState.RUNNING
        self._study.add_trial(
            optuna.trial.create_trial(
                state=state, params=recipe, distributions=self._distributions, user_attrs={RECIPE: "recipe"}
            )
        )
        return dict(recipe)

    def tell(self, number: int, value: float, stderr: float, paired: float) -> None:
        """Take the value of a trial and its errors."""
        # the only way to a live handle of a trial that was added
        trial = optuna.Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)
        trial.set_user_attr(STDERR, stderr)
        trial.set_user_attr(PAIRED, paired)
        self._study.tell(number, value)


def believed(problem: Problem, told: Sequence[Told]) -> dict[int, Evidence]:
    """Return what our model of all that was told says of the whole trials, by index; only scores where it fails."""
    from adasearch.search.noise import paired_variances
    from adasearch.search.surrogate import Observations, posterior

    full = [index for index, trial in enumerate(told) if trial.full]
    observed = {i: Evidence(score=told[i].value, stderr=told[i].stderr) for i in full}
    if len(full) < 2:
        return observed
    points = np.array([problem.features(trial.params) for trial in told])
    data = Observations(
        points=points,
        scores=np.array([trial.value for trial in told]),
        variances=paired_variances(np.array([trial.paired for trial in told])),
        pending=np.zeros((0, points.shape[1])),
        groups=problem.encoding.groups,
    )
    try:
        means, deviations = posterior(data, points[full])
    except ArithmeticError:
        return observed
    found = zip(full, means, deviations, strict=True)
    return {i: dataclasses.replace(observed[i], mean=float(mean), sd=float(sd)) for i, mean, sd in found}


def by_posterior(problem: Problem, told: Sequence[Told]) -> int | None:
    """Return the index of the whole trial with the best posterior mean under our model of all that was told."""
    known = believed(problem, told)
    return max(known, key=lambda i: (known[i].believed, -i)) if known else None


def by_finalists(problem: Problem, told: Sequence[Told], seed: int) -> int | None:
    """Return the index of the best of `FINALISTS` trials that are scored once more, as a search ends.

    They are those of the best posterior mean; each is scored on as many fresh items, and `winner.merits` decides.
    """
    known = believed(problem, told)
    distinct = {problem.point_key(told[i].params): i for i in sorted(known, key=lambda i: known[i].believed)}
    best = sorted(distinct.values(), key=lambda i: -known[i].believed)[:FINALISTS]
    if not best:
        return None
    items = [problem.evaluate(told[i].params, derived_seed(seed, 0, "select")).by_task for i in best]
    return best[int(np.argmax(merits([known[i] for i in best], items)))]


def curve(problem: Problem, told: Sequence[Told], choose: Callable[[Sequence[Told]], int | None],
          step: int = 1) -> Iterator[list[float]]:  # fmt: skip
    """Yield trials told, virtual seconds, cost, and held-out value of the choice, after every `step` trials told."""
    for count in range(1, len(told) + 1):
        if count % step and count != len(told):
            continue
        index = choose(told[:count])
        value = float("nan") if index is None else problem.held_out(told[index].params)
        yield [count, told[count - 1].time, told[count - 1].cost, value]


def run(task: Task) -> Row:
    """Return the line of one run."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    name, *more = task.sampler.split("+")
    problem = problem_of(task)
    try:
        policy = policy_of(more)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sampler_of(name, problem, task.seed, 0)
    except UnavailableError as reason:
        return {**asdict(task), "unavailable": str(reason)}
    setting = Setting(
        workers=task.workers, trials=task.trials, seed=task.seed, order=task.order, recipes="seeds" in more
    )
    told = Replay(problem, OptunaBook(problem, name, task.seed), setting, policy).run()
    row = {
        **asdict(task),
        "scale": problem.scale,
        "unit": problem.seconds,
        "seed_trials": [problem.held_out(params) for params in problem.recipes.values()],
        "curve": list(curve(problem, told, chosen)),
        "values": [trial.value for trial in told],
        "asking": [round(trial.asking, 4) for trial in told],
        "stopped": sum(not trial.full for trial in told),
        "repeated": len(told) - len({problem.point_key(trial.params) for trial in told}),
    }
    if name in OURS:
        row["posterior"] = list(curve(problem, told, lambda told: by_posterior(problem, told), STEP))
        if problem.fresh:
            ends = curve(problem, told, lambda told: by_finalists(problem, told, task.seed), STEP)
            more = FINALISTS * problem.seconds
            row["finalists"] = [[n + FINALISTS, time, cost + more, value] for n, time, cost, value in ends]
    return row


def tasks(args: argparse.Namespace) -> Iterator[Task]:
    """Yield the runs that the command line asks for, seed by seed, so that an early end leaves all samplers alike."""
    table = str(args.table) if args.table else None
    for seed, problem, workers, order, sampler in itertools.product(
        range(args.first_seed, args.first_seed + args.seeds), args.problems, args.workers, args.orders, args.samplers
    ):
        yield Task(problem=problem, sampler=sampler, workers=workers, order=order, seed=seed, trials=args.trials,
                   table=table)  # fmt: skip


def _alone() -> None:
    """Keep a process to one thread: several share the cores."""
    import torch

    torch.set_num_threads(1)


def sweep(todo: Sequence[Task], path: Path, jobs: int) -> None:
    """Do runs and append their lines to `path`."""
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    with (
        path.open("a", encoding="utf-8") as file,
        concurrent.futures.ProcessPoolExecutor(jobs, spawn, _alone) as pool,
    ):
        futures = {pool.submit(run, task): task for task in todo}
        failed = 0
        for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            task, error = futures[future], future.exception()
            if error is not None:
                failed += 1
                print(f"{number}/{len(todo)} {task}: {type(error).__name__}: {error}", flush=True)
                continue
            row = future.result()
            file.write(json.dumps(row) + "\n")
            file.flush()
            said = row.get("unavailable") or f"{row['curve'][-1][3]:.4f}, asks {sum(row['asking']):.1f} s"
            print(f"{number}/{len(todo)} {task.problem} {task.sampler} {task.workers} {task.order} "
                  f"seed {task.seed}: {said}", flush=True)  # fmt: skip
    if failed:
        raise SystemExit(f"{failed} of {len(todo)} runs failed and are not in {path}; the same command does them again")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, nargs="+", required=True, help="runs, one line each; the first is written")
    made.add_argument("--report", type=Path, help="print the tables of what is recorded, draw this .svg; run nothing")
    made.add_argument("--table", type=Path, help="recorded trials, adds the problem table_log_odds")
    made.add_argument("--problems", nargs="+", help=f"of {', '.join(FORMS)}, table_<metric> (default: all)")
    made.add_argument("--samplers", nargs="+", help=f"(default: {' '.join(SAMPLERS)})")
    made.add_argument("--workers", nargs="+", type=int, default=[4], help="(default: 4)")
    made.add_argument("--orders", nargs="+", choices=("in_order", "finished"), default=["in_order"])
    made.add_argument("--trials", type=int, default=50, help="of each run (default: 50)")
    made.add_argument("--seeds", type=int, default=20, help="runs of each kind (default: 20)")
    made.add_argument("--first-seed", type=int, default=0)
    made.add_argument("--jobs", type=int, default=1, help="processes, of one thread each (default: 1)")
    made.add_argument("--quick", action="store_true", help="samplers that cost nothing and 5 seeds of two problems")
    return made


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.samplers = args.samplers or list(QUICK if args.quick else SAMPLERS)
    everything = [*FORMS, *(["table_log_odds"] if args.table else [])]
    args.problems = args.problems or (["profile_5", "profile_12"] if args.quick else everything)
    if args.quick:
        args.seeds, args.trials = min(args.seeds, 5), min(args.trials, 40)
    known = lines_of(*args.out)
    if not args.report:
        done = {Task(**{name: row.get(name) for name in Task.__dataclass_fields__}).key
                for row in known if "unavailable" not in row}  # fmt: skip
        sweep([task for task in tasks(args) if task.key not in done], args.out[0], args.jobs)
        known = lines_of(*args.out)
    for line in tables(known):
        print(line)
    if args.report:
        args.report.write_text(chart(known), encoding="utf-8")


if __name__ == "__main__":
    main()
