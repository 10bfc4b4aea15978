"""One stage at a time on a model that both ways share, in turn: naive, ours, naive, ours; for profiles and targets."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from adasearch import data, registry, trial
from adasearch.config import TrialConfig
from adasearch.documents import value
from adasearch.pruning import calibration, schedule
from adasearch.tuning import scoring
from adasearch.tuning.recovery import RecoveryContext
from adasearch.workbench import Workbench
from benchmarks import harness, naive, work
from benchmarks.machine import Peak, peak_memory
from benchmarks.measurement import EVALUATE, MODEL_ALONE, Measurement
from benchmarks.setting import Setting, forget


@value
class Compared:
    """What a comparison gives: measurements, and remarks to print below them."""

    measurements: tuple[Measurement, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Way:
    """How one side does a stage: `prepare` is not timed, `run` takes what it gave."""

    dtype: torch.dtype
    work: work.Work
    prepare: Callable[[], Any]
    run: Callable[[Any], Any]


class Shared:
    """What both sides work on: the dense model of a workbench, and the same cut as the trial has it."""

    def __init__(self, setting: Setting, bench: Workbench) -> None:
        self.setting = setting
        self.bench = bench

    @functools.cached_property
    def pruned(self) -> trial.Pruned:
        """Return the cut model, not yet recovered."""
        return trial.prune(self.setting.config, self.bench, trial.Clock())

    def model(self, dtype: torch.dtype) -> Any:
        """Return a copy of the cut model."""
        return copy.deepcopy(self.pruned.model).to(dtype)


def interleaved(
    stage: str, ways: Mapping[str, Way], setting: Setting
) -> tuple[tuple[Measurement, ...], dict[str, list[Any]]]:
    """Run the ways in turn, `setting.repeat` times; return the measurements and what each way gave each time."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[Peak]] = {name: [] for name in ways}
    results: dict[str, list[Any]] = {name: [] for name in ways}
    for _ in range(setting.repeat):
        for name, way in ways.items():
            forget()
            given = way.prepare()
            with peak_memory() as trace:
                trace.mark(stage)
                start = time.perf_counter()
                results[name].append(way.run(given))
                if setting.device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - start)
            peaks[name].append(trace.peaks[stage])
            del given
    measured = tuple(
        Measurement(
            stage=stage,
            way=name,
            dtype=str(way.dtype).removeprefix("torch."),
            seconds=tuple(seconds[name]),
            peak=Peak(host=max(p.host for p in peaks[name]), device=max(p.device for p in peaks[name])),
            work=way.work,
        )
        for name, way in ways.items()
    )
    return measured, results


# --- statistics of a new calibration sample


def statistics_work(sizes: work.Sizes, config: TrialConfig) -> dict[str, work.Work]:
    """Return the work of calibration the naive way and ours, which leaves out what no statistic reads."""
    sample = work.windows(config.calibration.samples, config.calibration.length)
    if "gradient" in schedule.needs(config):
        return {
            "naive": work.operations(sizes, "gradients", sample),
            "ours": work.operations(sizes, "gradients", sample, head_passes=2),
        }
    return {
        "naive": work.operations(sizes, "forward", (sample[0], sample[0], sample[2])),
        "ours": work.operations(sizes, "forward", (sample[0], 0, sample[2])),
    }


def _plain(model: Any, tokens: torch.Tensor, *, backward: bool) -> None:
    """Run the model over the sample and do nothing with what comes: the measure that statistics are held to."""
    for batch in naive.batches(tokens):
        if backward:
            model(input_ids=batch, labels=batch).loss.backward()
        else:
            with torch.no_grad():
                model(input_ids=batch)


def compare_statistics(shared: Shared) -> Compared:
    """Compare the statistics of a calibration sample; ``plain`` is a forward (and backward) over its tokens alone."""
    setting, bench, config = shared.setting, shared.bench, shared.setting.config
    needs, kind = schedule.needs(config), config.importance.type
    tokens = data.token_matrix(bench.base.tokenizer, config.calibration, setting.study.data_root).to(setting.device)
    structure = bench.structure(config.units)
    counted = statistics_work(work.sizes_of(bench.dense()), config)

    def dense(dtype: torch.dtype) -> Any:
        return copy.deepcopy(bench.dense()).to(dtype).requires_grad_("gradient" in needs)

    ways = {
        "naive": Way(
            dtype=setting.naive_dtype,
            work=counted["naive"],
            prepare=lambda: dense(setting.naive_dtype),
            run=lambda model: naive.CALIBRATIONS[kind](model, tokens),
        ),
        "plain": Way(
            dtype=setting.dtype,
            work=counted["naive"],
            prepare=lambda: dense(setting.dtype),
            run=lambda model: _plain(model, tokens, backward="gradient" in needs),
        ),
        "ours": Way(
            dtype=setting.dtype,
            work=counted["ours"],
            prepare=bench.dense,
            run=lambda model: calibration.collect(model, structure, tokens, needs),
        ),
    }
    return Compared(measurements=interleaved("calibrate", ways, setting)[0])


# --- recovery


