"""What a user may write (studies, search spaces, recipes) and the two values that cross the house.

`StudyConfig` is a study file. `TrialConfig` is one point of a search: everything a trial needs to know.
`TrialResult` is what comes back. All are frozen, compare by value and turn into YAML or JSON and back.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adasearch import registry
from adasearch.documents import (
    Count,
    Finite,
    Index,
    Name,
    NonNegative,
    fingerprint,
    join,
    parse,
    plain,
    read_yaml,
    value,
)
from adasearch.errors import ConfigError
from adasearch.library import find, load_recipe, recipe_names
from adasearch.racing import FidelityConfig, RacingConfig, Rung
from adasearch.registry import Registry, nearest
from adasearch.sections import (
    FINALIST,
    BudgetConfig,
    CalibrationConfig,
    ClusterConfig,
    LimitsConfig,
    Metric,
    ModelConfig,
    ObjectiveConfig,
    OwnBudget,
    ReportConfig,
    SamplerConfig,
    StoppingConfig,
    TrainingRules,
    UnitsConfig,
)


@value
class Component:
    """An entry of an open set with its settings, such as ``{type: taylor, grain: vector}``."""

    type: str
    options: Any

    def to_dict(self) -> dict[str, Any]:
        """Return the flat mapping that a YAML file holds; settings that are components are flat too."""
        items = {field.name: getattr(self.options, field.name) for field in dataclasses.fields(self.options)}
        parts = {name: item.to_dict() for name, item in items.items() if isinstance(item, Component)}
        return {"type": self.type, **plain(self.options), **parts}


def component(known: Registry, data: Any, where: str) -> Component:
    """Return the entry of `known` that `data` names, its settings checked against that entry's own options.

    Raises:
        ConfigError: unknown entry, unknown setting, wrong type or range.
    """
    data = {"type": data} if isinstance(data, str) else data
    if not isinstance(data, dict) or "type" not in data:
        raise ConfigError(where, f"must be a name or a mapping with the key type, given {data!r}")
    entry = known.get(str(data["type"]), join(where, "type"))
    options = {key: item for key, item in data.items() if key != "type"}
    return Component(type=entry.name, options=parse(entry.options, options, where))


@value
class FinalizeConfig:
    """What happens after the search: how many configurations are fine-tuned, how, and into which formats (``[hf]``).

    `measure` says whether speed and memory of their exports are measured beside the dense model, see `adasearch.speed`.
    `workers` finalists are fine-tuned at the same time; None takes as many as the search, or fewer where memory does
    not hold them. `training` says how they are: budget of time, validation, checkpoints, memory, processes.
    """

    top: Count = 3
    workers: Count | None = None
    recovery: Component
    training: TrainingRules = TrainingRules()
    formats: tuple[Component, ...] = ()
    measure: bool = True


COMPONENTS: dict[str, Registry] = {
    "vocabulary": registry.TOKENS,
    "hidden": registry.HIDDEN,
    "depth": registry.DEPTH,
    "importance": registry.IMPORTANCE,
    "allocation": registry.ALLOCATION,
    "selection": registry.SELECTION,
    "compensation": registry.COMPENSATION,
    "schedule": registry.SCHEDULE,
    "recovery": registry.RECOVERY,
}


@value
class TrialConfig:
    """One point of a search, complete: equal configurations are equal values and have equal `key`s.

    `budget` replaces the study's where it says something, see `StudyConfig.budget_of`.
    """

    calibration: CalibrationConfig
    units: UnitsConfig
    vocabulary: Component
    hidden: Component
    depth: Component
    importance: Component
    allocation: Component
    selection: Component
    compensation: Component
    schedule: Component
    recovery: Component
    budget: OwnBudget = OwnBudget()
    seed: int = 0

    @staticmethod
    def from_dict(data: dict[str, Any], where: str) -> TrialConfig:
        """Return the configuration that a mapping describes; sections left out take their defaults.

        Raises:
            ConfigError: names the key below `where`.
        """
        sections = {"calibration", "units", "budget", "seed", *COMPONENTS}
        for key in data:
            if key not in sections:
                raise ConfigError(join(where, key), f"unknown key {key!r}; {nearest(str(key), sections)}")
        defaults = {"importance": "wanda_sp", "allocation": "uniform", "selection": "top", "schedule": "one_shot"}
        parts = {
            name: component(known, data.get(name, defaults.get(name, "none")), join(where, name))
            for name, known in COMPONENTS.items()
        }
        return TrialConfig(
            calibration=parse(CalibrationConfig, data.get("calibration", {}), join(where, "calibration")),
            units=parse(UnitsConfig, data.get("units", {}), join(where, "units")),
            budget=parse(OwnBudget, data.get("budget", {}), join(where, "budget")),
            seed=int(data.get("seed", 0)),
            **parts,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that `from_dict` reads back."""
        parts = {name: getattr(self, name).to_dict() for name in COMPONENTS}
        own = {name: plain(getattr(self, name)) for name in ("calibration", "units", "budget")}
        return {**own, **parts, "seed": self.seed}

    @property
    def key(self) -> str:
        """Return 16 hexadecimal digits that identify this configuration.

        A budget that says nothing has no part in it, so that keys are what they were before trials had budgets.
        """
        data = self.to_dict()
        if self.budget == OwnBudget():
            del data["budget"]
        return fingerprint(data)


