"""What earlier searches expect of this one's points: a mean for the model of the objective.

Shape legend: N trials told, n trials of one earlier search, d features in [0, 1], K earlier searches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adasearch.config import StudyConfig
from adasearch.search.earlier import Earlier, gather, point_of, scored_trials
from adasearch.search.noise import excess
from adasearch.search.shifted import Expected
from adasearch.search.space import Space
from adasearch.search.stacking import DEFAULT_WEIGHT, MIN_TOLD, Belief, believed
from adasearch.search.surrogate import Observations, fit

NUM_STARTS = 3
"""Start-up proposals that are points of earlier searches, at most."""

Key = Callable[[dict[str, Any]], str]


def source_mean(points: np.ndarray, scores: np.ndarray, variances: np.ndarray) -> Expected:
    """Return the posterior mean of a Gaussian process fitted to an earlier search, in its standard units.

    In closed form, m + k(x, X) (k(X, X) + noise)^-1 (y - m) (Rasmussen & Williams 2006, equation 2.38), because it is
    asked for at all points of this search each time that the model of this search is.

    Args:
        points: n×d.
        scores: n, higher is better.
        variances: n squared standard errors.
    """
    model = fit(Observations(points=points, scores=scores, variances=excess(variances), pending=np.empty((0, 0))))
    model.requires_grad_(requires_grad=False)
    model.train()
    x = model.train_inputs[0]
    noisy = model.likelihood(model.forward(x))
    alpha = torch.linalg.solve(noisy.covariance_matrix, model.train_targets - noisy.mean)

    def expected(at: Tensor) -> Tensor:
        covariance: Tensor = model.covar_module(at, x).to_dense()
        mean: Tensor = model.mean_module(at)
        shift: Tensor = covariance @ alpha
        return mean + shift

    return expected


@dataclass(frozen=True, slots=True)
class PriorMean:
    """What the scores of this search are expected to be: ``level + sum_k w_k b_k mu_k(x)``, see `stacking`.

    Args:
        belief: weights w and slopes b.
        level: in score units.
        sources: mu, the earlier searches' means.
    """

    belief: Belief
    level: float
    sources: tuple[Expected, ...]

    @property
    def weights(self) -> tuple[float, ...]:
        """Return the weight of each earlier search."""
        return tuple(float(weight) for weight in self.belief.weights)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the expected scores (...×n) at features (...×n×d)."""
        total = torch.full(x.shape[:-1], self.level, dtype=x.dtype)
        for share, source in zip(self.belief.weights * self.belief.slopes, self.sources, strict=True):
            if share > 0:
                total = total + float(share) * source(x)
        return total

    def at(self, points: np.ndarray) -> np.ndarray:
        """Return the expected scores (n) at features (n×d)."""
        with torch.no_grad():
            return np.asarray(self(torch.as_tensor(points, dtype=torch.float64)).numpy())


class Prior:
    """Earlier searches as prior knowledge of this one.

    Args:
        sources: what was read of them, see `earlier`.
    """

    def __init__(self, sources: tuple[Earlier, ...]) -> None:
        self.sources = sources

    @cached_property
    def _means(self) -> tuple[Expected, ...]:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return tuple(source_mean(s.features, np.array(s.scores), np.array(s.variances)) for s in self.sources)

    def _predictions(self, points: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            x = torch.as_tensor(points, dtype=torch.float64)
            return np.array([mean(x).numpy() for mean in self._means])

    def fit(self, points: np.ndarray, scores: np.ndarray, variances: np.ndarray) -> PriorMean:
        """Return the mean that the sources give this search, weighted by how well they predict what was told.

        Before `stacking.MIN_TOLD` trials the sources share `stacking.DEFAULT_WEIGHT`, and their scores are taken to
        spread in this search as they did in their own.

        Args:
            points: N×d features of the trials told.
            scores: N, higher is better.
            variances: N squared standard errors.
        """
        if len(scores) < MIN_TOLD:
            count = len(self.sources)
            spreads = np.array([np.std(source.scores) for source in self.sources])
            belief = Belief(weights=np.full(count, DEFAULT_WEIGHT / count), slopes=spreads)
            found = PriorMean(belief, 0.0, self._means)
        else:
            found = PriorMean(believed(self._predictions(points), points, scores, variances), 0.0, self._means)
        level = float((scores - found.at(points)).mean()) if len(scores) else 0.0
        return PriorMean(found.belief, level, self._means)

    def start(self, index: int, startup: int, key: Key, known: Mapping[str, float | None]) -> dict[str, Any] | None:
        """Return a point of an earlier search to be tried as proposal `index`, None for what the sampler proposes.

        Every other one of the first proposals is such a point, `NUM_STARTS` at most: those that look best under their
        own search's model, the searches taking turns. A search one of whose points did worse here than the median of
        the other trials gives no more of them: a wrong prior costs one trial.

        Args:
            index: number of proposals before, recipes not counted.
            startup: number of proposals that are made without a model.
            key: what two points share that are the same trial.
            known: score by key of the trials so far, None where it is not told yet or there is none.
        """
        if index % 2 or index >= min(startup, 2 * NUM_STARTS):
            return None
        ours = {key(params) for ranked in self._ranked for params in ranked[:NUM_STARTS]}
        others = [score for name, score in known.items() if name not in ours and score is not None]
        least = float(np.median(others)) if others else -np.inf
        trusted = []
        for ranked in self._ranked:
            tried = [known.get(key(params)) for params in ranked[:NUM_STARTS]]
            if all(score is None or score >= least for score in tried):
                trusted.append(ranked[:NUM_STARTS])
        turns = (ranked[i] for i in range(NUM_STARTS) for ranked in trusted if i < len(ranked))
        return next((params for params in turns if key(params) not in known), None)

    @cached_property
    def _ranked(self) -> list[list[dict[str, Any]]]:
        """Return the points of each source that this space holds, by the source's posterior mean, best first."""
        found = []
        for source, mean in zip(self.sources, self._means, strict=True):
            with torch.no_grad():
                expected = mean(torch.as_tensor(source.features)).numpy()
            order = np.argsort(-expected, kind="stable")
            found.append([params for i in order if (params := source.params[i]) is not None])
        return found

    def lines(self, weights: tuple[float, ...]) -> list[str]:
        """Return in one line for each source how far it is believed."""
        return [f"{s.run}: weight {w:.2f}, {s.summary}" for s, w in zip(self.sources, weights, strict=True)]


def weights_lines(run: Path, study: StudyConfig) -> list[str]:
    """Return how far a run believes each of the earlier ones, by all that its records tell; nothing without any.

    Raises:
        ConfigError: the earlier runs are neither frozen in the run nor readable.
    """
    if not study.warm_start:
        return []
    space = Space.from_config(study.space, study.trial, seed=study.seed)
    prior = Prior(gather(study, space, run))
    found = [(record.result, point_of(record.config or {}, space)[0]) for record in scored_trials(run)]
    points = np.array([row for _, row in found])
    scores = np.array([result.score for result, _ in found if result])
    variances = np.array([result.stderr**2 for result, _ in found if result])
    return prior.lines(prior.fit(points, scores, variances).weights)
