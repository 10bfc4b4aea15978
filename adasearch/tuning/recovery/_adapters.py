"""What the recoveries with low-rank updates share: which projections, settings, first values, the run and the merge.

Shape letters: M outputs and K inputs of a projection, R rank of its update b a.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import pydantic
import torch
from torch import Tensor, nn

from adasearch.documents import Count, Positive, Share, value
from adasearch.errors import ConfigError, TrialError
from adasearch.pruning.learning import check_rank
from adasearch.pruning.structure import ModelStructure
from adasearch.registry import nearest
from adasearch.sections import Dropout, TuningOptions
from adasearch.tuning.decoder import Update, Updates
from adasearch.tuning.loop import train
from adasearch.tuning.masters import Masters
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport
from adasearch.tuning.training import PHASE, Adapters, TrainingConfig, seeded

_SETS = {
    "all": ("q", "k", "v", "o", "gate", "up", "down"),
    "attention": ("q", "k", "v", "o"),
    "mlp": ("gate", "up", "down"),
}
"""Projections by the name of a set of them; each is called by its module's name without the ending ``_proj``."""


def _checked(given: object) -> object:
    """Return `given` where it names projections: one name, or several without any twice."""
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, list | tuple) or not names:
        raise ValueError("must name at least one projection, or all, attention or mlp")
    known = {*_SETS, *_SETS["all"]}
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"unknown projection {name!r}; {nearest(str(name), known)}")
    parts = [part for name in names for part in _SETS.get(name, (name,))]
    twice = [part for i, part in enumerate(parts) if part in parts[:i]]
    if twice:
        raise ValueError(f"must name each projection once, {twice[0]} stands twice")
    return given if isinstance(given, str) else tuple(names)


AtLeastOne = Annotated[float, pydantic.Field(ge=1, allow_inf_nan=False)]
Targets = Annotated[str | tuple[str, ...], pydantic.PlainValidator(_checked)]
"""``all``, ``attention``, ``mlp``, one of q, k, v, o, gate, up, down, or a list of these; as it was written."""


@value
class AdapterOptions(TuningOptions):
    """Settings of every recovery with low-rank updates.

    Args:
        rank: of each update, at the end of the run, on average over those that are trained; at most the smaller side of
            every projection of the dense model. Where the cut leaves less than that, the update has full rank.
        dropout: share of an adapter's inputs that is dropped while training.
        targets: which projections get an adapter.
        lr: greatest learning rate; short runs want a far greater one than the 1e-4 of runs over millions of tokens.
    """

    rank: Count = 8
    dropout: Dropout = 0.0
    targets: Targets = "all"
    lr: Positive = 1e-3


@value
class PacedOptions(AdapterOptions):
    """Settings of those that take something away between two points of a run.

    Args:
        begin: share of the steps before anything goes.
        end: share of the steps after which nothing goes any more.
        every: steps from one time to the next.
    """

    begin: Share = 0.1
    end: Share = 0.7
    every: Count = 1

    def last(self, steps: int) -> int:
        """Return the step of a run (from 1) at which the last of what is to go goes."""
        return max(1, round(self.end * steps))

    def left(self, step: int, steps: int, totals: tuple[int, int], power: int) -> int | None:
        """Return how many of something stay after `step` of `steps` (from 1), None where nothing is to be decided.

        From `totals[0]` down to `totals[1]` (``t0`` and ``t1``) between the steps ``i`` and ``f``, as in AdaLoRA
        (arXiv 2303.10512, equation 12) with power 3: ``t1 + (t0 - t1) (1 - (step - i) / (f - i))^power``, rounded down.
        At ``f``, which is in every run, ``t1`` are left.
        """
        first, last = self.begin * steps, self.last(steps)
        start, target = totals
        if step == last:
            return target
        if step <= first or step > last or step % self.every:
            return None
        return int(target + (start - target) * (1 - (step - first) / (last - first)) ** power)


class Paced(Adapters):
    """Updates of which something goes between two points of a run.

    Args:
        updates: by linear module of the model.
        options: of the run.
        steps: of the run.
    """

    def __init__(self, updates: Updates, options: PacedOptions, steps: int) -> None:
        super().__init__(updates)
        self._options, self._steps = options, steps

    def settled(self, step: int, steps: int) -> bool:
        """Return whether all that is to go has gone."""
        return step >= self._options.last(steps)


def short_name(module: str) -> str:
    """Return q, gate, ... for the path of a projection."""
    return module.rpartition(".")[2].removesuffix("_proj")


