"""Memory of a search: of one worker step by step, and of a whole run with one worker and with several.

    python benchmarks/memory.py steps                  one worker in this process: what each step of a trial adds
    python benchmarks/memory.py workers --counts 1 4   driver, Ray and workers as a run starts them, at their peak

Memory is PSS (proportional set size, ``/proc/<pid>/smaps``): a page that n processes share counts 1/n in each, so that
the sum over processes is what the machine really holds. Linux only.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MIB = 1024.0
SMALL = {
    "objective": {"items": 8, "select": 4},
    "trial": {"calibration": {"samples": 4, "length": 128}, "recovery": {"tokens": 1024}},
}


@dataclasses.dataclass(frozen=True)
class Memory:
    """MiB of one process: PSS of all, its own pages, and of the PSS base weights, cached statistics, other files."""

    pss: float = 0.0
    own: float = 0.0
    weights: float = 0.0
    statistics: float = 0.0
    files: float = 0.0

    @property
    def heap(self) -> float:
        """MiB that no file holds."""
        return self.pss - self.weights - self.statistics - self.files

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def memory_of(pid: int) -> Memory:
    """Return the memory of a process, nothing for one that is gone."""
    sums: dict[str, float] = defaultdict(float)
    place = ""
    try:
        lines = Path(f"/proc/{pid}/smaps").read_text().splitlines()
    except OSError:
        return Memory()
    for line in lines:
        name, _, rest = line.partition(":")
        if " " in name or not rest.endswith("kB"):
            fields = line.split(maxsplit=5)
            if "-" in fields[0]:
                place = fields[5] if len(fields) > 5 else ""
            continue
        amount = int(rest.split()[0]) / MIB
        if name == "Pss":
            sums["pss"] += amount
            sums[_kind(place)] += amount
        elif name in {"Private_Dirty", "Private_Clean"}:
            sums["own"] += amount
    return Memory(**{field.name: sums[field.name] for field in dataclasses.fields(Memory)})


def _kind(place: str) -> str:
    if place.endswith(".safetensors"):
        return "weights" if "/models/" in place else "statistics"
    return "files" if place.startswith("/") else "anonymous"


def small_study(path: Path, workers: int) -> Any:
    """Return the study in `path` with fewer tokens and items, one thread for each of `workers` workers."""
    from adasearch.config import study_from_dict
    from adasearch.documents import read_yaml

    data = read_yaml(path)
    data["objective"] |= SMALL["objective"]
    for section, changes in SMALL["trial"].items():
        data["trial"][section] = {**data["trial"].get(section, {}), **changes}
    data["model"]["dtype"] = "bfloat16"
    data["cluster"] = {"workers": workers, "threads": 1}
    return study_from_dict(data, f"{path}:", path)


def trial_of(study: Any, recipe: str, draw: int) -> dict[str, Any]:
    """Return the configuration of a recipe's trial on a calibration sample of its own."""
    from adasearch.config import TrialConfig, merged

    config = merged(merged(study.trial, study.recipes[recipe]), {"calibration": {"draw": draw}})
    return TrialConfig.from_dict(config, "trial").to_dict()


def fresh_draw() -> int:
    """Return a draw whose statistics no cache holds yet: collecting them is part of what is measured."""
    return time.time_ns() // 1000 % 10**6


def _children() -> dict[int, list[int]]:
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                children[int((folder / "stat").read_text().rpartition(")")[2].split()[1])].append(int(folder.name))
            except OSError:
                continue
    return children


def family(pid: int) -> Iterator[int]:
    """Yield a process and all that descend from it."""
    children, queue = _children(), [pid]
    while queue:
        yield (found := queue.pop())
        queue += children[found]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _role(pid: int, driver: int) -> str:
    if pid == driver:
        return "driver"
    return "workers" if _command(pid).startswith(("ray::_Host", "adasearch worker")) else "ray"


@dataclasses.dataclass
class Peak:
    """The fullest moment of a run, and the most that a worker owned in each phase of its trial."""

    total: float = 0.0
    roles: dict[str, Memory] = dataclasses.field(default_factory=dict)
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    samples: int = 0


def _watch(driver: int, run: Path, peak: Peak) -> None:
    roles: dict[str, Memory] = defaultdict(Memory)
    most = 0.0
    for pid in list(family(driver)):
        held, role = memory_of(pid), _role(pid, driver)
        roles[role] += held
        most = max(most, held.own if role == "workers" else 0.0)
    peak.samples += 1
    for state in run.glob("trials/*/state.json"):
        try:
            phase = json.loads(state.read_text())["phase"]
        except (OSError, ValueError):
            continue
        peak.phases[phase] = max(peak.phases.get(phase, 0.0), most)
    total = sum(held.pss for held in roles.values())
    if total > peak.total:
        peak.total, peak.roles = total, dict(roles)


def drive(study_file: Path, run: Path, workers: int, recipe: str) -> None:
    """Be the driver of a run: check the study, load the optimizer, give each worker one trial at the same time."""
    from adasearch.checks import check_study, machines, place
    from adasearch.records import write_json
    from adasearch.run import open_executor
    from adasearch.search import surrogate
    from adasearch.search.driver import Assignment
    from adasearch.search.space import Space
    from adasearch.search.study import open_study

    assert surrogate
    study = small_study(study_file, workers)
    checked = check_study(study, f"{study_file}:", run)
    placed = place(study, checked.shape, machines(study))
    space = Space.from_config(study.space, study.trial, seed=study.seed)
    open_study(run, study, space).close()
    failures = []
    with open_executor(study, run, placed) as executor:
        for number in range(workers):
            folder = run / "trials" / f"{number:04d}-1"
            config = trial_of(study, recipe, fresh_draw() + number)
            task = Assignment(
                number=number, attempt=1, recipe=recipe, config=config, folder=str(folder), incumbent=None
            )
            executor.submit(folder.name, task, seconds=600.0)
        done = 0
        while done < workers:
            for outcome in executor.wait(1.0):
                done += 1
                failures += [outcome.failure.message] if outcome.failure else []
    write_json(run / "done.json", {"failures": failures})


