"""The sections of a study file: frozen values, each with what its settings mean."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import pydantic

from adasearch.documents import Count, Fraction, NonNegative, Positive, Share, value

Cost = Literal["parameters", "latency", "memory"]
SamplerType = Literal["auto", "botorch", "tpe", "gp", "nsga2", "random", "cmaes", "evolution"]


@value
class ModelConfig:
    """Which model. `name`: hub id, folder, ``file.gguf`` or ``package:python_package`` that carries one."""

    name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None


@value
class BudgetConfig:
    """How much goes: `remove` is the fraction of parameters removed, of all or of the non-embedding ones.

    Args:
        multiple_of: MLP widths are multiples of it, or dense.
        uniform: all layers get the same widths, such as the family's stock class opens.
    """

    remove: Fraction
    of: Literal["all", "non_embedding"] = "all"
    multiple_of: Count = 1
    uniform: bool = False


@value
class ObjectiveConfig:
    """What the search maximises: the mean of `metric` over the tasks in `search`, on `items` items of each.

    `margin` is the chance-corrected probability of the right choice, (p - 1/n) / (1 - 1/n), with p the softmax over
    the choices' log-likelihoods per character (as they are, where a task reports no acc_norm). `select` items of each
    task are set aside for choosing among finalists.

    Args:
        also: what is minimised beside it: ``parameters`` (a count), ``latency`` (seconds of a forward pass over
            `latency_tokens` tokens, measured), ``memory`` (bytes of weights and of the cache of as many tokens).
        at_most: hard limits of those three, as fractions of the dense model's figure; a trial beyond is no winner.
        latency_tokens: length of the sequence that latency and memory are about.
    """

    search: tuple[str, ...]
    items: Count = 200
    select: Count = 200
    metric: Literal["margin", "acc", "acc_norm"] = "margin"
    allow_shared_splits: bool = False
    also: tuple[Cost, ...] = ()
    at_most: dict[Cost, Positive] = dataclasses.field(default_factory=dict)
    latency_tokens: Count = 512


@value
class ReportConfig:
    """What is scored once, at the end: tasks by name; perplexity on the first tokens of corpora, by window length."""

    tasks: tuple[str, ...]
    items: Count | None = None
    perplexity: tuple[str, ...] = ()
    perplexity_tokens: Count = 65536
    windows: tuple[Count, ...] = (128, 2048)


def _workers(given: Any) -> Any:
    if given == "auto" or (isinstance(given, int) and not isinstance(given, bool) and given >= 1):
        return given
    raise ValueError("must be auto or a number, 1 or more")


@value
class ClusterConfig:
    """Where trials run: `local` processes under Ray (the default), in this process, or on a running Ray cluster.

    What is left open is decided by `placement.decide`; a run's ``config.yaml`` holds what was decided.

    Args:
        workers: trials at the same time; ``auto`` follows from cores, memory, GPUs and the number of trials.
        threads: threads of each worker; None shares the cores evenly.
        gpus_per_worker: GPUs of each worker, a fraction where workers share one; None shares evenly what there is, 0
            computes on CPUs.
        gpu_memory: share of a GPU's memory that each worker may take; None follows from `gpus_per_worker`.
        address: None starts a local Ray, ``auto`` or ``host:port`` joins one; ``in_process`` uses no Ray at all.
    """

    workers: Annotated[int | Literal["auto"], pydantic.PlainValidator(_workers)] = "auto"
    threads: Count | None = None
    gpus_per_worker: NonNegative | None = None
    gpu_memory: Fraction | None = None
    address: str | None = None


@value
class SamplerConfig:
    """How the next trial is proposed; `startup` trials come from a quasi-random sequence after the recipes.

    ``auto`` takes what suits the study and says what and why, see `search.samplers`.
    """

    type: SamplerType = "auto"
    startup: Count = 6


@value
class StoppingConfig:
    """When a search ends before its `trials` are done; what is None never ends it. The finalists are made all the same.

    Args:
        seconds: of the search, over all of its drivers.
        cost: seconds of trials, summed over workers.
        gain: end when the improvement to be expected of the next trial is below this many standard errors of the best
            trial's score.
        patience: for so many trials in a row.
    """

    seconds: Positive | None = None
    cost: Positive | None = None
    gain: Positive | None = None
    patience: Count = 5


@value
class LimitsConfig:
    """Bounds of a run: seconds of one trial, attempts at it, and the share of failed trials that stops the search."""

    trial_seconds: Positive = 3600.0
    attempts: Count = 2
    failed_share: Share = 0.5
