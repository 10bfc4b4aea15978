"""How long a model of given widths takes, predicted: a table of what each sublayer takes, measured once per machine.

A forward pass is a sum: embedding, final norm and the last token's logits, and one term for each attention and each
MLP, which depends on its width alone. The terms are measured at a few widths, in a process of its own, on random
weights: time does not depend on the numbers. Between those widths they are interpolated.

``python -m adasearch.latencies REQUEST`` is that process.
"""

from __future__ import annotations

import copy
import json
import platform
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adasearch import fresh, models
from adasearch.checkpoints import ModelSource
from adasearch.costs import pass_seconds
from adasearch.documents import fingerprint, parse, plain, value
from adasearch.errors import ConfigError
from adasearch.pruning import architectures, surgery
from adasearch.pruning.plan import make_plan
from adasearch.pruning.statistics_cache import locked
from adasearch.pruning.structure import ModelShape, ModelStructure
from adasearch.records import write_json
from adasearch.sections import UnitsConfig

KINDS = {"self_attn": "attention", "mlp": "mlp"}
"""Kind of group by the name of a sublayer."""
_VERSION = 1
"""Raised when a table would be measured in another way."""
_WIDTHS = 8
_LAYERS, _BYTES = 4, 256 * 2**20
"""Of each stack that is timed: layers at most, and bytes of their weights beyond the first layer."""
_LEAST_ROUNDS, _MOST_ROUNDS, _SECONDS = 5, 15, 10.0


@value
class Curve:
    """Seconds of one sublayer by its width (units per partition), ascending in both."""

    widths: tuple[int, ...]
    seconds: tuple[float, ...]

    def at(self, width: int) -> float:
        """Return the seconds at a width, linear between those that were measured."""
        return float(np.interp(width, self.widths, self.seconds))


@value
class LatencyTable:
    """Seconds of a forward pass by part.

    Args:
        curves: by kind of sublayer, ``attention`` and ``mlp``; the greatest width is the dense one.
        rest: all that is no sublayer.
    """

    curves: dict[str, Curve]
    rest: float

    def seconds(self, structure: ModelStructure, widths: Mapping[str, int]) -> float:
        """Return the predicted seconds of a model: rest plus the sum over the sublayers that it has.

        Args:
            structure: of the model before its widths are cut, of the same units as the table.
            widths: units kept per partition by group name; groups left out stay dense.
        """
        skipped = set(structure.outline.skipped(structure.dense.layers))
        total = self.rest
        for layer in range(structure.layers):
            for part, kind in KINDS.items():
                name, curve = f"model.layers.{layer}.{part}", self.curves[kind]
                if name not in skipped:
                    total += curve.at(widths.get(name, curve.widths[-1]))
        return total

    def share(self, structure: ModelStructure, widths: Mapping[str, int]) -> float:
        """Return the same as a fraction of the dense model's."""
        return self.seconds(structure, widths) / self.seconds(structure.dense, {})


@value
class Conditions:
    """What a latency depends on beside the model.

    Args:
        device: ``cpu`` or ``cuda``.
        dtype: number format, such as ``float32``.
        threads: CPU threads.
        tokens: of the sequence.
    """

    device: str
    dtype: str
    threads: int
    tokens: int

    @property
    def machine(self) -> str:
        """Return what computes: the name of the processor or of the GPU."""
        if self.device == "cuda":
            return torch.cuda.get_device_name()
        return f"{platform.machine()} {_processor()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _grown(units: UnitsConfig) -> UnitsConfig:
    """Return units by which both kinds of sublayers have widths."""
    return UnitsConfig(attention="kv_group" if units.attention == "none" else units.attention, mlp="channel")


def table(config: Any, shape: ModelShape, units: UnitsConfig, told: Conditions, folder: Path) -> LatencyTable:
    """Return the latency table of a model, measured where the folder does not hold it yet.

    Of several processes that lack it one measures, in a process of its own, and the others wait. Where a run's cache is
    deleted it is measured again, and comes out a little different.

    Args:
        config: transformers config of the dense model.
        shape: of the same.
        units: what goes as a whole.
        told: under which conditions it is to hold.
        folder: of tables.

    Raises:
        StorageError: the folder cannot be written.
        ModelError: the other process failed.
    """
    units = _grown(units)
    key = fingerprint((_VERSION, shape, units, told, told.machine, torch.__version__))
    path = folder / f"{key}.json"
    with locked(path.with_suffix(".lock")):
        found = _read(path)
        if found is None:
            with tempfile.TemporaryDirectory() as room:
                copy.deepcopy(config).save_pretrained(room)
                request = {"units": plain(units), "conditions": plain(told)}
                (Path(room) / "request.json").write_text(json.dumps(request), encoding="utf-8")
                found = parse(LatencyTable, fresh.ask(__name__, [room]), "latencies:")
            write_json(path, found)
    return found


def _read(path: Path) -> LatencyTable | None:
    try:
        return parse(LatencyTable, json.loads(path.read_text(encoding="utf-8")), "latencies:")
    except (OSError, ValueError, ConfigError):
        return None


def grid(width: int, most: int = _WIDTHS) -> tuple[int, ...]:
    """Return widths from 1 to `width`, ascending: all where they are few, else `most` or one more, evenly spaced."""
    return tuple(sorted({max(1, round(width * i / most)) for i in range(most + 1)} if width > most else
                        range(1, width + 1)))  # fmt: skip


