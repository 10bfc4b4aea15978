"""What is compared: one trial's configuration on one model, for both ways alike."""

from __future__ import annotations

import functools
import gc
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adasearch import data, models, trial
from adasearch.config import StudyConfig, TrialConfig, merged, study_from_dict
from adasearch.pruning import schedule
from adasearch.pruning.plan import PruningPlan
from adasearch.sections import ModelConfig
from adasearch.tuning import cloze, tasks
from adasearch.workbench import Workbench
from benchmarks import shapes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Setting:
    """One comparison.

    Args:
        study: model, budget, tasks, data.
        config: the trial.
        threads: CPU threads of both ways.
        device: of both ways.
        dtype: number format of ours.
        naive_dtype: of the naive way.
        naive_folder: checkpoint in that format.
        batch_size: sequences of a batch of lm-eval.
        half_adapters: the naive way keeps its adapters in the number format of the model.
        repeat: how often each way runs, in turn.
    """

    study: StudyConfig
    config: TrialConfig
    threads: int
    device: torch.device
    dtype: torch.dtype
    naive_dtype: torch.dtype
    naive_folder: Path
    batch_size: int
    half_adapters: bool
    repeat: int


def default_tasks(data_root: str | None) -> str:
    """Return real tasks where their data are at hand, else cloze items of text that ships with CPython."""
    return "piqa,arc_easy,hellaswag,winogrande,openbookqa" if data_root else "cloze/pydoc"


def _study(args: Any, folder: Path) -> StudyConfig:
    names = (args.tasks or default_tasks(args.data_root)).split(",")
    calibration = {"corpus": args.corpus, "samples": args.calibration_samples, "length": args.length}
    recovery = {"type": "lora", "tokens": args.tokens, "length": args.length, "batch": args.batch, "rank": args.rank}
    fields = {
        "name": "benchmark",
        "model": {"name": str(folder), "dtype": args.dtype},
        "space": {"importance": {"choice": [args.importance]}},
        "budget": {"remove": args.remove},
        "objective": {"search": names, "items": args.items, "select": 1, "allow_shared_splits": True},
        "report": {"tasks": names, "contamination": "allow"},  # as the naive way, which does not look
        "racing": {"enabled": False},
        "fidelity": {"divergence": 0},
        "trial": {"calibration": calibration, "importance": args.importance, "recovery": recovery, "seed": args.seed},
        "seed": args.seed,
        "data_root": args.data_root,
    }
    return study_from_dict(fields, "benchmark:", Path("benchmark.yaml"))


def _checkpoint(args: Any, dtype: torch.dtype, device: torch.device) -> Path:
    """Return the checkpoint in a number format; making it is no part of a trial of either way."""
    cache = Path(args.cache).absolute()
    if args.shape:
        return shapes.write_checkpoint(args.shape, args.layers, dtype, device, cache)
    return models.fetch_weights(models.resolve(ModelConfig(name=args.model)), cache, dtype)


def prepare(args: Any) -> Setting:
    """Return the comparison that the command line asks for."""
    device = models.pick_device()
    dtype, naive_dtype = getattr(torch, args.dtype), getattr(torch, args.naive_dtype or args.dtype)
    study = _study(args, _checkpoint(args, dtype, device))
    return Setting(
        study=study,
        config=TrialConfig.from_dict(study.trial, "trial"),
        threads=args.threads,
        device=device,
        dtype=dtype,
        naive_dtype=naive_dtype,
        naive_folder=_checkpoint(args, naive_dtype, device),
        batch_size=args.batch_size,
        half_adapters=args.half_adapters,
        repeat=args.repeat,
    )


@contextmanager
def empty_run() -> Iterator[Path]:
    """Give a run folder with empty caches, for as long as the block lasts."""
    kept = os.environ.pop("ADASEARCH_CACHE", None)
    try:
        with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
            yield Path(folder)
    finally:
        if kept is not None:
            os.environ["ADASEARCH_CACHE"] = kept


@contextmanager
def workbench(setting: Setting) -> Iterator[Workbench]:
    """Give a workbench with empty caches."""
    with empty_run() as run:
        yield Workbench(setting.study, run, setting.threads)


def forget() -> None:
    """Empty what this process remembers of corpora and tasks, and give free memory back: a trial from scratch."""
    for module in (data, cloze, tasks):
        for known in vars(module).values():
            if isinstance(known, functools._lru_cache_wrapper):
                known.cache_clear()
    gc.collect()
    models.release_memory()


def magnitude_plan(setting: Setting, bench: Workbench) -> PruningPlan:
    """Return a plan of the trial's widths; the units of a plan without statistics are others, its sizes are not."""
    config = TrialConfig.from_dict(merged(setting.study.trial, {"importance": "magnitude"}), "trial")
    return schedule.decide(trial.context_of(config, bench, bench.structure(config.units), None)).plan
