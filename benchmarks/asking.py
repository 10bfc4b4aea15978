"""Seconds that a proposal takes, by trials and dimensions: ours beside Optuna's samplers, in one run.

    python -m benchmarks.asking --trials 50 200 500 --dimensions 12 40 100 --samplers botorch tpe gp

A fifth of the dimensions are choices of four, a fifth whole numbers, the rest numbers; four trials run. Processor
seconds (of all threads) and seconds by the clock, medians of `--repeat` proposals after one that is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna

from adasearch.search.parameters import CategoricalParameter, FloatParameter, IntParameter, Parameter
from adasearch.search.sampler import NOISE, distributions
from adasearch.search.samplers import make_sampler
from adasearch.sections import SamplerConfig
from benchmarks.problems import Problem

RUNNING = 4


def space_of(dimensions: int) -> Any:
    """Return a space of so many parameters, of three kinds."""

    def parameter(index: int) -> Parameter:
        if index % 5 == 0:
            return CategoricalParameter(choices=("a", "b", "c", "d"))
        return IntParameter(low=1, high=64, log=True) if index % 5 == 1 else FloatParameter(low=-1.0, high=1.0)

    return Problem("asking", {f"x{i}": parameter(i) for i in range(dimensions)}, {}, {})


def filled(space: Any, trials: int) -> optuna.Study:
    """Return a study with so many trials told, and some running."""
    study = optuna.create_study(direction="maximize")
    weights = np.random.default_rng(0).standard_normal(space.encoding.num_columns)
    rng = np.random.default_rng(1)
    for index, params in enumerate(space.sample(trials + RUNNING, seed=2)):
        told = index < trials
        score = float(np.tanh(space.features(params) @ weights) + 0.1 * rng.standard_normal())
        study.add_trial(
            optuna.trial.create_trial(
                params=params,
                distributions=distributions(space),
                value=score if told else None,
                state=optuna.trial.TrialState.COMPLETE if told else optuna.trial.TrialState.RUNNING,
                user_attrs={NOISE: 0.1} if told else {},
            )
        )
    return study


def seconds(name: Any, space: Any, study: optuna.Study, repeat: int) -> tuple[float, float]:
    """Return processor seconds and seconds by the clock of a proposal, medians."""
    found = []
    for turn in range(repeat + 1):
        study.sampler = make_sampler(SamplerConfig(type=name), space, turn, len(study.trials))
        processor, clock = time.process_time(), time.perf_counter()
        study.ask(distributions(space))
        found.append((time.process_time() - processor, time.perf_counter() - clock))
    columns = list(zip(*found[1:], strict=True))
    return statistics.median(columns[0]), statistics.median(columns[1])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--trials", nargs="+", type=int, default=[50, 200, 500])
    made.add_argument("--dimensions", nargs="+", type=int, default=[12, 40, 100])
    made.add_argument("--samplers", nargs="+", default=["botorch", "tpe", "gp"])
    made.add_argument("--repeat", type=int, default=3)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")
    print("| sampler | dimensions | trials | processor s | s |")
    print("|---|---|---|---|---|")
    for dimensions in args.dimensions:
        space = space_of(dimensions)
        for trials in args.trials:
            for name in args.samplers:
                processor, clock = seconds(name, space, filled(space, trials), args.repeat)
                print(f"| {name} | {dimensions} | {trials} | {processor:.2f} | {clock:.2f} |", flush=True)


if __name__ == "__main__":
    main()
