"""The sections of a study file: frozen values, each with what its settings mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import pydantic

from adasearch.documents import Count, Fraction, Index, NonNegative, Positive, Share, parse, plain, value
from adasearch.errors import ConfigError

Cost = Literal["parameters", "latency", "memory"]
Metric = Literal["margin", "log_score", "acc", "acc_norm"]
SamplerType = Literal["auto", "botorch", "tpe", "gp", "nsga2", "random", "cmaes", "evolution"]


@value
class MixPart:
    """One corpus of a mixture, and its share of the tokens in proportion to the other weights."""

    corpus: str
    weight: Positive


def _some(parts: tuple[MixPart, ...]) -> tuple[MixPart, ...]:
    if not parts:
        raise ValueError("must name a corpus")
    return parts


@value
class Mix:
    """Several corpora read together: ``{mix: [{corpus: pydoc, weight: 2}, {corpus: stdlib, weight: 1}]}``."""

    mix: Annotated[tuple[MixPart, ...], pydantic.AfterValidator(_some)]

    @staticmethod
    def of(corpus: str | Mix) -> Mix:
        """Return what is read: a mixture as it is, a corpus as one of a single part."""
        return corpus if isinstance(corpus, Mix) else Mix(mix=(MixPart(corpus=corpus, weight=1.0),))


def _text(given: Any, info: pydantic.ValidationInfo) -> Any:
    if given is None or isinstance(given, str | Mix):
        return given
    if isinstance(given, dict):
        return parse(Mix, given, str(info.field_name))
    problem = f"must be a corpus or {{mix: [{{corpus: .., weight: ..}}]}}, given {given!r}"
    raise ConfigError(str(info.field_name), problem)


Text = Annotated[str | Mix | None, pydantic.PlainValidator(_text)]
"""What is read to train on: a corpus, a mixture, or None for what the trial is calibrated on."""


@value
class TextOptions:
    """What is read to train on: settings that all components have which train; their options are derived from these.

    Args:
        corpus: text to train on: a corpus, or a mixture; None takes the corpus of the calibration.
        packing: ``stream`` lays documents end to end and cuts sequences anywhere; with ``documents`` a sequence holds
            whole documents where they are not longer than it, none sees another, and positions start at 0 in each.
        loss: which tokens count where the text has conversations (``chat/<corpus>``): all, or the answers alone. Of
            plain text all count.
    """

    corpus: Text = None
    packing: Literal["stream", "documents"] = "stream"
    loss: Literal["all", "answers"] = "all"

    def __post_init__(self) -> None:
        """Check that answers are trained on beside their own questions.

        Raises:
            ConfigError: they would be cut from them.
        """
        if self.loss == "answers" and self.packing != "documents":
            raise ConfigError("packing", "must be documents where loss is answers, given stream: it would cut answers "
                                         "from their questions")  # fmt: skip


SequenceLength = Annotated[int, pydantic.Field(ge=8, le=8192)]
Dropout = Annotated[float, pydantic.Field(ge=0, lt=1, allow_inf_nan=False)]


@value
class TuningOptions(TextOptions):
    """How much is trained on and how, beside the text: settings that all components have which train.

    Args:
        tokens: tokens to train on.
        length: tokens of a sequence.
        batch: sequences of a step.
        lr: greatest learning rate.
        warmup: share of the steps with a rising rate.
        grad_clip: greatest gradient norm.
        distill: weight of KL(dense || trained) beside the next-token loss; costs one dense forward per step.
    """

    tokens: Count = 16384
    length: SequenceLength = 128
    batch: Count = 4
    lr: Positive = 1e-3
    warmup: Share = 0.1
    grad_clip: Positive = 1.0
    distill: NonNegative = 0.0


@value
class Sampling:
    """Text that the dense model makes itself: the settings of the corpus ``self``.

    Args:
        temperature: what logits are divided by; 1 is the model's own distribution, less is more likely text.
        length: tokens of each document.
        documents: how many there are, over all parts of the corpus.
        seed: of what is drawn.
    """

    temperature: Positive = 1.0
    length: Annotated[int, pydantic.Field(ge=16, le=8192)] = 256
    documents: Count = 256
    seed: Index = 0


@value
class ModelConfig:
    """Which model. `name`: hub id, folder, ``file.gguf`` or ``package:python_package`` that carries one."""

    name: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    revision: str | None = None


Goal = Literal["latency", "memory"]
Target = Annotated[float, pydantic.Field(gt=0, le=1, allow_inf_nan=False)]


@value
class BudgetConfig:
    """How much goes: a fraction of the parameters, or as much as brings another cost to a target; one of three.

    Args:
        remove: fraction of the parameters that is removed, of all or of the non-embedding ones.
        latency: what may be left of the dense model's seconds of a forward pass over `objective.latency_tokens` tokens,
            as a table of measured widths predicts it, see `latencies`.
        memory: what may be left of the dense model's bytes of weights and of the cache of as many tokens, counted.
        of: what `remove` is a fraction of.
        multiple_of: MLP widths are multiples of it, or dense.
        uniform: all layers get the same widths, such as the family's stock class opens.
    """

    remove: Fraction | None = None
    latency: Target | None = None
    memory: Target | None = None
    of: Literal["all", "non_embedding"] = "all"
    multiple_of: Count = 1
    uniform: bool = False

    def __post_init__(self) -> None:
        """Check that one measure is given.

        Raises:
            ValueError: none is, or several are.
        """
        given = [name for name in ("remove", *get_args(Goal)) if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"must hold one of remove, latency and memory, holds {' and '.join(given) or 'none'}")

    @property
    def goal(self) -> tuple[Goal, float] | None:
        """Return the cost that is brought to a target, and the target; None where the parameters are."""
        found = {name: getattr(self, name) for name in get_args(Goal)}
        return next(((name, target) for name, target in found.items() if target is not None), None)

    @property
    def fraction(self) -> float:
        """Return the fraction of the parameters that is removed, where that is what was asked, or is known by now."""
        assert self.remove is not None, "a budget of another measure is brought to one of parameters first: `goals`"
        return self.remove

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that a study file holds: measures that were not given are left out."""
        return {key: item for key, item in plain(self).items() if item is not None}

    def removing(self, fraction: float) -> BudgetConfig:
        """Return the budget with `fraction` (0 or more) of the parameters to remove in the place of what it asks."""
        return dataclasses.replace(self, remove=fraction, latency=None, memory=None)


