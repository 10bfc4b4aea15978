"""A calibration sample through the model: statistics gathered by hooks, one accumulator per family and place.

The model is shared by the trials of a worker, so every hook, gradient and flag set here is undone, whatever happens.

What it costs, over one plain pass of the same tokens through the same model (forward with logits; forward and backward
with the gradients of all weights), is measured by ``benchmarks/statistics.py``; the promise is 1.2 times. It does not
hold for ``spsa_sum``, which sends each sequence through the model twice with as many products again (see `probes`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adasearch.errors import DataError, TrialError
from adasearch.pruning import accumulators, probes, products, statistics
from adasearch.pruning.accumulators import GradientSum, SpsaSum, SquareSum
from adasearch.pruning.statistics import ACCUMULATORS, FAMILIES, SUMS, Statistics
from adasearch.pruning.structure import ModelStructure, Slice

# A batch this large keeps two cores busy; a larger one falls out of their caches and holds more activations.
_CPU_TOKENS, _DEVICE_TOKENS = 512, 8192
# Bytes of float32 logits at a time: blocks above 32 MiB are handed back to the system and faulted in again on a CPU.
_CPU_LOGITS, _DEVICE_LOGITS = 2**24, 2**29
_EAGER_LENGTH = 256
"""Longest sequence for which plain matrix products beat the fused attention's backward on a CPU (measured)."""

Accumulated = dict[tuple[str, str], Any]
"""Accumulators by family and place."""
_Watch = contextlib.AbstractContextManager[None]


def collect(
    model: nn.Module,
    structure: ModelStructure,
    tokens: Tensor,
    needs: frozenset[str],
    *,
    token_budget: int | None = None,
) -> Statistics:
    """Return the statistics in `needs` (of `FAMILIES`) of a dense model on a calibration sample.

    Arguments and errors as in `accumulate`, whose families these are read from.
    """
    assert needs <= FAMILIES, f"unknown statistics {sorted(needs - FAMILIES)}"
    families = frozenset[str]().union(*map(statistics.merged_from, needs))
    merged = accumulate(model, structure, tokens, families, token_budget=token_budget)
    return read(merged, needs, structure, dict(model.named_parameters()), len(tokens))