def recovery_work(model: Any, options: Any) -> work.Work:
    """Return the work of LoRA; both ways run the same passes."""
    steps = max(1, options.tokens // (options.batch * options.length))
    trained = work.windows(steps * options.batch, options.length)
    return work.lora(work.sizes_of(model), trained, work.adapter_weights(model, options.rank))


def _recovery_ways(shared: Shared, dtypes: tuple[torch.dtype, torch.dtype]) -> dict[str, Way]:
    setting, config = shared.setting, shared.setting.config
    options = config.recovery.options
    tokens = shared.bench.recovery_tokens(config.recovery, config.calibration.corpus, config.seed)
    context = RecoveryContext(seed=config.seed, device=str(setting.device))
    tune = registry.RECOVERY.get("lora").function
    counted = recovery_work(shared.pruned.model, options)
    return {
        "naive": Way(
            dtype=dtypes[0],
            work=counted,
            prepare=lambda: shared.model(dtypes[0]),
            run=lambda model: naive.recover(
                model, naive.as_rows(tokens, options), config, half_adapters=setting.half_adapters
            )[1],
        ),
        "ours": Way(
            dtype=dtypes[1],
            work=counted,
            prepare=lambda: shared.model(dtypes[1]),
            run=lambda model: tune(model, shared.pruned.structure, tokens, options, context).losses,
        ),
    }


def curve(losses: tuple[float, ...]) -> str:
    """Return a loss curve in a line (nats per token), at most sixteen points of it."""
    return " ".join(f"{loss:.4f}" for loss in losses[:: max(1, len(losses) // 16)])


def compare_recovery(shared: Shared) -> Compared:
    """Compare LoRA on the shared cut model."""
    setting = shared.setting
    measured, losses = interleaved("recover", _recovery_ways(shared, (setting.naive_dtype, setting.dtype)), setting)
    remarks = tuple(f"loss curve {name}: {curve(found[-1])}" for name, found in losses.items())
    return Compared(measurements=measured, remarks=remarks)


# --- scoring


def scoring_work(model: Any, items: list[scoring.EncodedItem]) -> dict[str, work.Work]:
    """Return the work of scoring: every choice apart with logits everywhere, or packed behind its context."""
    sizes = work.sizes_of(model)
    return {
        "naive": work.operations(sizes, "forward", work.choices_apart(items)),
        "ours": work.operations(sizes, "forward", work.choices_packed(items)),
    }


def _scoring_ways(shared: Shared, dtypes: tuple[torch.dtype, torch.dtype]) -> dict[str, Way]:
    setting, bench = shared.setting, shared.bench
    tasks = bench.items("search")
    items = [item for task in tasks.values() for item in task.items]
    encoded = [item for task in tasks.values() for item in task.encoded]
    objects = harness.load_tasks(setting.study)
    where = harness.places(objects, {name: task.items for name, task in tasks.items()})
    tokenizer, limit = bench.base.tokenizer, scoring.max_length(bench.base.config, bench.base.tokenizer)
    counted = scoring_work(shared.pruned.model, encoded)
    given = {dtype: shared.model(dtype).eval() for dtype in set(dtypes)}
    return {
        "naive": Way(
            dtype=dtypes[0],
            work=counted["naive"],
            prepare=lambda: given[dtypes[0]],
            run=lambda model: harness.evaluate(model, tokenizer, objects, where, setting.batch_size),
        ),
        "cold": Way(
            dtype=dtypes[1],
            work=counted["ours"],
            prepare=lambda: given[dtypes[1]],
            run=lambda model: scoring.score(model, scoring.encode(items, tokenizer, limit)).logliks,
        ),
        "warm": Way(
            dtype=dtypes[1],
            work=counted["ours"],
            prepare=lambda: given[dtypes[1]],
            run=lambda model: scoring.score(model, encoded).logliks,
        ),
    }


def furthest(theirs: harness.Logliks, ours: tuple[np.ndarray, ...]) -> float:
    """Return the greatest absolute difference of log-likelihoods; ours are those of all tasks, one after the other."""
    flat = [found for task in theirs.values() for found in task]
    return max(float(np.abs(a - b).max()) for a, b in zip(flat, ours, strict=True))


def compare_scoring(shared: Shared) -> Compared:
    """Compare zero-shot scoring of the shared cut model; ``cold`` tokenises the items, ``warm`` has them encoded."""
    setting = shared.setting
    measured, results = interleaved(EVALUATE, _scoring_ways(shared, (setting.naive_dtype, setting.dtype)), setting)
    apart = max(furthest(theirs, ours) for (theirs, _), ours in zip(results["naive"], results["warm"], strict=True))
    alone = [dataclasses.replace(m, stage=MODEL_ALONE) for m in measured]
    alone[0] = dataclasses.replace(alone[0], seconds=tuple(seconds for _, seconds in results["naive"]))
    remark = f"log-likelihoods differ by {apart:.2e} at most ({setting.naive_dtype} against {setting.dtype})"
    return Compared(measurements=(*measured, *alone), remarks=(remark,))


# --- equality


def check(shared: Shared) -> tuple[str, ...]:
    """Return how far the ways are apart on one model in float32: log-likelihoods and loss curves."""
    both = (torch.float32, torch.float32)
    scored = _scoring_ways(shared, both)
    theirs, _ = scored["naive"].run(scored["naive"].prepare())
    apart = furthest(theirs, scored["cold"].run(scored["cold"].prepare()))
    curves = {name: way.run(way.prepare()) for name, way in _recovery_ways(shared, both).items()}
    gap = float(np.abs(np.array(curves["naive"]) - np.array(curves["ours"])).max())
    return (
        f"check, float32: log-likelihoods differ by {apart:.2e} at most, losses by {gap:.2e}",
        *(f"check, float32: loss curve {name}: {curve(found)}" for name, found in curves.items()),
    )


STAGES: Mapping[str, Callable[[Shared], Compared]] = {
    "statistics": compare_statistics,
    "recovery": compare_recovery,
    "scoring": compare_scoring,
}
