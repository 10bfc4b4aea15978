"""Which sampler a study gets, by its settings."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from adasearch.search.sampler import BoTorchSampler, derived_seed
from adasearch.search.space import Space
from adasearch.sections import SamplerConfig

if TYPE_CHECKING:
    from adasearch.search.prior import Prior

MODELLED = frozenset({"auto", "botorch"})
"""Samplers that take what earlier searches expect into their model."""


def make_sampler(
    config: SamplerConfig, space: Space, seed: int, number: int, prior: Prior | None = None
) -> BaseSampler:
    """Return a new sampler for the trial `number`: it has no state but the study, so a resumed search goes on alike.

    Of all samplers only ours has a use for the `prior` that earlier searches give.
    """
    draw = derived_seed(seed, number, config.type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if config.type == "tpe":
            return TPESampler(seed=draw, n_startup_trials=config.startup)
        if config.type == "gp":
            return GPSampler(seed=draw, n_startup_trials=config.startup, deterministic_objective=False)
        if config.type == "random":
            return RandomSampler(seed=draw)
    return BoTorchSampler(space, seed=seed, startup=config.startup, prior=prior)
