"""What leaves a model before any width is decided: rows of the vocabulary, hidden dimensions, layers and sublayers.

Each of them takes what its rule asks for, but never more than the budget has left for it, in this order; the widths pay
the rest. So a model is never smaller than it has to be, whatever a search proposes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from adasearch import goals, tokenization
from adasearch.config import TrialConfig
from adasearch.errors import ConfigError, ModelError, TrialError
from adasearch.losses import LossBook
from adasearch.outlined import named_tokens
from adasearch.pruning import compensation, depth, hidden, masking, tokens, vocabulary
from adasearch.pruning.depth import DepthContext, LossOptions
from adasearch.pruning.hidden import HiddenContext
from adasearch.pruning.projection import removal
from adasearch.pruning.structure import WHOLE, ModelStructure, Outline, count_outlined

if TYPE_CHECKING:
    from torch import Tensor

    from adasearch.workbench import Workbench

PHASE = "outline"


def wanted(config: TrialConfig) -> bool:
    """Return whether anything but widths may go."""
    return any(part.type != "none" for part in (config.vocabulary, config.hidden, config.depth))


Train = Callable[["Tensor", int, Any], "Tensor"]


def decide(config: TrialConfig, bench: Workbench, train: Train | None = None) -> Outline:
    """Return what goes before the widths are decided; `train` is that of a `HiddenContext`.

    Raises:
        TrialError: a rule cannot be followed in this model (kind ``config``).
    """
    if not wanted(config):
        return WHOLE
    structure = bench.structure(config.units)
    biases = compensation.bias_modules(config.compensation, structure)
    try:
        left = structure.parameters - removal(structure, goals.before_widths(config, bench), biases)
        outline = _without_tokens(config, bench, left)
        outline = _without_dimensions(config, bench, outline, left, train)
        return _without_layers(config, bench, outline, left)
    except (ConfigError, ModelError) as error:
        raise TrialError("config", str(error), PHASE) from error


def _most(count: Callable[[int], int], units: int, left: int) -> int:
    """Return how many of `units` may go at most so that `count` (of those that go) stays at `left` or above."""
    low, high = 0, units
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(middle) >= left else (low, middle - 1)
    return low


def _without_tokens(config: TrialConfig, bench: Workbench, left: int) -> Outline:
    """Return the outline without the tokens that are used least."""
    use = tokens.use(config.vocabulary)
    if use is None:
        return WHOLE
    base, structure = bench.base, bench.structure(config.units)
    tokenizer = tokenization.tokenizer_json(base.tokenizer)
    rows = base.shape.vocabulary

    def count(gone: int) -> int:
        return count_outlined(base.shape, structure, Outline(tokens=tuple(range(rows - gone))))

    asked = math.floor(config.vocabulary.options.remove * rows)
    keep = rows - min(asked, _most(count, asked, left))
    if keep == rows:
        return WHOLE
    corpora = use.corpora or (config.calibration.corpus,)
    counts = bench.token_use(corpora, use.tokens)
    return Outline(tokens=vocabulary.choose(counts, keep, tokenizer, named_tokens(base)))


def _without_dimensions(
    config: TrialConfig, bench: Workbench, outline: Outline, left: int, train: Train | None
) -> Outline:
    """Return `outline` without the hidden dimensions of the lowest scores; the heads must divide what stays."""
    base, structure = bench.base, bench.structure(config.units)
    total, heads = base.shape.hidden, base.shape.heads

    def count(gone: int) -> int:
        return count_outlined(base.shape, structure, dataclasses.replace(outline, hidden=tuple(range(total - gone))))

    asked = math.floor(config.hidden.options.remove * total)
    gone = min(asked, _most(count, asked, left)) // heads * heads
    if not gone:
        return outline
    statistics = bench.statistics(structure, config.calibration, config.units, hidden.needs(config.hidden))
    context = HiddenContext(structure=structure, weights=base.weights, statistics=statistics, train=train)
    return dataclasses.replace(outline, hidden=hidden.kept(context, config.hidden, total - gone))


def costs(bench: Workbench, structure: ModelStructure, outline: Outline) -> dict[str, int]:
    """Return the number of parameters that leave with each sublayer, its norm among them, by its path."""
    whole = count_outlined(bench.base.shape, structure, outline)
    without = {path: dataclasses.replace(outline, gone=(path,)) for path in structure.norms}
    return {path: whole - count_outlined(bench.base.shape, structure, o) for path, o in without.items()}


def _loss(config: TrialConfig, bench: Workbench) -> Callable[[frozenset[str]], float]:
    """Return the loss of the dense model on the calibration sample without some sublayers.

    The greedy orders of several budgets begin alike, so what was computed once is kept on disk.
    """
    options = config.depth.options
    used = min(config.calibration.samples, options.sequences) if isinstance(options, LossOptions) else 1
    sample = dataclasses.replace(config.calibration, samples=used)  # the first sequences: samples are nested

    @functools.cache
    def made() -> masking.SublayerLoss:
        return masking.SublayerLoss(bench.dense(), bench.sample_tokens(sample))

    key = bench.sample_key(sample)
    return LossBook(bench.cache / "losses" / f"{key}.jsonl", lambda gone: made()(gone))


def _without_layers(config: TrialConfig, bench: Workbench, outline: Outline, left: int) -> Outline:
    """Return `outline` without the sublayers that the depth rule gives up."""
    if config.depth.type == "none":
        return outline
    structure = bench.structure(config.units)
    statistics = bench.statistics(structure, config.calibration, config.units, depth.needs(config.depth))
    room = count_outlined(bench.base.shape, structure, outline) - left
    context = DepthContext(
        layers=structure.layers,
        costs=costs(bench, structure, outline),
        room=room,
        share_removed=(structure.parameters - left) / (structure.parameters - structure.embedding_parameters),
        statistics=statistics,
        loss=_loss(config, bench),
        seed=config.seed,
    )
    gone = depth.choose(context, config.depth)
    order = {path: index for index, path in enumerate(structure.norms)}
    return dataclasses.replace(outline, gone=tuple(sorted(gone, key=order.__getitem__)))
