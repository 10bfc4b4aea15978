"""What an earlier search is worth to a later one, and what a wrong one costs: ``python -m benchmarks.warm_start``.

Analytic studies of one family: a smooth function of a real space's parameters, choices and conditional ones among them.
The earlier study is of the same function with its optimum, curvature, level and scale moved (``right``), or of
another function (``unrelated``), or of this one upside down (``negated``). Counted are trials until the
best true score lies within a tenth of the way from random trials to the optimum.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import norm, qmc

from adasearch.config import SpaceConfig
from adasearch.search.earlier import Earlier
from adasearch.search.parameters import CategoricalParameter
from adasearch.search.prior import Prior, PriorMean
from adasearch.search.space import Space
from adasearch.search.stacking import SETTINGS, kernels, left_out

Params = dict[str, Any]

DIMENSIONS: dict[str, dict[str, Any]] = {
    "calibration.samples": {"int": [8, 128], "log": True},
    "importance": {"choice": ["taylor", "wanda_sp", "flap", "obs"]},
    "recovery": {"choice": ["none", "lora"]},
    "recovery.lora.lr": {"float": [1e-5, 1e-3], "log": True},
    "allocation.layer_profile": {"layer_profile": {"mlp": 3, "attention": 2}},
}
BASE = {"calibration": {"corpus": "pydoc"}, "allocation": "layer_profile"}
ARMS = ("none", "right", "unrelated", "negated")
STARTUP, NOISE, NEAR = 6, 0.02, 0.1
_EARLIER_TRIALS, _POOL, _CHILDREN = 40, 60, 12


def make_space() -> Space:
    return Space.from_config(SpaceConfig(name="warm_start", dimensions=DIMENSIONS), BASE)


@dataclass(frozen=True)
class Problem:
    """A study's true score: a bowl in the active numbers, an effect for each choice.

    Args:
        optimum: unit coordinate of each number.
        curvature: of each number.
        effects: of each choice, by parameter.
        level: added.
        scale: multiplied; negative turns it upside down.
    """

    space: Space
    optimum: dict[str, float]
    curvature: dict[str, float]
    effects: dict[str, dict[Any, float]]
    level: float = 0.0
    scale: float = 1.0

    def __call__(self, params: dict[str, Any]) -> float:
        """Return the true score of a point."""
        total = 0.0
        for name in self.space.active(params):
            parameter = self.space.parameters[name]
            if isinstance(parameter, CategoricalParameter):
                total += self.effects[name][params[name]]
            else:
                total -= self.curvature[name] * (parameter.to_unit(params[name]) - self.optimum[name]) ** 2
        return self.level + self.scale * total

    def best(self) -> float:
        """Return the greatest score, of all choices with each number at its optimum."""
        middle = {name: p.from_unit(self.optimum.get(name, 0.5)) for name, p in self.space.parameters.items()}
        lists = [[(name, choice) for choice in effects] for name, effects in self.effects.items()]
        return max(self({**middle, **dict(chosen)}) for chosen in itertools.product(*lists))

    def like(self, rng: np.random.Generator) -> Problem:
        """Return another study of the family: everything moved a little, another level and scale."""
        return replace(
            self,
            optimum={name: float(np.clip(x + 0.08 * rng.standard_normal(), 0, 1)) for name, x in self.optimum.items()},
            curvature={name: x * math.exp(0.2 * rng.standard_normal()) for name, x in self.curvature.items()},
            effects={n: {c: x + 0.03 * rng.standard_normal() for c, x in e.items()} for n, e in self.effects.items()},
            level=float(rng.normal()),
            scale=float(rng.uniform(0.5, 2.0)),
        )


def make_problem(space: Space, seed: int) -> Problem:
    rng = np.random.default_rng(seed)
    numbers = [name for name, p in space.parameters.items() if not isinstance(p, CategoricalParameter)]
    choices = {name: p.choices for name, p in space.parameters.items() if isinstance(p, CategoricalParameter)}
    return Problem(
        space=space,
        optimum={name: float(rng.uniform(0.15, 0.85)) for name in numbers},
        curvature={name: float(rng.uniform(0.3, 1.5)) for name in numbers},
        effects={name: {choice: float(rng.uniform(0, 0.4)) for choice in listed} for name, listed in choices.items()},
    )


def earlier_study(problem: Problem, seed: int, trials: int = _EARLIER_TRIALS) -> Earlier:
    """Return what a search of `problem` left: one half drawn at random, the other from the neighbours of the best."""
    rng = np.random.default_rng(seed)
    space, noise = problem.space, NOISE * abs(problem.scale)
    points: list[dict[str, Any]] = []
    scores: list[float] = []
    for number in range(trials):
        if number < trials // 2:
            params = space.encoding.from_units(rng.random(len(space.parameters)))
        else:
            params = space.encoding.mutated(points[int(rng.choice(np.argsort(scores)[-5:]))], rng)
        points.append(params)
        scores.append(problem(params) + noise * float(rng.standard_normal()))
    return Earlier(
        run="runs/earlier",
        points=tuple(tuple(map(float, space.features(params))) for params in points),
        params=tuple(points),
        scores=tuple(scores),
        variances=(noise**2,) * trials,
        scored=trials,
    )


def prior_of(arm: str, problem: Problem, seed: int) -> Prior | None:
    rng = np.random.default_rng([seed, 1])
    if arm == "none":
        return None
    source = make_problem(problem.space, 10_000 + seed) if arm == "unrelated" else problem.like(rng)
    source = replace(source, scale=-source.scale) if arm == "negated" else source
    return Prior((earlier_study(source, seed),))


def goal(problem: Problem) -> float:
    """Return the score that lies within `NEAR` of the way from random trials to the optimum."""
    rng = np.random.default_rng(0)
    drawn = [problem(problem.space.encoding.from_units(u)) for u in rng.random((200, len(problem.space.parameters)))]
    return problem.best() - NEAR * (problem.best() - float(np.mean(drawn)))


def proposed(space: Space, data: tuple[np.ndarray, np.ndarray], mean: PriorMean | None, pool: list[Params]) -> Params:
    """Return the point of `pool` of greatest expected improvement under a small Gaussian process.

    The residuals from the prior's mean are what it models, as the sampler's does; it is small so that a search takes a
    second. The incumbent is the best posterior mean among the points tried (Jones, Schonlau & Welch 1998, equation 15).
    """
    points, scores = data
    rows = np.array([space.features(params) for params in pool])
    n, both = len(points), np.concatenate([points, rows])
    expected = mean.at(both) if mean else np.zeros(len(both))
    left = scores - expected[:n]
    centre, spread = left.mean(), max(float(left.std()), 1e-9)
    left = (left - centre) / spread
    setting = left_out(kernels(points, np.zeros(n)), np.ones((n, 1)), left).setting
    (chosen,) = kernels(both, np.zeros(len(both)), SETTINGS[setting : setting + 1])
    solved = np.linalg.solve(chosen[:n, :n], chosen[:n])
    posterior = expected + centre + spread * (solved.T @ left)
    deviation = spread * np.sqrt(np.maximum(np.diag(chosen)[n:] - (chosen[:n, n:] * solved[:, n:]).sum(0), 1e-9))
    gap = posterior[n:] - posterior[:n].max()
    z = gap / deviation
    return pool[int(np.argmax(gap * norm.cdf(z) + deviation * norm.pdf(z)))]


def search(problem: Problem, prior: Prior | None, seed: int, trials: int) -> tuple[list[float], list[float]]:
    """Return the true scores of a search's trials, in order, and the weight of the prior at each."""
    space, rng = problem.space, np.random.default_rng([seed, 2])
    sequence = qmc.Sobol(len(space.parameters), scramble=True, seed=seed).random_base2(3)
    tried: list[Params] = []
    true, told, weights = [], np.empty(0), []
    for number in range(trials):
        known = {space.point_key(params): float(score) for params, score in zip(tried, told, strict=True)}
        params = prior.start(number, STARTUP, space.point_key, known) if prior else None
        points = np.array([space.features(other) for other in tried])
        mean = prior.fit(points, told, np.zeros(number)) if prior and number else None
        weights.append(mean.weights[0] if mean else 0.0)
        if params is None and number < STARTUP:
            params = space.encoding.from_units(sequence[number])
        if params is None:
            drawn = [space.encoding.from_units(u) for u in rng.random((_POOL, len(space.parameters)))]
            best = [tried[i] for i in np.argsort(-told)[:5]]
            drawn += [space.encoding.mutated(parent, rng) for parent in best for _ in range(_CHILDREN)]
            new = [found for found in drawn if space.point_key(found) not in known]
            params = proposed(space, (points, told), mean, new)
        tried.append(params)
        true.append(problem(params))
        told = np.append(told, true[-1] + NOISE * float(rng.standard_normal()))
    return true, weights