@value
class TaskScore:
    """Score of one task: `n` items, mean and standard error of each metric, see `ObjectiveConfig`.

    None stands for an `acc_norm` that the task does not report, and for a `log_score` in records older than it is.
    """

    task: str
    n: int
    acc: float
    acc_stderr: float
    acc_norm: float | None
    acc_norm_stderr: float | None
    margin: float
    margin_stderr: float
    log_score: float | None = None
    log_score_stderr: float | None = None

    def of(self, metric: Metric) -> tuple[float, float]:
        """Return a metric and its standard error; `acc` stands in where a task has no `acc_norm`."""
        name = "acc" if metric == "acc_norm" and self.acc_norm is None else metric
        return getattr(self, name), getattr(self, f"{name}_stderr")


def mean_of(scores: Sequence[TaskScore], metric: Metric) -> tuple[float, float]:
    """Return the mean of `metric` over tasks, see `TaskScore.of`, and its standard error; nan without scores.

    The error is that of a mean of independent estimates, sqrt(sum of squares) / number of tasks.
    """
    if not scores:
        return math.nan, math.nan
    values, errors = zip(*(score.of(metric) for score in scores), strict=True)
    return sum(values) / len(scores), math.hypot(*errors) / len(scores)


TWIN = "same_trial_as"
"""Note of a trial that took the result of an earlier one, with its number."""


