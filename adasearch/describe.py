"""A checked study in words, as `adasearch validate` tells it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from adasearch.checks import Checked, machines, number_size, place, training_of
from adasearch.config import StudyConfig, TrialConfig
from adasearch.footprint import footprint
from adasearch.placement import GIB
from adasearch.search.space import MANY_PARAMETERS

if TYPE_CHECKING:
    from adasearch.pruning.structure import ModelShape


def describe_study(study: StudyConfig, checked: Checked) -> Iterator[str]:
    """Yield lines that say what would run and what it would cost."""
    structure = checked.structure
    yield f"{study.name}: valid"
    size = f"{structure.layers} layers, {structure.parameters:,} parameters"
    yield f"model: {study.model.name} ({structure.family}), {size}"
    kinds: dict[str, int] = {}
    for group in structure.groups:
        kinds[group.unit] = kinds.get(group.unit, 0) + group.units
    yield "units: " + ", ".join(f"{count:,} {unit.replace('_', ' ')}s" for unit, count in kinds.items())
    yield from _describe_budget(study, checked)
    yield from _describe_costs(study)
    yield f"space: {study.space.name}, {len(study.space.dimensions)} dimensions, {checked.parameters} parameters"
    if checked.parameters > MANY_PARAMETERS:
        yield f"  above {MANY_PARAMETERS} a search stays near its best trials: fix some knobs, or raise trials"
    if not math.isinf(checked.points):
        yield f"  {checked.points:g} points: the search ends when all have been tried"
    yield checked.sampler.line
    for role, found in checked.items.items():
        yield f"{role} items: " + ", ".join(f"{task} {len(ids)}" for task, ids in found.items())
    yield f"trials: {study.trials}, of them recipes: {', '.join(checked.seeds.names) or 'none'}"
    yield from [checked.seeds.summary()] if study.all_recipes else checked.seeds.lines()
    yield from (f"warm start: {earlier.run}: {earlier.summary}" for earlier in checked.earlier)
    trial = TrialConfig.from_dict(study.trial, "trial")
    train = getattr(trial.recovery.options, "tokens", 0)
    items = sum(len(ids) for ids in checked.items["search"].values())
    tokens = study.fidelity.divergence
    midway = train and 0 < study.fidelity.midway < 1
    again = f" (again after {study.fidelity.midway:.0%} of the recovery)" if midway else ""
    compared = f"divergence from the dense model on {tokens:,} tokens{again}, " if tokens else ""
    learning = {part.type: getattr(part.options, "tokens", 0) for part in (trial.hidden, trial.schedule)}
    learnt = "".join(f"{n:,} tokens from which {name} learns what goes, " for name, n in learning.items() if n)
    yield f"each trial: {compared}{learnt}{train:,} tokens of {trial.recovery.type} recovery, {items} items"
    yield from _describe_placement(study, checked.shape)
    final = getattr(study.finalize.recovery.options, "tokens", 0)
    yield f"finalists: {study.finalize.top}, {final:,} tokens of {study.finalize.recovery.type} recovery each"
    if final:
        yield f"  {_describe_training(study, checked.shape)}"


def _describe_training(study: StudyConfig, shape: ModelShape) -> str:
    """Return how finalists are trained, and what that takes of memory."""
    rules, recovery = study.finalize.training, study.finalize.recovery
    far = study.cluster.address not in {None, "in_process"}
    gpu = study.cluster.gpus_per_worker != 0 and (far or any(offer.gpus for offer in machines(study)))
    size = number_size(study, gpu=gpu)
    need = footprint(shape, size, training_of(recovery, rules))
    parts = [f"{rules.optimizer}, about {need.total / GIB:.1f} GiB each in {8 * size}-bit numbers"]
    parts += [f"at most {rules.seconds:g} s"] if rules.seconds else []
    parts += [f"{rules.validation.share:.0%} of the text held out"] if rules.validation else []
    parts += [f"a checkpoint every {rules.save_seconds:g} s"] if rules.save_seconds else []
    parts += [f"{rules.processes} processes together"] if rules.processes > 1 else []
    return ", ".join(parts)


def _describe_budget(study: StudyConfig, checked: Checked) -> Iterator[str]:
    structure = checked.structure
    removed = 1 - checked.target / structure.parameters
    if study.budget.goal is None:
        yield f"budget: {checked.target:,} parameters left at most ({removed:.2%} of all removed)"
    else:
        name, target = study.budget.goal
        tokens = f"over {study.objective.latency_tokens:,} tokens, {'predicted' if name == 'latency' else 'counted'}"
        yield f"budget: {name} at most {target:g} of the dense model's, {tokens}"
        yield f"  by equal ratios {checked.target:,} parameters left ({removed:.2%} of all removed); trials differ"
    if checked.smallest < checked.target:
        yield f"  searched: up to {1 - checked.smallest / structure.parameters:.2%}, {checked.smallest:,} left"


def _describe_costs(study: StudyConfig) -> Iterator[str]:
    objective = study.objective
    if objective.several:
        yield f"objectives: {objective.metric} up; {', '.join(objective.also)} down, as fractions of the dense model's"
        if study.racing.enabled:
            yield "  no trial races: a lower score may be the price of a lower cost"
        if "parameters" in objective.also and len(set(study.removes or ())) == 1:
            yield "  warning: all trials have the same number of parameters: search budget.remove in the space"
    if objective.at_most:
        limits = ", ".join(f"{cost} {limit:g}" for cost, limit in objective.at_most.items())
        yield f"hard limits: {limits} of the dense model's; a trial beyond is no finalist"
    if "latency" in objective.costs:
        yield f"  latency is measured over {objective.latency_tokens:,} tokens, by turns with the dense model"


def _describe_placement(study: StudyConfig, shape: ModelShape) -> Iterator[str]:
    if study.cluster.address not in {None, "in_process"}:
        yield f"workers: {study.cluster.workers}, placed on the Ray cluster at {study.cluster.address} when it runs"
        return
    offered = machines(study)
    for name, finalists in (("search", False), ("finalists", True)):
        found = place(study, shape, offered, finalists=finalists)
        yield f"{name}: {found.summary}"
        for warning in found.warnings:
            yield f"  warning: {warning}"