def needed(scores: list[float], least: float) -> int:
    """Return the number of the first trial, from 1, that reaches `least`; one more than there are if none does."""
    return next((i for i, score in enumerate(scores, start=1) if score >= least), len(scores) + 1)


def measure(seeds: int, trials: int, arms: tuple[str, ...] = ARMS) -> dict[str, np.ndarray]:
    """Return the trials needed by arm, one for each seed, and by ``<arm> weight`` the prior's weight at each trial."""
    space = make_space()
    table: dict[str, np.ndarray] = {}
    for arm in arms:
        counts, weights = [], []
        for seed in range(seeds):
            problem = make_problem(space, seed)
            scores, weight = search(problem, prior_of(arm, problem, seed), seed, trials)
            counts.append(needed(scores, goal(problem)))
            weights.append(weight)
        table[arm], table[f"{arm} weight"] = np.array(counts), np.array(weights)
    return table


def extra(counts: np.ndarray, base: np.ndarray) -> tuple[float, float, float]:
    """Return by what share the mean of `counts` exceeds that of `base`, and its 90 % interval over seeds, paired."""
    rng = np.random.default_rng(0)
    draws = rng.integers(0, len(base), (4000, len(base)))
    low, high = np.quantile(counts[draws].mean(1) / base[draws].mean(1) - 1, (0.05, 0.95))
    return float(counts.mean() / base.mean() - 1), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trials that a search needs with a right, a wrong and no prior.")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--trials", type=int, default=40)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    begun = time.monotonic()
    table = measure(options.seeds, options.trials)
    print(f"{options.seeds} seeds, at most {options.trials} trials, {time.monotonic() - begun:.0f} s")
    print("| prior | trials needed, mean | median | more than without, 90 % interval | weight after 10 trials, mean |")
    print("|---|---|---|---|---|")
    for arm in ARMS:
        share, low, high = extra(table[arm], table["none"])
        cells = f"{table[arm].mean():.1f} | {np.median(table[arm]):.0f} | {share:+.0%} ({low:+.0%} to {high:+.0%})"
        print(f"| {arm} | {cells} | {table[f'{arm} weight'][:, min(9, options.trials - 1)].mean():.2f} |")


if __name__ == "__main__":
    main()
