"""What a model costs to keep and to run: parameters and memory by counting, latency by measuring."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from adasearch.documents import value
from adasearch.pruning.structure import WHOLE

if TYPE_CHECKING:
    from adasearch.pruning.plan import PruningPlan
    from adasearch.pruning.structure import ModelShape, ModelStructure
    from adasearch.workbench import Workbench

LEAST_PAIRS, MOST_PAIRS = 5, 15
PAIRS_SECONDS = 2.0
"""Pairs of forward passes that a latency is taken of; after the least number of them, none begins after this time."""
_ALIGNMENT = 64
_KEYS_AND_VALUES = (".k_proj.weight", ".v_proj.weight")


@value
class Costs:
    """Costs by name: figures (a count, seconds, bytes), fractions of the dense model's, standard errors of those."""

    figures: dict[str, float]
    shares: dict[str, float]
    spreads: dict[str, float]


@value
class Latency:
    """How long a model takes: median seconds, as a fraction of another's, and the standard error of the fraction."""

    seconds: float
    share: float
    spread: float


def cache_elements(shape: ModelShape, structure: ModelStructure, keep: Mapping[str, Sequence[int]]) -> int:
    """Return how many numbers the key-value cache of a cut model holds for each token, over all layers.

    Args:
        shape: of the model before its widths are cut.
        structure: of the same.
        keep: units that stay by group name, as in a plan; a group left out stays whole.
    """
    rows = {name: dims[0] for name, dims in shape.shapes.items() if name.endswith(_KEYS_AND_VALUES)}
    for group in structure.groups:
        gone = group.units - len(keep.get(group.name, range(group.units)))
        for piece in group.slices:
            if piece.parameter in rows and piece.dim == 0:
                rows[piece.parameter] -= gone * piece.block
    return sum(rows.values())


def memory(parameters: int, elements: int, tokens: int, itemsize: int) -> int:
    """Return the bytes of a model's weights and of its key-value cache for one sequence.

    Activations and what libraries take are not in it, and no layer's cache is cut short by a sliding window.

    Args:
        parameters: of the model.
        elements: of its cache, for each token.
        tokens: of the sequence.
        itemsize: bytes of one number, of weights and cache alike.
    """
    return itemsize * (parameters + tokens * elements)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `work` takes on `device`, until all of it is done there."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def pass_seconds(model: Any, ids: torch.Tensor) -> float:
    """Return the seconds of one forward pass over a sequence (1 × T), up to the logits of the last token.

    That is what generation needs. The last state is handed to the output head as a row of its own: as a slice of all
    states, with their strides, a head that wants no gradient takes 25 times as long in bfloat16 on a CPU, whatever the
    model, because torch copies its whole weight first.
    """

    def run() -> None:
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        model.lm_head(states[0, -1][None, None])

    return seconds_of(run, ids.device)


def in_turns(own: Callable[[], float], other: Callable[[], float], least: int, most: int) -> np.ndarray:
    """Return the seconds of two works that take turns (pairs × 2), once both have been done for nothing.

    Kernels and memory are made ready by the first time. Who goes first changes, so that a drift favours neither.

    Args:
        own: does one of them and returns its seconds.
        other: the same of the other.
        least: pairs.
        most: pairs; after the least number, none begins later than `PAIRS_SECONDS` after the first.
    """
    pairs: list[tuple[float, float]] = []
    begun = time.perf_counter()
    for work in (own, other):
        work()
    while len(pairs) < least or (len(pairs) < most and time.perf_counter() - begun < PAIRS_SECONDS):
        if len(pairs) % 2:
            late = other()
            pairs.append((own(), late))
        else:
            pairs.append((own(), other()))
    return np.array(pairs)