def rising(values: Sequence[float]) -> list[float]:
    """Return the rising sequence that is nearest to `values` in squares (isotonic regression).

    By the formula x_i = max_{a <= i} min_{b >= i} mean(values_a..b) (Barlow et al. 1972, theorem 1.1): noise cannot
    make a narrower layer slower.
    """
    found = np.asarray(values, dtype=np.float64)
    sums = np.concatenate([[0.0], np.cumsum(found)])
    n = len(found)

    def mean(a: int, b: int) -> float:
        return float((sums[b + 1] - sums[a]) / (b + 1 - a))

    return [max(min(mean(a, b) for b in range(i, n)) for a in range(i + 1)) for i in range(n)]


def settled(times: np.ndarray) -> np.ndarray:
    """Return the seconds of each point (P) from rounds over all points (R × P).

    Every round is scaled to the median round's length first, since a clock that falls or a neighbour that computes
    slows all points of a round alike; then the median over rounds is taken.
    """
    sums = times.sum(axis=1, keepdims=True)
    found: np.ndarray = np.median(times / sums, axis=0) * float(np.median(sums))
    return found


class _Stacks:
    """Models of a few layers that have one kind of sublayer alone, of any width, over the same random weights.

    Args:
        config: transformers config of the dense model.
        units: of both kinds.
        told: device and number format.
    """

    def __init__(self, config: Any, units: UnitsConfig, told: Conditions) -> None:
        self._config, self._units, self._told = config, units, told
        shape = models.shape_of(config)
        dtype = getattr(torch, told.dtype)
        layer = sum(np.prod(s) for name, s in shape.shapes.items() if name.startswith("model.layers.0."))
        self.layers = max(1, min(_LAYERS, shape.layers, int(_BYTES // (float(layer) * dtype.itemsize))))
        generator = torch.Generator().manual_seed(0)
        names = [n for n in shape.shapes if not n.startswith("model.layers.") or int(n.split(".")[2]) < self.layers]
        self._weights = {}
        for name in names:
            made = torch.empty(shape.shapes[name], dtype=dtype).normal_(std=0.02, generator=generator)
            self._weights[name] = made.to(told.device)

    def model(self, kind: str | None, width: int | None = None) -> nn.Module:
        """Return the model with sublayers of one kind at a width (None is dense), or with none at all."""
        config = copy.deepcopy(self._config)
        config.num_hidden_layers = self.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: self.layers]
        gone = [part for part, own in KINDS.items() if own != kind]
        config.absent_sublayers = [f"model.layers.{i}.{part}" for i in range(self.layers) for part in gone]
        shape = models.shape_of(config)
        structure = architectures.describe(shape, self._units)
        weights = {name: self._weights[name] for name in shape.shapes}
        widths = {g.name: width or g.width for g in structure.groups}
        scores = {g.name: torch.zeros(g.units) for g in structure.groups}
        plan = make_plan(structure, self._units, scores, widths)
        return surgery.cut(config, weights, structure, plan, weights).requires_grad_(requires_grad=False)


def measure(config: Any, units: UnitsConfig, told: Conditions) -> LatencyTable:
    """Return the latency table of a model, measured here and now.

    A term is what a stack of layers with this sublayer alone takes beyond a stack with none, over the number of layers.
    All points of the table take turns, see `settled`, and terms rise with the width, see `rising`.

    Args:
        config: transformers config of the dense model.
        units: of both kinds.
        told: the conditions; the threads of this process must be those.
    """
    stacks = _Stacks(config, units, told)
    dense = architectures.describe(models.shape_of(config), units)
    ends = {kind: next(g.width for g in dense.groups if g.kind == kind) for kind in KINDS.values()}
    points = [(kind, width) for kind, end in ends.items() for width in grid(end)]
    timed = [stacks.model(None), *(stacks.model(kind, width) for kind, width in points)]
    ids = (torch.arange(told.tokens, device=told.device) % config.vocab_size)[None]
    rounds: list[list[float]] = []
    begun = time.perf_counter()
    with torch.inference_mode():
        for model in timed:  # kernels and memory are made ready by the first pass
            pass_seconds(model, ids)
        while len(rounds) < _LEAST_ROUNDS or (len(rounds) < _MOST_ROUNDS and time.perf_counter() - begun < _SECONDS):
            rounds.append([pass_seconds(model, ids) for model in timed])
    rest, *found = settled(np.array(rounds))
    curves = {}
    for kind, end in ends.items():
        own = [max(0.0, float(s - rest)) / stacks.layers for (k, _), s in zip(points, found, strict=True) if k == kind]
        curves[kind] = Curve(widths=grid(end), seconds=tuple(rising(own)))
    return LatencyTable(curves=curves, rest=float(rest))


def _answer(folder: str) -> LatencyTable:
    """Return the table that the request in a folder, with the config beside it, asks for."""
    request = json.loads((Path(folder) / "request.json").read_text(encoding="utf-8"))
    told = parse(Conditions, request["conditions"], "conditions:")
    models.set_threads(told.threads)
    config = models.read_config(ModelSource(kind="folder", name=folder, path=folder))
    return measure(config, parse(UnitsConfig, request["units"], "units:"), told)


if __name__ == "__main__":
    fresh.respond(lambda: _answer(sys.argv[1]))