def measure(study: Path, workers: int, recipe: str, cache: Path) -> Peak:
    """Return the peak of a run of `workers` workers, each with one trial.

    Raises:
        RuntimeError: a trial failed.
    """
    peak = Peak()
    with tempfile.TemporaryDirectory() as name:
        run = Path(name)
        command = [sys.executable, __file__, "drive", "--study", str(study), "--recipe", recipe, "--run", name]
        environment = {**os.environ, "ADASEARCH_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
        driver = subprocess.Popen([*command, "--counts", str(workers)], env=environment)
        while driver.poll() is None:
            _watch(driver.pid, run, peak)
            time.sleep(0.2)
        done = run / "done.json"
        failures = json.loads(done.read_text())["failures"] if done.exists() else ["the driver failed"]
    if failures:
        raise RuntimeError(f"{len(failures)} trials failed: {failures[0]}")
    return peak


def tell(counts: list[int], peaks: list[Peak]) -> None:
    """Print the peaks side by side."""
    print(f"\n{'peak PSS, MiB':34}" + "".join(f"{f'{n} workers':>12}" for n in counts) + f"{'ratio':>8}")
    roles = {
        "all processes": lambda p: p.total,
        "driver": lambda p: p.roles["driver"].pss,
        "ray": lambda p: p.roles["ray"].pss,
        "workers": lambda p: p.roles["workers"].pss,
        "  base weights, mapped": lambda p: p.roles["workers"].weights,
        "  cached statistics, mapped": lambda p: p.roles["workers"].statistics,
        "  libraries and other files": lambda p: p.roles["workers"].files,
        "  heap": lambda p: p.roles["workers"].heap,
    }
    for name, read in roles.items():
        figures = [read(peak) for peak in peaks]
        ratio = figures[-1] / figures[0] if figures[0] else float("nan")
        print(f"{name:34}" + "".join(f"{figure:12.0f}" for figure in figures) + f"{ratio:8.2f}")
    for count, peak in zip(counts, peaks, strict=True):
        phases = ", ".join(f"{phase} {own:.0f}" for phase, own in peak.phases.items())
        print(f"largest worker of {count}, own MiB while some trial is in: {phases} ({peak.samples} samples)")


class Steps:
    """Prints what this process holds after each step and at the fullest moment within it."""

    def __init__(self) -> None:
        self._since = self._last = self._peak = 0.0
        print(
            f"{'MiB of this process':34}{'own after':>11}{'added':>9}{'peak':>9}{'weights':>9}{'stats':>9}{'files':>9}"
        )
        self._running = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while not self._running.wait(0.02):
            for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
                if line.startswith("Anonymous"):
                    self._peak = max(self._peak, int(line.split()[1]) / MIB)

    def after(self, name: str) -> None:
        """Print the line of the step that has just ended."""
        held = memory_of(os.getpid())
        own = held.heap
        figures = (own - self._last, max(own, self._peak), held.weights, held.statistics, held.files)
        print(f"{name:34}{own:11.0f}" + "".join(f"{figure:9.0f}" for figure in figures))
        self._last, self._peak = own, 0.0

    def end(self) -> None:
        """Stop sampling."""
        self._running.set()


def _load(told: Steps) -> None:
    """Import what a worker imports, in the order in which it does."""
    told.after("python")
    for name in ("ray", "torch", "adasearch.worker"):
        importlib.import_module(name)
        told.after(f"import {name}")


def steps(study_file: Path, recipe: str, cache: Path) -> None:
    """Run one trial in this process and print what each step adds."""
    told = Steps()
    _load(told)
    from adasearch.config import TrialConfig
    from adasearch.pruning import schedule
    from adasearch.trial import Clock, evaluate, prune, recover
    from adasearch.workbench import Workbench

    os.environ["ADASEARCH_CACHE"] = str(cache)
    study, clock = small_study(study_file, 1), Clock()
    config = TrialConfig.from_dict(trial_of(study, recipe, fresh_draw()), "trial")
    with tempfile.TemporaryDirectory() as run:
        bench = Workbench(study, Path(run), 1)
        told.after("open base, tokenizer")
        bench.items("search")
        bench.dense()
        told.after("items, dense model")
        bench.statistics(bench.structure(config.units), config.calibration, config.units, schedule.needs(config))
        bench.release()
        told.after("statistics computed, written")
        pruned = prune(config, bench, clock)
        bench.release()
        told.after("statistics read, cut, compensated")
        recover(pruned, config.recovery, config, bench, clock)
        bench.release()
        told.after("recovered")
        evaluate(pruned.model, bench, clock)
        bench.release()
        told.after("evaluated")
        del pruned
        bench.release()
        told.after("released")
    told.end()


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "workers", "drive"])
    parser.add_argument("--study", type=Path, default=ROOT / "studies/quickstart.yaml")
    parser.add_argument("--recipe", default="fasp", help="recipe of the study that each trial runs")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--cache", type=Path, default=ROOT / "runs/memory-cache", help="where weights are kept")
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    commands: dict[str, Callable[[], None]] = {
        "steps": lambda: steps(args.study, args.recipe, args.cache),
        "drive": lambda: drive(args.study, args.run, args.counts[0], args.recipe),
        "workers": lambda: tell(args.counts, [measure(args.study, n, args.recipe, args.cache) for n in args.counts]),
    }
    commands[args.what]()


if __name__ == "__main__":
    main()