def chosen(options: AdapterOptions, names: tuple[str, ...]) -> list[str]:
    """Return those of the projections `names` (module paths) that get an adapter, in their order."""
    given = (options.targets,) if isinstance(options.targets, str) else options.targets
    wanted = {part for name in given for part in _SETS.get(name, (name,))}
    return [name for name in names if short_name(name) in wanted]


def check(options: AdapterOptions, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Return when the projections of a model can have the adapters that the options ask for.

    Args:
        options: of one of the recoveries that train adapters.
        shapes: M × K of every projection by module path.

    Raises:
        ConfigError: names the setting.
    """
    check_rank(options, {name: shapes[name] for name in _some(options, tuple(shapes))})


def _some(options: AdapterOptions, names: tuple[str, ...]) -> list[str]:
    """Return those of the projections `names` that get an adapter.

    Raises:
        ConfigError: there are none, or the options contradict each other.
    """
    if isinstance(options, PacedOptions) and options.begin >= options.end:
        raise ConfigError("begin", f"must be below end, {options.end:g}, given {options.begin:g}")
    found = chosen(options, names)
    if not found:
        raise ConfigError("targets", f"must name a projection of the model, given {options.targets!r}")
    return found


def projections(
    model: nn.Module,
    structure: ModelStructure,
    options: AdapterOptions,
    section: str = "recovery",
    *,
    dense: bool = False,
) -> dict[str, nn.Linear]:
    """Return the modules that get an update by their path, and freeze the model.

    Args:
        model: whole or cut.
        structure: of the dense model.
        options: say which.
        section: of the trial, whose options they are.
        dense: the model is, so that its projections must be as wide as the rank.

    Raises:
        TrialError: the model has none of those that are named, or the rank is too great (kind ``config``).
    """
    model.requires_grad_(False)  # noqa: FBT003
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = {name: module for name, module in linear.items() if name.rpartition(".")[2] in structure.lora_targets}
    try:
        if dense:
            check(options, {name: tuple(module.weight.shape) for name, module in found.items()})
        return {name: found[name] for name in _some(options, tuple(found))}
    except ConfigError as error:
        raise TrialError("config", f"{section}.{error}", PHASE) from error


def widest(module: nn.Linear) -> int:
    """Return the greatest rank that an update of `module` can have."""
    return min(module.in_features, module.out_features)


def factors(module: nn.Linear, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """Return a (R × K), drawn as by Kaiming for a leaky ReLU of slope sqrt(5), and b (M × R), 0: nothing changes.

    R is `rank`, or as much as `module` has room for.
    """
    weight, rank = module.weight, min(rank, widest(module))
    a = torch.empty(rank, module.in_features, device=weight.device)
    nn.init.kaiming_uniform_(a, a=math.sqrt(5))
    b = torch.zeros(module.out_features, rank, device=weight.device)
    return nn.Parameter(a.to(weight.dtype)), nn.Parameter(b.to(weight.dtype))


@torch.no_grad()
def merge(module: nn.Module, update: Update) -> None:
    """Make an update part of a weight, in float32, and round once."""
    weight: Any = module.weight
    sum_ = weight.float().addmm_(update.b.float(), update.a.float(), alpha=update.scale)
    if update.gain is not None:
        sum_.mul_(update.gain.float()[:, None])
    weight.copy_(sum_ if update.gate is None else sum_.mul_(update.gate.float()))


def tune(
    model: nn.Module,
    make: Callable[[int], Adapters],
    tokens: Tensor,
    options: AdapterOptions,
    context: RecoveryContext,
) -> RecoveryReport:
    """Train adapters on the stream and merge them.

    Updates are computed in the dtype of the model and kept in float32 by the optimizer; the merge takes the float32
    values, so that a bfloat16 weight is rounded once.

    Args:
        model: frozen, see `projections`.
        make: returns the adapters for a number of steps; what it draws follows from the seed.
        tokens: 1-D stream of token ids.
        options: of the run.
        context: of the recovery.

    Raises:
        TrialError: a loss that is not finite, or a stream that is too short.
    """
    run = TrainingConfig.of(options)
    with seeded(context):
        adapters = make(run.steps)
        masters = Masters(adapters.parameters(), run)
        report = train(model, masters, tokens, run, context, adapters)
    masters.restore_precision()
    with torch.no_grad():
        updates = adapters.updates()
        if context.keep is not None:
            context.keep(updates)
        for module, update in updates.items():
            merge(module, update)
    return report
