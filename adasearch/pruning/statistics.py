"""What a calibration sample says about a model: accumulators that merge, and the frozen `Statistics` they end in.

Families of statistics (the strings that criteria, allocators and compensators name in their `needs`):

- ``moments``: mean and variance of every input feature of each group's output projection, over tokens.
- ``covariance``: the uncentred Gram matrix X^T X of the same features.
- ``votes``: norms of the same features in which every token, or every sequence, has an equal say.
- ``inputs``: mean and variance of what those matrices of each group read whose rows belong to units (q, k, v; gate,
  up).
- ``cosine``: mean over tokens of the cosine between the residual stream before and after each layer and sublayer.
- ``boundaries``: mean over tokens of the cosine and the angle between the residual stream at any two layer boundaries.
- ``gradient``: W * dL/dW of each member matrix, summed per row of its cut dimension, with and without absolute value.
- ``fisher``: the same with the diagonal empirical Fisher information F, the mean over sequences of squared gradients.
- ``gradient_sum``, ``square_sum``: what the last two are read from, element by element.
- ``spsa_sum``: an estimate of the first of them from forward passes alone, one probe a sequence (`probes`).

L is the mean over sequences of the mean next-token cross-entropy: no statistic depends on how sequences are batched.
A need is a family, or ``family@corpus``: the same of a sample of that corpus, as large and drawn alike (`by_corpus`).
A family of `ACCUMULATORS` merges over samples. ``gradient`` and ``fisher`` do not, since they hold absolute values of
sums: they are read from the families of `SUMS`, which do. A new family is one accumulator class and one line there.

Shape letters: T tokens, F features of an output projection, D hidden size, R rows of a parameter along its cut
dimension.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adasearch.errors import DataError
from adasearch.pruning.accumulators import (
    Boundaries,
    Cosine,
    Covariance,
    GradientSum,
    InputMoments,
    Moments,
    SpsaSum,
    SquareSum,
    Votes,
)

ACCUMULATORS: dict[str, Any] = {
    "moments": Moments,
    "covariance": Covariance,
    "votes": Votes,
    "inputs": InputMoments,
    "cosine": Cosine,
    "boundaries": Boundaries,
    "gradient_sum": GradientSum,
    "square_sum": SquareSum,
    "spsa_sum": SpsaSum,
}
"""Class of each family that merges; its fields other than `count` are the tensors kept for one place."""

SUMS: dict[str, frozenset[str]] = {
    "gradient": frozenset({"gradient_sum"}),
    "fisher": frozenset({"gradient_sum", "square_sum"}),
}
"""Families that are read from others, and from which."""

STREAM = "stream"  # the place of what is said of all layers at once
LARGE = frozenset({"spsa_sum"}).union(*SUMS.values())
"""Families of the size of the weights in float32."""

FAMILIES = frozenset({*ACCUMULATORS, *SUMS})
"""What criteria, allocators and compensators may need."""


def merged_from(family: str) -> frozenset[str]:
    """Return the families that merge and that `family` follows from: itself, or those of `SUMS`."""
    return SUMS.get(family, frozenset({family}))


def of_other(families: Iterable[str], corpus: str) -> frozenset[str]:
    """Return needs of the same families on the sample of `corpus`; those that name a corpus already keep theirs."""
    return frozenset(need if "@" in need else f"{need}@{corpus}" for need in families)


def by_corpus(needs: Iterable[str]) -> dict[str, frozenset[str]]:
    """Return the families in `needs` by the corpus that they name; those of the trial's own sample under ``""``.

    >>> by_corpus(["moments", "fisher@stdlib"])
    {'': frozenset({'moments'}), 'stdlib': frozenset({'fisher'})}
    """
    split = [need.partition("@") for need in sorted(needs)]
    corpora = ["", *sorted({corpus for _, _, corpus in split} - {""})]
    return {corpus: frozenset(family for family, _, of in split if of == corpus) for corpus in corpora}


def tensors_of(family: str, place: str, value: Any) -> dict[str, Tensor]:
    """Return what an accumulator holds for one place under the keys of `Statistics`, on the CPU."""
    names = (f.name for f in dataclasses.fields(value) if f.name != "count")
    return {f"{family}/{place}/{name}": getattr(value, name).cpu() for name in names}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Statistics:
    """Statistics of one calibration sample, on the CPU.

    Args:
        tokens: number of tokens that the moments and Gram matrices were taken over.
        tensors: ``family/place/name`` -> tensor, where place is a module (a layer or sublayer for the cosine, an
            output projection for moments and covariance) or a parameter.
        others: statistics of the samples of other corpora, by corpus, where something needs them.
    """

    tokens: int
    tensors: Mapping[str, Tensor]
    others: Mapping[str, Statistics] = field(default_factory=dict)

    @property
    def families(self) -> frozenset[str]:
        """Return the families that are held."""
        return frozenset(key.split("/", 1)[0] for key in self.tensors)

    def value(self, family: str, place: str) -> Any:
        """Return the accumulator of a family of `ACCUMULATORS` at one place."""
        made = ACCUMULATORS[family]
        names = [f.name for f in dataclasses.fields(made) if f.name != "count"]
        return made(count=self.tokens, **{name: self.tensors[f"{family}/{place}/{name}"] for name in names})

    def moments(self, module: str) -> Moments:
        """Return the moments of the input features of `module`."""
        found: Moments = self.value("moments", module)
        return found

    def covariance(self, module: str) -> Covariance:
        """Return the covariance of the input features of `module`."""
        found: Covariance = self.value("covariance", module)
        return found

    def votes(self, module: str) -> Votes:
        """Return the sums of the input features of `module` in which tokens, or sequences, count the same."""
        found: Votes = self.value("votes", module)
        return found

    def inputs(self, group: str) -> Moments:
        """Return the moments of the features that the matrices of a group read whose rows belong to units."""
        found: Moments = self.value("inputs", group)
        return found

    def cosine(self, place: str) -> float:
        """Return the mean cosine between the residual stream before and after a layer or sublayer (module path)."""
        return float(self.value("cosine", place).mean)

    def boundaries(self) -> Boundaries:
        """Return the means of the cosine and the angle between the residual stream at any two layer boundaries."""
        found: Boundaries = self.value("boundaries", STREAM)
        return found

    def rows(self, family: str, parameter: str, name: str) -> Tensor:
        """Return a sum over each row (R) of `parameter`; `family` and `name` as in `gradient_rows`."""
        return self.tensors[f"{family}/{parameter}/{name}"]

    def of_corpus(self, corpus: str) -> Statistics:
        """Return the statistics of the sample of another corpus, which know the others too."""
        return dataclasses.replace(self.others[corpus], others=self.others)

    def only(self, family: str) -> Statistics:
        """Return the part that belongs to one family."""
        part = {key: item for key, item in self.tensors.items() if key.startswith(f"{family}/")}
        return Statistics(tokens=self.tokens, tensors=part)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """Return the statistics of two samples together: of families of `ACCUMULATORS`, the same in both.

    The rows of ``gradient`` and ``fisher`` do not merge, as sums of |W g| of two samples do not follow from those of
    each; the families that they are read from do.
    """
    assert a.families == b.families <= set(ACCUMULATORS), f"cannot merge {a.families} with {b.families}"
    tensors: dict[str, Tensor] = {}
    for family, place in dict.fromkeys(tuple(key.split("/")[:2]) for key in a.tensors):
        both = a.value(family, place).merge(b.value(family, place))
        tensors |= tensors_of(family, place, both)
    return Statistics(tokens=a.tokens + b.tokens, tensors=tensors)


def union(parts: Iterable[Statistics]) -> Statistics:
    """Return families of the same sample side by side."""
    held = list(parts)
    sizes = {part.tokens for part in held}
    assert len(sizes) <= 1, f"families of one sample must count the same tokens, given {sizes}"
    tensors = reduce(lambda left, part: {**left, **part.tensors}, held, dict[str, Tensor]())
    return Statistics(tokens=sizes.pop() if sizes else 0, tensors=tensors)


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    value = 0
    for name in sorted(tensors):
        content = tensors[name].contiguous().view(-1).view(torch.uint8).numpy()
        value = zlib.crc32(content, zlib.crc32(name.encode(), value))  # type: ignore[arg-type] # numpy has buffers
    return f"{value:08x}"


def save(statistics: Statistics, path: Path) -> None:
    """Write `statistics` to the safetensors file `path` (not atomically: see `statistics_cache`)."""
    tensors = {name: item.contiguous() for name, item in statistics.tensors.items()}
    save_file(tensors, path, metadata={"tokens": str(statistics.tokens), "crc32": _checksum(tensors)})


def load(path: Path, *, verify: bool = True) -> Statistics:
    """Return the statistics that `save` wrote, mapped into memory.

    Args:
        path: the file.
        verify: whether to read all of it (about 3 GB a second) and compare its checksum.

    Raises:
        DataError: the file is missing, cut short or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, RuntimeError) as error:  # the last: torch's own, of a file deleted meanwhile
        raise DataError(f"{path}: must be a whole statistics file: {error}") from error
    if not metadata.get("tokens", "").isdigit() or (verify and metadata.get("crc32") != _checksum(tensors)):
        raise DataError(f"{path}: must be a whole statistics file: its checksum is not the one it was written with")
    return Statistics(tokens=int(metadata["tokens"]), tensors=tensors)
