"""Gradients from forward passes alone: simultaneous perturbation (SPSA, Spall 1992; MINI-LLM, arXiv 2407.11681).

A probe z is a random sign for every element of all cut matrices W at once. With L the loss of one sequence,

    g ~ (L(W + eps z) - L(W - eps z)) / (2 eps) * z,

whose mean over z is the gradient up to O(eps^2). Each sequence of a sample has one probe of its own, seeded by its
tokens: estimates do not depend on batches, and those of nested samples add up.

What it is worth: a probe measures one number, the slope along z. The variance of an estimated element is the sum of
the squares of all other elements' gradients, so with P elements and N sequences of one gradient the estimate's cosine
with it is about 1 / sqrt(1 + P / N). For a language model that is a few thousandths: what criteria read off such an
estimate is mostly noise that units average over. In half precision the rounding of activations adds to it.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from adasearch.documents import fingerprint

EPSILON = 1e-3
"""Size of a perturbation: that of MeZO (arXiv 2305.17333)."""


def signs(shape: torch.Size, seed: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return random signs, 1 or -1, that follow from `shape` and `seed` alone, on every device and in every dtype."""
    generator = torch.Generator().manual_seed(int(fingerprint(seed), 16) % 2**63)
    packed = torch.randint(256, (-(-shape.numel() // 8),), generator=generator, dtype=torch.uint8).to(device)
    bits = packed[:, None].bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=device)).bitwise_and_(1)
    return bits.flatten()[: shape.numel()].view(shape).to(dtype).mul_(2).sub_(1)


def seed_of(sequence: Tensor) -> str:
    """Return the seed of a sequence's probe (T token ids)."""
    return hashlib.sha256(str(sequence.tolist()).encode()).hexdigest()


def estimates(model: nn.Module, names: Iterable[str], tokens: Tensor, rows: int) -> dict[str, Tensor]:
    """Return the sum over sequences of the estimated gradient of matrices (float32), by parameter name.

    Both losses of a sequence come from one batch of two. No weight is touched: the output of a linear layer gains
    eps x z^T, or loses it. The signs are drawn again wherever they are needed; one matrix's are held at a time.

    Args:
        model: causal language model in the layout of transformers, in evaluation mode.
        names: weights of linear layers.
        tokens: N × T token ids, on the model's device.
        rows: tokens at a time whose logits there is room for.
    """
    weights = {name: model.get_parameter(name) for name in names}
    totals = {name: torch.zeros_like(w, dtype=torch.float32, requires_grad=False) for name, w in weights.items()}
    for sequence in tokens:
        seed = seed_of(sequence)
        with torch.no_grad(), _perturbed(model, weights, seed):
            above, below = _losses(model, sequence.expand(2, -1), rows)
        slope = (above - below) / (2 * EPSILON)
        for name, total in totals.items():
            total.add_(signs(total.shape, f"{seed} {name}", total.device, total.dtype), alpha=slope)
    return totals


@contextlib.contextmanager
def _perturbed(model: nn.Module, weights: dict[str, nn.Parameter], seed: str) -> Iterator[None]:
    """Add eps z to matrices for the first sequence of a batch, and take it off for the second."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            x, weight = inputs[0], weights[name]
            shift = EPSILON * (x @ signs(weight.shape, f"{seed} {name}", x.device, x.dtype).T)
            return torch.stack([output[0] + shift[0], output[1] - shift[1]])

        return hook

    with contextlib.ExitStack() as stack:
        for name in weights:
            module = model.get_submodule(name.removesuffix(".weight"))
            assert isinstance(module, nn.Linear), f"{name} must be the weight of a linear layer"
            stack.callback(module.register_forward_hook(watch(name)).remove)
        yield


def _losses(model: nn.Module, batch: Tensor, rows: int) -> list[float]:
    """Return the mean next-token cross-entropy of each sequence of `batch` (B × T)."""
    head: nn.Linear = model.get_output_embeddings()  # type: ignore[operator]
    hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state  # type: ignore[operator]
    found = []
    for states, targets in zip(hidden[:, :-1], batch[:, 1:], strict=True):
        total = 0.0
        for x, y in zip(torch.split(states, rows), torch.split(targets, rows), strict=True):
            logits = head(x)
            logits = logits.float() if logits.dtype.itemsize < 4 else logits
            # Summed in float64: the two losses differ by a thousandth or less.
            nll = torch.nn.functional.cross_entropy(logits, y, reduction="none")
            total += float(nll.sum(dtype=torch.float64))
        found.append(total / len(targets))
    return found