def aligned(model: nn.Module) -> nn.Module:
    """Return a model that shares the parameters of `model`, but for copies of those that lie at odd addresses.

    Weights are mapped from files, where a tensor begins at any multiple of 8 bytes; the one-line product of the output
    head takes 35 times as long there in bfloat16 on a CPU (SmolLM2-135M: 860 ms, else 22 ms). That is a matter of how
    a model was opened, not of its shape, and a dense model is opened otherwise than a cut one.

    Copies want gradients where their originals do: torch takes another way through a product of one row by a weight
    that wants none (see `pass_seconds`), and two models are only comparable on the same one.
    """
    memo: dict[int, Any] = {}
    with torch.inference_mode(mode=False):  # in which copies want none, whatever they are told
        for parameter in model.parameters():
            straight = parameter.data_ptr() % _ALIGNMENT == 0
            copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
            memo[id(parameter)] = parameter if straight else copied
        found: nn.Module = copy.deepcopy(model, memo)
    return found


def median_error(values: np.ndarray) -> float:
    """Return the standard error of the median of `values` (n), from their median absolute deviation.

    1.4826 MAD estimates the standard deviation of normal values, and their median errs sqrt(pi / 2) times as much as
    their mean (Huber 1981, section 5.1): one pass that something disturbed moves it little.
    """
    deviation = float(np.median(np.abs(values - np.median(values))))
    return math.sqrt(math.pi / 2) * 1.4826 * deviation / math.sqrt(len(values))


def latency(model: Any, other: Any, tokens: int) -> Latency:
    """Return how long a forward pass of `model` over one sequence takes, alone and beside `other`.

    The two take turns, and the share is the median of the ratios of neighbours, because whatever else the machine does
    (other workers that compute or read memory, a clock that falls with heat) disturbs the seconds of both alike: the
    share is what to compare, between workers and machines too; the seconds are those of this machine under this load.
    What disturbs the share is load that comes and goes within a pair: more trials at the same time make it noisier.
    Threads count too: it is the share at this worker's number of threads.

    Args:
        model: causal language model in the layout of transformers, ready to be used.
        other: another, on the same device; may be the same.
        tokens: length of the sequence.
    """
    vocabulary = min(m.get_input_embeddings().weight.shape[0] for m in (model, other))
    ids = (torch.arange(tokens, device=model.lm_head.weight.device) % vocabulary)[None]
    with torch.inference_mode():
        times = in_turns(
            lambda: pass_seconds(model, ids), lambda: pass_seconds(other, ids), least=LEAST_PAIRS, most=MOST_PAIRS
        )
    ratios = times[:, 0] / times[:, 1]
    return Latency(seconds=float(np.median(times[:, 0])), share=float(np.median(ratios)), spread=median_error(ratios))


def measured(bench: Workbench, model: Any, structure: ModelStructure, plan: PruningPlan | None) -> Costs:
    """Return those costs of a model that the study's objective asks for.

    Args:
        bench: holds the dense model.
        model: as it is scored.
        structure: that it was cut from; its dense one for the dense model.
        plan: of the cut; None for the dense model.
    """
    asked, figures, shares, spreads = bench.study.objective, {}, {}, {}
    whole = bench.structure()
    parameters = whole.parameters if plan is None else plan.parameters
    if "parameters" in asked.costs:
        figures["parameters"], shares["parameters"] = float(parameters), parameters / whole.parameters
    if "latency" in asked.costs:
        found = latency(aligned(model), aligned(bench.dense()), asked.latency_tokens)
        figures["latency"] = found.seconds
        shares["latency"], spreads["latency"] = (found.share, found.spread) if plan else (1.0, 0.0)
    if "memory" in asked.costs:
        tokens, size = asked.latency_tokens, bench.base.dtype.itemsize
        shape = bench.outlined(structure.outline).shape
        own = memory(parameters, cache_elements(shape, structure, plan.keep if plan else {}), tokens, size)
        of_dense = cache_elements(bench.outlined(WHOLE).shape, whole, {})
        figures["memory"], shares["memory"] = float(own), own / memory(whole.parameters, of_dense, tokens, size)
    return Costs(figures=figures, shares=shares, spreads=spreads)
