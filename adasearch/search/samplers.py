"""Which sampler a study gets, by its settings."""

from __future__ import annotations

import warnings

from optuna.samplers import BaseSampler, GPSampler, RandomSampler, TPESampler

from adasearch.search.sampler import BoTorchSampler, derived_seed
from adasearch.search.space import Space
from adasearch.sections import SamplerConfig


def make_sampler(config: SamplerConfig, space: Space, seed: int, number: int) -> BaseSampler:
    """Return a new sampler for the trial `number`: it has no state but the study, so a resumed search goes on alike."""
    draw = derived_seed(seed, number, config.type)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if config.type == "tpe":
            return TPESampler(seed=draw, n_startup_trials=config.startup)
        if config.type == "gp":
            return GPSampler(seed=draw, n_startup_trials=config.startup, deterministic_objective=False)
        if config.type == "random":
            return RandomSampler(seed=draw)
    return BoTorchSampler(space, seed=seed, startup=config.startup)
