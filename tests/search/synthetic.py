"""A search without a model: open sets, a space, a study, and workers that answer at once, with faults on demand."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import random
import signal
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Literal

import numpy as np

from adasearch import config as config_module
from adasearch.config import Component, SpaceConfig, StudyConfig, TaskScore, TrialResult
from adasearch.documents import Count, Positive, parse, value
from adasearch.errors import TrialError
from adasearch.racing import Rung
from adasearch.records import Record, write_items, write_record
from adasearch.registry import Entry, NoOptions, Registry
from adasearch.search.driver import Assignment, run_search
from adasearch.search.executor import InProcessExecutor, Outcome, classify
from adasearch.search.space import Space
from adasearch.sections import ClusterConfig, LimitsConfig, ModelConfig, ObjectiveConfig, SamplerConfig


@value
class TaylorOptions:
    grain: Literal["element", "vector"] = "element"
    power: Positive = 1.0


@value
class ProfileOptions:
    mlp: tuple[float, ...] = ()
    attention: tuple[float, ...] = ()


@value
class LoraOptions:
    rank: Count = 8
    lr: Positive = 1e-4


class FakeRegistry(Registry):
    """An open set that lies in memory."""

    def __init__(self, kind: str, **options: type) -> None:
        super().__init__("fake", kind)
        self._entries = {name: Entry(name, lambda: None, cls, {}) for name, cls in options.items()}

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._entries))


FAKES = {
    "depth": FakeRegistry("depth rule", none=NoOptions),
    "importance": FakeRegistry("importance criterion", wanda_sp=NoOptions, taylor=TaylorOptions, obs=NoOptions),
    "allocation": FakeRegistry("allocation", uniform=NoOptions, layer_profile=ProfileOptions),
    "selection": FakeRegistry("unit selection", top=NoOptions),
    "compensation": FakeRegistry("compensation", none=NoOptions, bias=NoOptions),
    "schedule": FakeRegistry("pruning schedule", one_shot=NoOptions),
    "recovery": FakeRegistry("recovery", none=NoOptions, lora=LoraOptions),
}


def install() -> None:
    """Put the fake open sets in the place of the real ones, for good (in a process of its own)."""
    config_module.COMPONENTS.update(FAKES)


BASE = {"calibration": {"corpus": "pydoc"}, "allocation": "layer_profile"}
DIMENSIONS = {
    "calibration.samples": {"int": [8, 128], "log": True},
    "importance": {"choice": ["taylor", "wanda_sp", "obs"]},
    "importance.taylor.grain": {"choice": ["element", "vector"]},
    "importance.taylor.power": {"float": [0.5, 2.0]},
    "recovery": {"choice": ["none", "lora"]},
    "recovery.rank": {"choice": [4, 8, 16, 32]},
    "recovery.lora.lr": {"float": [1e-5, 1e-3], "log": True},
    "allocation.layer_profile": {"layer_profile": {"mlp": 2, "attention": 1}},
}
RECIPES = {
    "taylor_plain": {"importance": "taylor"},
    "obs_lora": {"importance": "obs", "recovery": {"type": "lora", "rank": 16, "lr": 1e-4}},
    "elsewhere": {"allocation": "uniform"},
}


def make_study(**over) -> StudyConfig:
    """Return a study of the fake space; the caller has put the fake open sets in place."""
    sampler = over.pop("sampler", SamplerConfig(type="tpe", startup=3))
    limits = over.pop("limits", LimitsConfig(trial_seconds=20.0, attempts=2))
    fields = {
        "name": "synthetic",
        "model": ModelConfig(name="none"),
        "space": SpaceConfig(name="fake", dimensions=DIMENSIONS),
        "budget": parse(config_module.BudgetConfig, {"remove": 0.2}, ""),
        "objective": ObjectiveConfig(search=("cloze/pydoc",), items=50),
        "report": config_module.ReportConfig(tasks=("cloze/pydoc",)),
        "finalize": config_module.FinalizeConfig(recovery=Component(type="none", options=NoOptions())),
        "trial": BASE,
        "recipes": RECIPES,
        "trials": 8,
        "seed": 7,
        "cluster": ClusterConfig(workers=1, address="in_process"),
    }
    return StudyConfig(**{**fields, "sampler": sampler, "limits": limits, **over})


def make_space(study: StudyConfig) -> Space:
    return Space.from_config(study.space, study.trial, seed=study.seed)


def objective(config: dict | None) -> float:
    """Return the true score of a trial: smooth in the profile, with an optimum that no recipe holds."""
    if config is None:
        return 0.6
    profile = [*config["allocation"].get("mlp", ()), *config["allocation"].get("attention", ())]
    target = [0.6, -0.4, 0.8, -0.2, 0.3][: len(profile)]
    score = 0.5 - 0.1 * sum((a - b) ** 2 for a, b in zip(profile, target, strict=False))
    score += {"taylor": 0.03, "obs": 0.02}.get(config["importance"]["type"], 0.0)
    if config["recovery"]["type"] == "lora":
        score += 0.02 + 0.005 * np.log2(config["recovery"]["rank"] / 8)
    return float(score + 0.01 * np.log2(config["calibration"]["samples"] / 32))


@dataclasses.dataclass(frozen=True)
class Faults:
    """What goes wrong, by trial number; each of `once` only at the first attempt.

    Kinds: ``nan``, ``error``, ``config``, ``memory``, ``timeout``, ``worker_lost``, ``after_record`` (lost with the
    record written), ``kill`` (SIGKILL to this process).
    """

    always: dict[int, str] = dataclasses.field(default_factory=dict)
    once: dict[int, str] = dataclasses.field(default_factory=dict)
    every: str | None = None
    noise: float = 0.01
    delay: float = 0.0
    log: str | None = None


def costs_of(config: dict | None) -> dict[str, float]:
    """Return costs as fractions of the dense model's: the more samples, the more of them, for want of a cause."""
    share = 1.0 if config is None else 0.5 + config["calibration"]["samples"] / 320
    return {"parameters": share, "latency": share**0.5}