@value
class OwnBudget:
    """The budget of a single trial: `remove` in the place of the study's, which None leaves as it is."""

    remove: Fraction | None = None


def _distinct(costs: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({cost for cost in costs if costs.count(cost) > 1})
    if twice:
        raise ValueError(f"must name each cost once, {twice[0]} stands twice")
    return costs


@value
class ObjectiveConfig:
    """What the search maximises: the mean of `metric` over the tasks in `search`, on `items` items of each.

    `margin` is the chance-corrected probability of the right choice, (p - 1/n) / (1 - 1/n), with p the softmax over
    the n choices' log-likelihoods per character (as they are, where a task reports no acc_norm). `log_score` is its
    chance-corrected logarithm, log(n p) / log n: like the margin 0 at chance and 1 at certainty, but without a lower
    bound: a right choice that is held for impossible costs more than one that is held for unlikely. On tasks that
    report acc_norm it shows differences between configurations best; on others a confident model may score below one
    that knows nothing, so it is not the default (benchmarks/RESULTS.md, "How noisy scores are"). `acc` and `acc_norm`
    are lm-eval's, and always reported. Finalists are compared by the same metric, on `select` items of each task that
    are set aside for it.

    Args:
        also: what is minimised beside it, as a fraction of the dense model's figure: ``parameters`` (a count),
            ``latency`` (seconds of a forward pass over `latency_tokens` tokens, measured), ``memory`` (bytes of weights
            and of the cache of as many tokens). See `costs`.
        at_most: hard limits of those three, as fractions of the dense model's figure; a trial beyond is no winner.
        latency_tokens: length of the sequence that latency and memory are about.
    """

    search: tuple[str, ...]
    items: Count = 200
    select: Count = 200
    metric: Metric = "margin"
    allow_shared_splits: bool = False
    also: Annotated[tuple[Cost, ...], pydantic.AfterValidator(_distinct)] = ()
    at_most: dict[Cost, Positive] = dataclasses.field(default_factory=dict)
    latency_tokens: Count = 512

    @property
    def costs(self) -> tuple[Cost, ...]:
        """Return the costs that are minimised or bounded: what is measured of every trial, and nothing else."""
        return tuple(cost for cost in get_args(Cost) if cost in self.also or cost in self.at_most)

    @property
    def several(self) -> bool:
        """Return whether the search looks for a front, not for a single winner."""
        return bool(self.also)

    def violations(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Return by how much `shares` (costs as fractions of the dense model's) exceed each limit, 0 or less if not.

        An unknown cost, such as that of a trial that failed, counts as 1 beyond its limit.
        """
        return {cost: shares.get(cost, limit + 1.0) - limit for cost, limit in sorted(self.at_most.items())}

    def admits(self, shares: Mapping[str, float]) -> bool:
        """Return whether `shares` keep all of the hard limits."""
        return all(beyond <= 0 for beyond in self.violations(shares).values())


@value
class ReportConfig:
    """What is scored once, at the end: tasks by name; perplexity on the first tokens of corpora, by window length.

    `contamination` says what becomes of a document of calibration or recovery in which an item of `tasks` stands, see
    `tuning.contamination`: it is left out (``drop``, counted in the trial's notes), ends the work (``refuse``), or is
    read all the same (``allow``).
    """

    tasks: tuple[str, ...]
    items: Count | None = None
    perplexity: tuple[str, ...] = ()
    perplexity_tokens: Count = 65536
    windows: tuple[Count, ...] = (128, 2048)
    contamination: Literal["drop", "refuse", "allow"] = "drop"


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

    Trials that were asked by then are finished, so a bound is passed by as much as those take. At least one trial runs.

    Args:
        seconds: of the search, over all of its drivers; the time between two drivers does not count.
        cost: seconds of trials that have a score, summed over workers.
        gain: end when the improvement to be expected of the next proposal over the best posterior mean is below this
            many standard errors of the best trial's score, see `search.belief.expected_gain`.
        patience: for so many proposals in a row, quasi-random ones left out.
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


@value
class CalibrationConfig:
    """Which text the statistics come from: `samples` sequences of `length` tokens of `corpus`, drawn by seed `draw`."""

    corpus: str
    samples: Count = 32
    length: SequenceLength = 128
    draw: Index = 0


@value
class UnitsConfig:
    """What can go: attention by whole KV groups or by the same number of query heads in each group; MLP channels."""

    attention: Literal["kv_group", "head", "none"] = "kv_group"
    mlp: Literal["channel", "none"] = "channel"


FINALIST = {
    "type": "lora", "rank": 64, "scaling": "rslora", "lr": 5e-4, "tokens": 262144, "length": 256, "batch": 4,
}  # fmt: skip
"""How finalists are tuned where a study does not say: see ``benchmarks/RESULTS.md``, "Recoveries beside each other"."""


@value
class ValidationConfig:
    """Text that a recovery is measured on while it trains, and never trained on; the best weights are kept.

    It is taken from the recovery's own corpora, by documents: never from a part that search or report items come from.

    Args:
        tokens: that the loss is measured on.
        every: steps from one measurement to the next; the last step is always measured.
        patience: measurements in a row without a lower loss that end the run; None never ends it.
        share: of the recovery's documents that are held out.
    """

    tokens: Count = 16384
    every: Count = 50
    patience: Count | None = 5
    share: Fraction = 0.05


@value
class TrainingRules:
    """How a recovery is run, whatever it trains: budget of time, validation, checkpoints, memory, processes.

    Args:
        seconds: greatest time of the training; the learning rate falls to its end by then. Without it, the recovery's
            `tokens` alone are the budget.
        validation: None trains on all text and keeps the last weights.
        micro_batch: sequences of one forward and backward; the gradients of a whole batch are summed up, so what is
            learnt stays the same. None takes the batch at once.
        recompute: keep only what goes from layer to layer and compute the rest again in the backward pass, for a third
            more time (gradient checkpointing, Chen et al., arXiv 1604.06174).
        precision: in what forward and backward run; ``model`` is the number format of the model. Updates are made on
            float32 masters whatever it is.
        optimizer: ``adamw``, or ``adamw8bit`` with a quarter of its states, see `tuning.eightbit`.
        save_seconds: time from one checkpoint to the next, None for none.
        processes: workers that train one model together, each a share of every batch.
    """

    seconds: Positive | None = None
    validation: ValidationConfig | None = None
    micro_batch: Count | None = None
    recompute: bool = False
    precision: Literal["model", "float32", "bfloat16"] = "model"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    save_seconds: Positive | None = 300.0
    processes: Count = 1