@value
class TrialResult:
    """What a trial gives back.

    Args:
        score: the objective, higher is better; for a trial that stopped while it was scored the estimate paired with
            the best trial, for one that stopped earlier the prediction from its last rung.
        stderr: its standard error over items, or of the prediction.
        tasks: scores per task on the items that were scored.
        parameters: of the model after the cut.
        widths: units kept, by group name.
        items: number of items scored.
        stopped: it ended at a rung, before all items were scored.
        seconds: by phase.
        peak_bytes: peak resident memory of the worker during the trial, mapped base weights included.
        notes: facts for the reader, such as loss before and after recovery.
        rungs: what was known of it on its way, cheapest first.
        costs: the figure of each cost in `ObjectiveConfig.costs`: a count, seconds, bytes.
        shares: the same as fractions of the dense model's, which is what the search sees and limits are about. A
            latency is compared with the dense model's in the same minute of the same process, see `costs.latency`.
        spreads: standard errors of those shares that are measured.
    """

    score: Finite
    stderr: NonNegative
    tasks: tuple[TaskScore, ...]
    parameters: int
    widths: dict[str, int]
    items: int
    stopped: bool
    seconds: dict[str, float]
    peak_bytes: int
    notes: dict[str, float | str]
    rungs: tuple[Rung, ...] = ()
    costs: dict[str, float] = dataclasses.field(default_factory=dict)
    shares: dict[str, float] = dataclasses.field(default_factory=dict)
    spreads: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Return whether the score comes from items scored after the recovery, and is no prediction from a rung."""
        return not (self.stopped and self.rungs and self.rungs[-1].kind != "recovered")

    @property
    def twin(self) -> bool:
        """Return whether it was taken from an earlier trial of the same configuration."""
        return TWIN in self.notes


@value
class SpaceConfig:
    """Which knobs are searched: dotted path into a trial -> ``{kind: domain}``, in the order of the file."""

    name: str
    dimensions: dict[str, dict[str, Any]]


STUDYS_OWN = ("calibration", "recovery", "budget")
"""Sections that recipes leave to the study, so that all are compared at equal cost."""
SEARCHED = ("model", "space", "budget", "objective", "trial", "recipes", "seed", "sampler", "racing",
            "fidelity", "warm_start")  # fmt: skip
"""Sections of a study that decide what its trials are; they may not change while its run goes on."""


@value
class StudyConfig:
    """A study file, resolved: every default filled in, the space and the recipes read.

    `warm_start` names run folders of earlier searches, whose trials are prior knowledge.

    `all_recipes` says that the file left `recipes` open (``auto``): they are all that there are, and `search.seeds`
    decides which of them a search runs.
    """

    name: Name
    model: ModelConfig
    space: SpaceConfig
    budget: BudgetConfig
    objective: ObjectiveConfig
    report: ReportConfig
    finalize: FinalizeConfig
    trial: dict[str, Any]
    recipes: dict[str, dict[str, Any]]
    trials: Count = 60
    seed: Index = 0
    cluster: ClusterConfig = ClusterConfig()
    sampler: SamplerConfig = SamplerConfig()
    racing: RacingConfig = RacingConfig()
    fidelity: FidelityConfig = FidelityConfig()
    stopping: StoppingConfig = StoppingConfig()
    limits: LimitsConfig = LimitsConfig()
    warm_start: tuple[str, ...] = ()
    data_root: str | None = None
    all_recipes: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping that `study_from_dict` reads back: the ``config.yaml`` of a run."""
        data: dict[str, Any] = plain(self)
        data["space"] = plain(self.space.dimensions)
        data["budget"] = self.budget.to_dict()
        data["finalize"]["recovery"] = self.finalize.recovery.to_dict()
        data["finalize"]["formats"] = [item.to_dict() for item in self.finalize.formats]
        return data

    def budget_of(self, trial: TrialConfig) -> BudgetConfig:
        """Return the budget of a trial: the study's, but for what the trial itself says of it."""
        own = trial.budget.remove
        return self.budget if own is None else self.budget.removing(own)

    @property
    def removes(self) -> tuple[float, float] | None:
        """Return the least and the greatest fraction of the parameters that its trials remove.

        None where the budget is in another cost, and each trial's own ratios decide.
        """
        spec = self.space.dimensions.get("budget.remove", {})
        given = spec.get("float", spec.get("choice"))
        given = given.get("range", given.get("choices")) if isinstance(given, dict) else given
        own = self.trial.get("budget", {}).get("remove") or self.budget.remove
        if given:
            return min(given), max(given)
        return None if own is None else (own, own)

    @property
    def races(self) -> bool:
        """Return whether trials race: not with several objectives, where a lower score may pay for a lower cost."""
        return self.racing.enabled and not self.objective.several

    @property
    def calibration_corpora(self) -> tuple[str, ...]:
        """Return every corpus that a trial may be calibrated on, as far as the space says; else the one of all."""
        chosen = self.space.dimensions.get("calibration.corpus", {}).get("choice")
        return tuple(map(str, chosen or [TrialConfig.from_dict(self.trial, "trial").calibration.corpus]))

    @property
    def fingerprint(self) -> str:
        """Return what identifies a search: two studies with equal fingerprints may share a run folder.

        The number of trials, the cluster, the limits, the report and the finalists may change on resume.
        """
        data = self.to_dict()
        return fingerprint({key: data[key] for key in SEARCHED})