def result_of(task: Assignment, faults: Faults) -> TrialResult:
    text = repr(task.config and {**task.config})
    draw = random.Random(hashlib.sha256(text.encode()).digest())
    score = objective(task.config) + faults.noise * draw.gauss(0, 1)
    task_score = TaskScore(
        task="cloze/pydoc", n=50, acc=0.5, acc_stderr=0.07, acc_norm=None, acc_norm_stderr=None,
        margin=score, margin_stderr=0.01, log_score=score, log_score_stderr=0.01,
    )  # fmt: skip
    first = Rung(kind="divergence", share=0.0, value=1 - score, stderr=0.02, seconds=0.001, spent=0.001)
    asked = next((gate for gate in task.gates if gate.kind == "divergence"), None)
    if asked is not None:
        first = dataclasses.replace(first, least=asked.least)
        if asked.stops and first.behind:
            predicted, stderr = asked.predict(first.merit)
            return TrialResult(
                score=predicted, stderr=stderr, tasks=(), parameters=800, widths={"layers.0.mlp": 8}, items=0,
                stopped=True, seconds={"prune": 0.001}, peak_bytes=2**20, notes={}, rungs=(first,),
            )  # fmt: skip
    return TrialResult(
        score=score, stderr=0.01, tasks=(task_score,), parameters=800, widths={"layers.0.mlp": 8}, items=50,
        stopped=False, seconds={"prune": 0.001, "score": 0.002}, peak_bytes=2**20, notes={"loss": 1.5},
        costs=costs_of(task.config), shares=costs_of(task.config), spreads={"latency": 0.02},
        rungs=() if task.config is None else (
            first,
            Rung(kind="recovered", share=0.3, value=score - 0.01, stderr=0.02, seconds=0.001, gap=-0.01, bound=0.01),
            Rung(kind="recovered", share=1.0, value=score, stderr=0.01, seconds=0.002, gap=0.0, bound=0.01),
        ),
    )  # fmt: skip


def work(task: Assignment, faults: Faults) -> Record:
    """Do a trial as a worker does it."""
    fault = faults.every or faults.always.get(task.number)
    fault = fault or (faults.once.get(task.number) if task.attempt == 1 else None)
    if faults.log:
        with Path(faults.log).open("a") as file:
            file.write(f"{task.number}-{task.attempt}\n")
    time.sleep(random.random() * faults.delay)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "memory":
        raise MemoryError("no room")
    if fault == "error":
        raise ValueError("matrices \x1b[31m do not fit")
    if fault in {"config", "timeout", "worker_lost"}:
        raise TrialError(fault, f"a {fault}", "recover")
    result = result_of(task, faults)
    if fault == "nan":
        result = dataclasses.replace(result, score=float("nan"))
    record = Record(
        number=task.number, attempt=task.attempt, recipe=task.recipe, config=task.config, result=result,
        failure=None, environment={"host": "here"},
    )  # fmt: skip
    if result.items:
        write_items(Path(task.folder), {"cloze/pydoc": np.full(4, result.score)})
    write_record(Path(task.folder).parent.parent, record)
    if fault == "after_record":
        raise TrialError("worker_lost", "lost after its record was written", "write")
    return record


def factory(faults: Faults = Faults()) -> Callable[[], Callable[[Assignment], Record]]:
    """Return a worker factory."""
    return functools.partial(_open, faults)


def _open(faults: Faults) -> Callable[[Assignment], Record]:
    return functools.partial(work, faults=faults)


class ThreadExecutor:
    """Runs tasks in threads, so that they finish in any order."""

    def __init__(self, make, capacity: int) -> None:
        self.capacity = capacity
        self._worker = make()
        self._pool = ThreadPoolExecutor(capacity)
        self._futures: dict[Future, str] = {}
        self.closed = False

    def submit(self, key, task, *, seconds):
        self._futures[self._pool.submit(self._worker, task)] = key

    def wait(self, timeout):
        done, _ = wait(self._futures, timeout, return_when=FIRST_COMPLETED)
        outcomes = []
        for future in done:
            key, error = self._futures.pop(future), future.exception()
            if error is None:
                outcomes.append(Outcome(key=key, value=future.result(), failure=None))
            else:
                outcomes.append(Outcome(key=key, value=None, failure=classify(error)))
        return outcomes

    def close(self):
        self.closed = True
        self._pool.shutdown(cancel_futures=True)


class Stop(BaseException):
    """The driver's process ends here."""


def search(study, run, faults=Faults(), executor=None, observer=lambda snapshot: None):
    executor = executor or InProcessExecutor(factory(faults))
    return run_search(study, make_space(study), run, executor, observer)


def table(records):
    """Return what a search found, without what differs between machines and attempts."""
    return [
        (r.number, r.recipe, r.config, r.result.score if r.result else None, r.failure.kind if r.failure else None)
        for r in records
    ]


def told(run):
    with sqlite3.connect(run / "study.db") as connection:
        return connection.execute("SELECT number, state FROM trials ORDER BY number").fetchall()