def accumulate(
    model: nn.Module,
    structure: ModelStructure,
    tokens: Tensor,
    families: frozenset[str],
    *,
    token_budget: int | None = None,
) -> Statistics:
    """Return families that merge (of `ACCUMULATORS`) of a dense model on a calibration sample.

    Sequences go through the model in batches of at most `token_budget` tokens. The result does not depend on it, up to
    rounding. Sums of gradients are held in float32, one or two numbers per weight; everything else stays small.

    Args:
        model: causal language model in the layout of transformers: `base_model`, `get_output_embeddings`.
        structure: the groups of that model.
        tokens: N × T token ids.
        families: what to accumulate.
        token_budget: greatest number of tokens in one batch, one sequence always fits; None suits the device.

    Raises:
        DataError: there is no sequence, or sequences are too short to have a next token.
        TrialError: a statistic is not finite (kind ``nan``).
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DataError(
            f"a calibration sample must be at least 1 sequence of 2 tokens, given shape {tuple(tokens.shape)}"
        )
    device = next(model.parameters()).device
    backward = any(ACCUMULATORS[f].source == "gradient" for f in families)

    def run() -> None:
        for part in batches(tokens.to(device), token_budget):
            if backward:
                _backward(model, part)
            else:
                with torch.no_grad():
                    model.base_model(input_ids=part, use_cache=False)  # type: ignore[operator]

    with contextlib.ExitStack() as stack:
        stack.enter_context(_reading(model))
        if backward:
            stack.enter_context(_short_attention(model, tokens.shape[1]))
        found = observe(model, structure, families, run, tokens.numel())
        if "spsa_sum" not in families:
            return found
        # In passes of its own: they are not those of the model as it is.
        members = _members(structure, dict(model.named_parameters()))
        estimates = probes.estimates(model, members, tokens.to(device), _logit_rows(model))
    tensors: dict[str, Tensor] = {}
    for name, total in estimates.items():
        tensors |= statistics.tensors_of("spsa_sum", name, SpsaSum(count=0, total=total))
    _check_finite(tensors)
    return Statistics(tokens=found.tokens, tensors={**found.tensors, **tensors})


def batches(tokens: Tensor, token_budget: int | None = None) -> tuple[Tensor, ...]:
    """Return the sequences of `tokens` (N × T) in batches of at most `token_budget` tokens, one sequence at least.

    None suits the device that `tokens` are on.
    """
    budget = token_budget or (_CPU_TOKENS if tokens.device.type == "cpu" else _DEVICE_TOKENS)
    return torch.split(tokens, max(1, budget // tokens.shape[1]))


def observe(
    model: nn.Module, structure: ModelStructure, families: frozenset[str], run: Callable[[], None], tokens: int
) -> Statistics:
    """Return families that merge (of `ACCUMULATORS`) of what `run` sends through `model`.

    Args:
        model: as in `accumulate`, or as far as `run` goes through it.
        structure: the groups that are looked at.
        families: what to accumulate.
        run: sends all of a sample through the model, or through the part of it that holds the groups; not called where
            there is nothing to accumulate.
        tokens: number of tokens in the sample.

    Raises:
        TrialError: a statistic is not finite (kind ``nan``).
    """
    held: Accumulated = {}
    with contextlib.ExitStack() as stack:
        for source, watch in _WATCHES.items():
            wanted = {f for f in families if ACCUMULATORS[f].source == source}
            if wanted:
                stack.enter_context(watch(model, structure, wanted, held))
        if any(ACCUMULATORS[f].source in _WATCHES for f in families):
            run()
    tensors: dict[str, Tensor] = {}
    for family, place in list(held):
        tensors |= statistics.tensors_of(family, place, held.pop((family, place)))
    _check_finite(tensors)
    return Statistics(tokens=tokens, tensors=tensors)


def read(
    merged: Statistics, needs: frozenset[str], structure: ModelStructure, weights: Mapping[str, Tensor], sequences: int
) -> Statistics:
    """Return the families in `needs` of a sample of `sequences` sequences, given those that they are read from."""
    parts = {need: merged.only(need).tensors for need in needs - set(SUMS)}
    tensors = {key: item for part in parts.values() for key, item in part.items()}
    if derived := needs & set(SUMS):
        for name, member in _members(structure, weights).items():
            total = merged.value("gradient_sum", name).total
            squares = merged.value("square_sum", name).squares if "fisher" in derived else None
            weight = weights[name].detach().to(total.device)
            for key, row in accumulators.gradient_rows(total, squares, weight, member.dim, sequences).items():
                family, _, kind = key.partition("/")
                if family in derived:
                    tensors[f"{family}/{name}/{kind}"] = row
    return Statistics(tokens=merged.tokens, tensors=tensors)


@contextlib.contextmanager
def _reading(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off for a while, and the gradients of all parameters."""
    modes = {module: module.training for module in model.modules()}
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    try:
        model.requires_grad_(requires_grad=False)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags:
            parameter.requires_grad = flag


@contextlib.contextmanager
def _short_attention(model: nn.Module, length: int) -> Iterator[None]:
    """Use plain attention for a while where its backward is the faster one: short sequences on a CPU.

    Its softmax is computed in float32, so that a float64 model stays with what it has.
    """
    causal: Any = model
    before, first = causal.config._attn_implementation, next(model.parameters())
    short = before == "sdpa" and length <= _EAGER_LENGTH and first.device.type == "cpu" and first.dtype.itemsize <= 4
    try:
        if short:
            causal.set_attn_implementation("eager")
        yield
    finally:
        if short:
            causal.set_attn_implementation(before)


def _extend(held: Accumulated, family: str, place: str, *inputs: Tensor) -> None:
    seen = held.get((family, place))
    held[family, place] = seen.extended(*inputs) if seen else ACCUMULATORS[family].of(*inputs)


