"""A dense model in which some units, or whole sublayers, add nothing for a while, and its loss: no weight is touched.

Shape letters: N sequences, T tokens of a sequence, D hidden size, L layers, S states, U units of a group, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from adasearch.errors import DataError, TrialError
from adasearch.pruning.structure import ModelStructure

Kind = Literal["cross_entropy", "divergence"]
"""Of a loss: mean next-token cross-entropy, or mean KL(p || q) of the dense model's prediction p and this one's q."""

# Tokens of a forward pass and bytes of float32 logits at a time: a CPU's caches, and room on a device.
_CPU_TOKENS, _DEVICE_TOKENS = 1024, 8192
_CPU_LOGITS, _DEVICE_LOGITS = 2**24, 2**29
_STATE_BYTES = 2**29
"""Memory for the states from which a changed model is run on, unless told."""


@contextlib.contextmanager
def masked(
    model: nn.Module,
    structure: ModelStructure,
    masks: Mapping[str, Tensor],
    skipped: frozenset[str] = frozenset(),
) -> Iterator[None]:
    """Make units and sublayers of a dense model add nothing to the residual stream for a while.

    Args:
        model: in the layout of transformers, with a linear layer for each `group.output`.
        structure: the groups of that model.
        masks: what stays (U bools) by group name; groups left out stay whole. A bias of the output projection stays.
        skipped: module paths of sublayers, such as ``model.layers.3.mlp``, whose whole output is zero; they cost
            nothing.
    """
    with contextlib.ExitStack() as stack:
        for name, mask in masks.items():
            group = structure.group(name)
            assert mask.shape == (group.units,), f"the mask of {name} must have {group.units} units"
            factor = mask.repeat_interleave(group.output_block)
            hook = _masking(factor.to(model.get_submodule(group.output).weight))  # type: ignore[arg-type]
            stack.callback(model.get_submodule(group.output).register_forward_pre_hook(hook).remove)
        stack.enter_context(_skipping(model, skipped))
        yield


def _masking(factor: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor]]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        return (inputs[0] * factor,)

    return hook


def _nothing(x: Tensor | None = None, *_: Any, hidden_states: Tensor | None = None, **__: Any) -> Tensor:
    given = hidden_states if x is None else x
    assert given is not None, "a sublayer is called with hidden states"
    return torch.zeros_like(given)


def _no_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return _nothing(*args, **kwargs), None


@contextlib.contextmanager
def _skipping(model: nn.Module, paths: frozenset[str]) -> Iterator[None]:
    """Replace the forward of sublayers: a hook could change what comes out, not save the work."""
    modules = [(path, model.get_submodule(path)) for path in sorted(paths)]
    try:
        for path, module in modules:
            assert "forward" not in vars(module), f"{path} is skipped already"
            module.forward = _no_attention if path.endswith(".self_attn") else _nothing
        yield
    finally:
        for _, module in modules:
            vars(module).pop("forward", None)


def _check_tokens(tokens: Tensor) -> None:
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DataError(f"a loss must be taken over at least 1 sequence of 2 tokens, given shape {tuple(tokens.shape)}")


def _batches(tokens: Tensor, device: torch.device, token_budget: int | None) -> tuple[Tensor, ...]:
    budget = token_budget or (_CPU_TOKENS if device.type == "cpu" else _DEVICE_TOKENS)
    return torch.split(tokens.to(device), max(1, budget // tokens.shape[1]))


def _summed(head: nn.Linear, states: Tensor, tokens: Tensor, dense: Tensor | None) -> float:
    """Return the sum over the next-token predictions of one batch of their cross-entropy or divergence, in nats.

    Args:
        head: output projection, D to V.
        states: B × T × D last hidden states.
        tokens: B × T.
        dense: B × T × D of the dense model; None takes the cross-entropy.
    """
    room = _CPU_LOGITS if states.device.type == "cpu" else _DEVICE_LOGITS
    rows = max(1, room // (4 * head.out_features))
    targets = torch.split(tokens[:, 1:].flatten(), rows)
    given = torch.split(states[:, :-1].flatten(0, 1), rows)
    expected = given if dense is None else torch.split(dense[:, :-1].flatten(0, 1), rows)
    total = 0.0
    for x, y, z in zip(given, targets, expected, strict=True):
        if dense is None:
            total += float(functional.cross_entropy(_wide(head(x)), y, reduction="sum"))
        else:
            q, p = (_wide(head(s)).log_softmax(-1) for s in (x, z))
            total += float(functional.kl_div(q, p, reduction="sum", log_target=True))
    return total


def _wide(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype.itemsize < 4 else logits


def _mean(total: float, tokens: Tensor) -> float:
    mean = total / (tokens.shape[0] * (tokens.shape[1] - 1))
    return mean if math.isfinite(mean) else math.inf


# no_grad, not inference mode: what a module may keep of its first forward must not bar it from training
@torch.no_grad()
def last_states(model: nn.Module, tokens: Tensor, *, token_budget: int | None = None) -> Tensor:
    """Return the last hidden states (N × T × D) of a causal language model on N × T tokens."""
    device = next(model.parameters()).device
    parts = [_last(model, part) for part in _batches(tokens, device, token_budget)]
    return torch.cat(parts)


def _last(model: nn.Module, batch: Tensor) -> Tensor:
    states: Tensor = model.base_model(input_ids=batch, use_cache=False).last_hidden_state  # type: ignore[operator]
    return states


@torch.no_grad()
def loss(model: nn.Module, tokens: Tensor, *, dense: Tensor | None = None, token_budget: int | None = None) -> float:
    """Return the loss of a model as it is now, in nats per token; infinite where the model overflows.

    Args:
        model: causal language model in the layout of transformers, in eval mode.
        tokens: N × T token ids.
        dense: what `last_states` gave for the dense model (N × T × D): the loss is then the mean over positions of
            KL(p || q), p the prediction of the dense model; None takes the mean next-token cross-entropy.
        token_budget: greatest number of tokens in one batch, one sequence always fits; None suits the device.

    Raises:
        DataError: there is no sequence, or sequences are too short to have a next token.
    """
    _check_tokens(tokens)
    batches = _batches(tokens, next(model.parameters()).device, token_budget)
    references = [None] * len(batches) if dense is None else torch.split(dense, len(batches[0]))
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    sums = [_summed(head, _last(model, b), b, d) for b, d in zip(batches, references, strict=True)]
    return _mean(math.fsum(sums), tokens)


@dataclass(slots=True, kw_only=True, eq=False)
class _Batch:
    """One batch on its way through the layers.

    Args:
        tokens: B × T.
        keywords: what each layer is called with beside the states: masks, rotations.
        states: B × T × D before some layers, by their index, in the model without the sublayers of the last call.
        dense: last hidden states of the dense model, where the loss is a divergence.
    """

    tokens: Tensor
    keywords: list[dict[str, Any]]
    states: dict[int, Tensor]
    dense: Tensor | None = None


class SublayerLoss:
    """The loss of one model without some of its sublayers, as a function of which; the model itself stays whole.

    The residual stream of the last call is kept before some layers, and a call runs the model from the first layer at
    which its sublayers differ from those of the call before. Sets that agree in their lowest layers should therefore
    be asked for one after the other, as by trying single removals from the top of the model to its bottom.

    Args:
        model: causal language model in the layout of transformers, `base_model` with `layers` and `norm`, in eval mode.
        tokens: N × T token ids.
        kind: what the loss is.
        token_budget: greatest number of tokens in one batch, one sequence always fits; None suits the device.
        max_bytes: that the kept states may take; with less room fewer layers keep theirs, the embeddings always do.

    Raises:
        DataError: there is no sequence, or sequences are too short to have a next token.
        TrialError: the states of the dense model are not finite (kind ``nan``).
    """

    def __init__(
        self,
        model: nn.Module,
        tokens: Tensor,
        *,
        kind: Kind = "cross_entropy",
        token_budget: int | None = None,
        max_bytes: int = _STATE_BYTES,
    ) -> None:
        _check_tokens(tokens)
        self._model, self._tokens = model, tokens
        core: Any = model.base_model
        self._layers: list[nn.Module] = list(core.layers)
        self._norm: nn.Module = core.norm
        names = {module: name for name, module in model.named_modules()}
        self._places = {f"{names[m]}.{part}": i for i, m in enumerate(self._layers) for part in ("self_attn", "mlp")}
        size = tokens.numel() * model.config.hidden_size * next(model.parameters()).element_size()  # type: ignore[union-attr,operator]
        self._stride = max(1, math.ceil(len(self._layers) * size / max(1, max_bytes)))
        self._batches = [
            self._entered(part, kind) for part in _batches(tokens, next(model.parameters()).device, token_budget)
        ]
        self._last: frozenset[str] | None = None
        self._known: dict[frozenset[str], float] = {}

    @torch.no_grad()
    def _entered(self, batch: Tensor, kind: Kind) -> _Batch:
        """Return a batch before the first layer, with what transformers hands to each of the layers."""
        keywords: list[dict[str, Any]] = []
        first: list[Tensor] = []

        def watch(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            given = {key: item for key, item in kwargs.items() if key != "hidden_states"}
            keywords.append(given)
            if not first:
                first.append(args[0] if args else kwargs["hidden_states"])

        with contextlib.ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_pre_hook(watch, with_kwargs=True).remove)
            last = _last(self._model, batch)
        if not bool(torch.isfinite(last).all()):
            raise TrialError("nan", "the hidden states of the dense model must be finite, they are not", "depth")
        dense = last if kind == "divergence" else None
        return _Batch(tokens=batch, keywords=keywords, states={0: first[0]}, dense=dense)

    @torch.no_grad()
    def __call__(self, skipped: frozenset[str]) -> float:
        """Return the loss without the sublayers `skipped` (module paths), in nats per token; infinite on overflow."""
        if skipped not in self._known:
            unknown = sorted(skipped - set(self._places))
            assert not unknown, f"no sublayers of this model: {unknown}"
            start = self._start(skipped)
            self._last = None  # what is kept fits neither set until all batches are through
            head: nn.Linear = self._model.get_output_embeddings()  # type: ignore[operator]
            with _skipping(self._model, skipped):
                sums = [
                    _summed(head, self._through(batch, start, skipped), batch.tokens, batch.dense)
                    for batch in self._batches
                ]
            self._last = skipped
            self._known[skipped] = _mean(math.fsum(sums), self._tokens)
        return self._known[skipped]

    def _start(self, skipped: frozenset[str]) -> int:
        """Return the highest layer before which states are kept that are those of the model without `skipped`."""
        if self._last is None:
            return 0
        same = min((self._places[path] for path in skipped ^ self._last), default=len(self._layers) - 1)
        return same // self._stride * self._stride

    def _through(self, batch: _Batch, start: int, skipped: frozenset[str]) -> Tensor:
        """Return the last hidden states (B × T × D) of a batch that is run from the layer `start`."""
        gone = [self._places[path] for path in skipped]
        x = batch.states[start]
        for index in range(start, len(self._layers)):
            if index % self._stride == 0:
                batch.states[index] = x
            if gone.count(index) < 2:  # without attention and MLP a layer passes on what it gets
                out = self._layers[index](x, **batch.keywords[index])
                x = out if isinstance(out, Tensor) else out[0]
        last: Tensor = self._norm(x)
        return last