def _read_space(data: Any, near: Path, where: str) -> SpaceConfig:
    where, name = join(where, "space"), "inline"
    if isinstance(data, str):
        path = find("search_spaces", data, near, where)
        data, where, name = read_yaml(path), f"{path}:", path.stem
    if not isinstance(data, dict) or not data:
        raise ConfigError(where.rstrip(":"), f"must map dotted paths to dimensions, given {data!r}")
    for path_in_trial, dimension in data.items():
        if not isinstance(dimension, dict):
            raise ConfigError(
                join(where, path_in_trial), f"must be a mapping such as {{int: [8, 32]}}, given {dimension!r}"
            )
    return SpaceConfig(name=name, dimensions=data)


def _read_recipes(data: dict[str, Any], near: Path, where: str) -> dict[str, Any]:
    """Return the keys that say which recipes a study has: by name, by mapping, none, or all that there are."""
    given = data.get("recipes", "auto")
    if isinstance(given, dict):
        return {"recipes": given}
    named = {"auto": recipe_names(near), "none": ()}.get(given) if isinstance(given, str) else given
    if not isinstance(named, list | tuple):
        raise ConfigError(where, f"must be auto, none, or a list of names, given {given!r}")
    recipes = {str(name): load_recipe(str(name), near, where) for name in named}
    return {"recipes": recipes, "all_recipes": given == "auto"}


def export_formats(given: Any, where: str) -> tuple[Component, ...]:
    """Return the export formats that a list names, such as ``[hf, {type: gguf, dtype: q8_0}]``.

    Raises:
        ConfigError: no list, an unknown format or setting, or two that would be written to the same folder.
    """
    if not isinstance(given, list | tuple):
        raise ConfigError(where, f"must be a list of formats, given {given!r}")
    formats = tuple(component(registry.EXPORT, item, where) for item in given)
    labels = [item.options.label for item in formats]
    twice = next((item for i, item in enumerate(formats) if item.options.label in labels[:i]), None)
    if twice is not None:
        raise ConfigError(where, f"{twice.type} stands twice with settings that share a folder; leave one of them")
    return formats


def study_from_dict(data: dict[str, Any], where: str, near: Path) -> StudyConfig:
    """Return the study that a mapping describes.

    Args:
        data: what the file held.
        where: start of the path in messages, ``study.yaml:``.
        near: the study's file; spaces and recipes are looked up from there.

    Raises:
        ConfigError: names the file and the key.
    """
    data = dict(data)
    data.setdefault("name", near.stem)
    data["space"] = _read_space(data.get("space", {}), near, where)
    data |= _read_recipes(data, near, join(where, "recipes"))
    finalize = dict(data.get("finalize") or {})
    recovery = finalize.get("recovery", FINALIST)
    finalize["recovery"] = component(registry.RECOVERY, recovery, join(where, "finalize.recovery"))
    finalize["formats"] = export_formats(finalize.get("formats", ["hf"]), join(where, "finalize.formats"))
    data["finalize"] = finalize
    data.setdefault("trial", {})
    study = parse(StudyConfig, data, where)
    TrialConfig.from_dict(study.trial, join(where, "trial"))
    for name, recipe in study.recipes.items():
        TrialConfig.from_dict(merged(study.trial, recipe), join(where, "recipes", name))
    return study


def load_study(path: Path) -> StudyConfig:
    """Return the study in the file `path`; ``ADASEARCH_DATA_ROOT`` overrides its `data_root`.

    Raises:
        ConfigError: names the file and the key.
    """
    data = read_yaml(path)
    if os.environ.get("ADASEARCH_DATA_ROOT"):
        data["data_root"] = os.environ["ADASEARCH_DATA_ROOT"]
    return study_from_dict(data, f"{path}:", path)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` laid on top, section by section; a component of another type replaces the whole."""
    result = dict(base)
    for key, item in over.items():
        old = result.get(key)
        old = {"type": old} if isinstance(old, str) and key in COMPONENTS else old
        item = {"type": item} if isinstance(item, str) and key in COMPONENTS else item
        same = isinstance(old, dict) and isinstance(item, dict) and item.get("type", old.get("type")) == old.get("type")
        result[key] = {**old, **item} if same else item  # type: ignore[dict-item]
    return result