@contextlib.contextmanager
def _reads(
    model: nn.Module, modules: Mapping[str, str], families: set[str], held: Accumulated, *, whole: bool = False
) -> Iterator[None]:
    """Accumulate what modules read, by place: token by token (T × F), or in `whole` sequences (B × T × F)."""

    def watch(place: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach()
            for family in families:
                _extend(held, family, place, x if whole else x.flatten(0, -2))

        return hook

    with contextlib.ExitStack() as stack:
        for place, module in modules.items():
            stack.callback(model.get_submodule(module).register_forward_pre_hook(watch(place)).remove)
        yield


def _outputs(structure: ModelStructure) -> dict[str, str]:
    return {group.output: group.output for group in structure.groups}


def _features(model: nn.Module, structure: ModelStructure, families: set[str], held: Accumulated) -> _Watch:
    """Accumulate what each output projection reads, by its name."""
    return _reads(model, _outputs(structure), families, held)


def _sequences(model: nn.Module, structure: ModelStructure, families: set[str], held: Accumulated) -> _Watch:
    """Accumulate the same in whole sequences."""
    return _reads(model, _outputs(structure), families, held, whole=True)


def _inputs(model: nn.Module, structure: ModelStructure, families: set[str], held: Accumulated) -> _Watch:
    """Accumulate what each group reads, by its name: the input of the first of its matrices whose rows are cut."""
    # Later ones are overwritten by earlier ones.
    first = {g.name: s.parameter for g in structure.groups for s in reversed(g.slices) if s.dim == 0}
    return _reads(model, {name: p.rpartition(".")[0] for name, p in first.items()}, families, held)


@contextlib.contextmanager
def _stream(
    model: nn.Module,
    structure: ModelStructure,
    families: set[str],
    held: Accumulated,
) -> Iterator[None]:
    """Accumulate the residual stream before and after each decoder layer, its attention and its MLP, by module path.

    Layers are those of every family so far: attention's output is added to what the layer read, the MLP's to that.
    """

    def watch(path: str) -> Iterator[Any]:
        layer = model.get_submodule(path)
        state: dict[str, Tensor] = {}

        def entered(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            state["before"] = (args[0] if args else kwargs["hidden_states"]).detach()

        def attended(_: nn.Module, __: Any, output: tuple[Tensor, ...]) -> None:
            state["between"] = state["before"] + output[0].detach()

        def left(_: nn.Module, __: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            after = (output if isinstance(output, Tensor) else output[0]).detach()
            before, between = state.pop("before"), state.pop("between")
            places = {path: (before, after), f"{path}.self_attn": (before, between), f"{path}.mlp": (between, after)}
            for place, pair in places.items():
                for family in families:
                    _extend(held, family, place, *(x.flatten(0, -2) for x in pair))

        yield layer.register_forward_pre_hook(entered, with_kwargs=True)
        yield layer.get_submodule("self_attn").register_forward_hook(attended)
        yield layer.register_forward_hook(left)

    with contextlib.ExitStack() as stack:
        for path in _layer_paths(structure):
            for handle in watch(path):
                stack.callback(handle.remove)
        yield


@contextlib.contextmanager
def _boundaries(model: nn.Module, structure: ModelStructure, families: set[str], held: Accumulated) -> Iterator[None]:
    """Accumulate the residual stream at all layer boundaries at once, a few hundred tokens at a time."""
    seen: list[Tensor] = []

    def entered(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).detach().flatten(0, -2))

    def left(_: nn.Module, __: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        seen.append((output if isinstance(output, Tensor) else output[0]).detach().flatten(0, -2))
        for part in zip(*(torch.split(x, _CPU_TOKENS) for x in seen), strict=True):
            for family in families:
                _extend(held, family, statistics.STREAM, torch.stack(part, dim=1))
        seen.clear()

    layers = [model.get_submodule(path) for path in _layer_paths(structure)]
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_pre_hook(entered, with_kwargs=True).remove)
        stack.callback(layers[-1].register_forward_hook(left).remove)
        yield


def _layer_paths(structure: ModelStructure) -> list[str]:
    return list(dict.fromkeys(group.name.rpartition(".")[0] for group in structure.groups))


def _members(structure: ModelStructure, weights: Mapping[str, Tensor]) -> dict[str, Slice]:
    """Return the cut matrices by parameter name; biases and norms carry no importance of their own."""
    slices = [s for group in structure.groups for s in group.slices]
    return {s.parameter: s for s in slices if weights[s.parameter].ndim == 2}


@contextlib.contextmanager
def _gradients(model: nn.Module, structure: ModelStructure, families: set[str], held: Accumulated) -> Iterator[None]:
    """Sum the gradients of the cut matrices while batches run backward.

    No parameter requires a gradient: that of a linear layer's weight is the product of what came in and the gradient
    of what went out, taken here so that it is summed in float32, and sequence by sequence where squares are needed,
    while the model itself sees whole batches. The token embeddings are made to start the backward pass.
    """

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        zero = torch.zeros_like(model.get_parameter(name), dtype=torch.float32, requires_grad=False)
        squares = torch.zeros_like(zero) if "square_sum" in families else None
        sums: dict[str, Any] = {"gradient_sum": GradientSum(count=0, total=zero)}
        if squares is not None:
            sums["square_sum"] = SquareSum(count=0, squares=squares)
        held.update({(family, name): sums[family] for family in families})

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach()

            def reached(gradient: Tensor) -> None:
                if squares is None:
                    zero.add_(products.product(gradient.flatten(0, 1), x.flatten(0, 1)))
                else:
                    products.add_products(zero, squares, gradient, x)

            output.register_hook(reached)  # type: ignore[no-untyped-call]

        return hook

    def start(_: nn.Module, __: Any, output: Tensor) -> None:
        output.requires_grad_()

    with contextlib.ExitStack() as stack:
        handle = model.get_input_embeddings().register_forward_hook(start)  # type: ignore[operator]
        stack.callback(handle.remove)
        for name in _members(structure, dict(model.named_parameters())):
            module = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(module, nn.Linear), f"{name} must be the weight of a linear layer"
            stack.callback(module.register_forward_hook(watch(name)).remove)
        yield


_WATCHES: dict[str, Callable[..., _Watch]] = {
    "features": _features,
    "sequences": _sequences,
    "inputs": _inputs,
    "stream": _stream,
    "boundaries": _boundaries,
    "gradient": _gradients,
}


def _logit_rows(model: nn.Module) -> int:
    """Return the number of tokens at a time whose logits there is room for."""
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    room = _CPU_LOGITS if head.weight.device.type == "cpu" else _DEVICE_LOGITS
    return max(1, room // (4 * head.out_features))


def _backward(model: nn.Module, batch: Tensor) -> None:
    """Run the sum over the sequences of `batch` (B × T) of their mean next-token cross-entropy backward.

    The head is run on some tokens at a time, since logits over the whole vocabulary would outweigh the model. With p
    the softmax and t the one-hot target of a token, the gradient on its logits is p - t; the loss itself is not needed.
    """
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    rows = _logit_rows(model)
    with torch.enable_grad():
        hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state  # type: ignore[operator]
        states = hidden[:, :-1].flatten(0, 1)
    gradients = []
    with torch.no_grad():
        for x, y in zip(torch.split(states.detach(), rows), torch.split(batch[:, 1:].flatten(), rows), strict=True):
            excess = head(x).softmax(-1, dtype=torch.float32 if x.dtype.itemsize < 4 else x.dtype)
            excess[torch.arange(len(y), device=y.device), y] -= 1.0
            gradients.append(excess.to(x.dtype) @ head.weight)
    torch.autograd.backward(states, torch.cat(gradients) / (batch.shape[1] - 1))


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        # The sum is one pass over a large tensor; only a sum that overflows needs the second, with its copy.
        if not bool(torch.isfinite(tensor.sum())) and not bool(torch.isfinite(tensor).all()):
            raise TrialError("nan", f"statistics must be finite, {name} is not", "calibrate")
