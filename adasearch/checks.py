"""All that can be found out about a study without loading weights: what would run, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from adasearch import costs, goals, models, placement, text_checks, trainings
from adasearch.config import Component, StudyConfig, TrialConfig, component, merged
from adasearch.documents import fingerprint, join, value
from adasearch.environment import local_machine, machine, versions
from adasearch.errors import ConfigError, DataError, ModelError, StorageError
from adasearch.footprint import Training
from adasearch.latencies import Conditions
from adasearch.placement import GIB, Machine, Need, Placement
from adasearch.pruning import allocation, architectures, compensation, schedule
from adasearch.pruning.projection import reachable, removal
from adasearch.pruning.structure import ModelShape, ModelStructure
from adasearch.registry import COMPENSATION
from adasearch.search.earlier import Earlier, gather
from adasearch.search.samplers import Choice, choose
from adasearch.search.seeds import Seeds, find_seeds
from adasearch.search.space import Space
from adasearch.sections import BudgetConfig, ClusterConfig, Cost, TrainingRules, UnitsConfig
from adasearch.tuning import tasks
from adasearch.tuning.export import check as check_export
from adasearch.tuning.export import check_model
from adasearch.workbench import cache_folder

if TYPE_CHECKING:
    from adasearch.checkpoints import ModelSource
    from adasearch.tuning.items import Item, Role

_FREE_BYTES = 512 * 2**20
_BYTES_PER_PARAMETER = 4
_SMOLLM2 = ModelShape(family="llama", layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, intermediate=1536,
                      vocabulary=49152, tied=True, shapes={"all": (134_515_008,)})  # fmt: skip


@value
class Checked:
    """What the checks found.

    Args:
        shape: of the dense model.
        structure: of the dense model with the study's default units.
        budget: in parameters; where the study's is in another cost, what equal ratios have to remove, measured here.
        target: greatest number of parameters that the budget leaves, the least budget where it is searched.
        smallest: the same for the greatest budget.
        model_digest: tells the model's files apart from others, from their names and sizes.
        items: identifiers of the items by role and task.
        parameters: number of parameters that are searched; a dimension may have several.
        points: of the space, infinity where they were not counted.
        seeds: what becomes of the recipes.
        earlier: what the runs under `warm_start` tell of the space.
        sampler: what proposes trials, and why.
    """

    shape: ModelShape
    structure: ModelStructure
    budget: BudgetConfig
    target: int
    smallest: int
    model_digest: str
    items: dict[str, dict[str, tuple[str, ...]]]
    parameters: int
    points: float
    seeds: Seeds
    sampler: Choice
    earlier: tuple[Earlier, ...] = ()

    @property
    def summary(self) -> str:
        """Return the goal in one line."""
        more = f" to {self.smallest:,}" if self.smallest < self.target else ""
        return f"{self.structure.parameters:,} parameters down to {self.target:,}{more}"


def units_in_play(study: StudyConfig) -> tuple[UnitsConfig, ...]:
    """Return every way of counting units that a trial of the study may use."""
    base = TrialConfig.from_dict(study.trial, "trial").units
    attention = study.space.dimensions.get("units.attention", {}).get("choice", [base.attention])
    mlp = study.space.dimensions.get("units.mlp", {}).get("choice", [base.mlp])
    return tuple(UnitsConfig(attention=a, mlp=m) for a in attention for m in mlp)


def budgets(study: StudyConfig) -> dict[float, str]:
    """Return every fraction that is to be removed, as far as study, trial, recipes and space name one, and its key."""
    own = {name: TrialConfig.from_dict(merged(study.trial, recipe), name) for name, recipe in study.recipes.items()}
    named: list[tuple[float | None, str]] = [(study.budget.remove, "budget.remove")]
    named.append((TrialConfig.from_dict(study.trial, "trial").budget.remove, "trial.budget.remove"))
    named += [(config.budget.remove, f"recipes.{name}.budget.remove") for name, config in own.items()]
    named += [(remove, "space.budget.remove") for remove in study.removes or ()]
    return {remove: key for remove, key in reversed(named) if remove is not None}


def _check_costs(study: StudyConfig, checked: Checked, where: str) -> None:
    """Refuse objectives that no trial can serve.

    Memory counts with the weights alone, which are the least that a model holds; a latency is known once measured.
    """
    objective, structure, shape = study.objective, checked.structure, checked.shape
    slack = sum(group.step_cost for group in structure.groups) if study.budget.uniform else 0
    slack = max(slack, max(group.step_cost for group in structure.groups))
    smallest = checked.smallest - slack
    cache = objective.latency_tokens * costs.cache_elements(shape, structure, {})
    least: dict[Cost, float] = {
        "parameters": smallest / structure.parameters,
        "memory": smallest / (structure.parameters + cache),
    }
    for cost, share in least.items():
        limit = objective.at_most.get(cost)
        if limit is not None and limit < share:
            problem = (
                f"no trial can meet {limit:g}: removing {max(budgets(study)):g} leaves at least {share:.4f} of the "
            )
            advice = "dense model's; raise the limit, or budget.remove"
            raise ConfigError(join(where, f"objective.at_most.{cost}"), problem + advice)


def _in_parameters(
    study: StudyConfig, source: ModelSource, shape: ModelShape, where: str, out: Path | None
) -> StudyConfig:
    """Return the study with its budget in parameters: where it is in another cost, what equal ratios have to remove.

    A latency is measured for that, on this machine, unless it is known; workers find the table where this puts it.
    """
    if study.budget.goal is None:
        return study
    key = join(where, f"budget.{study.budget.goal[0]}")
    if "budget.remove" in study.space.dimensions:
        raise ConfigError(key, "must not be given where the space searches budget.remove")
    device = "cpu" if study.cluster.gpus_per_worker == 0 else models.pick_device().type
    told = Conditions(
        device=device,
        dtype=str(models.pick_dtype(study.model.dtype, device)).removeprefix("torch."),
        threads=place(study, shape, (local_machine(),)).threads,
        tokens=study.objective.latency_tokens,
    )
    cache = cache_folder(out or Path("runs") / study.name)
    try:
        budget = goals.of_study(study, models.read_config(source), shape, told, cache)
    except ConfigError as error:
        raise _located(error, where) from None
    return dataclasses.replace(study, budget=budget)


def _check_hidden(study: StudyConfig, space: Space, where: str) -> None:
    """Refuse a latency budget of models whose hidden size is cut, for which no table holds."""
    for key, trial in _trials(study, space, "hidden") if study.budget.latency is not None else ():
        if trial.hidden.type != "none":
            raise ConfigError(join(where, key), f"must be none under budget.latency, given {trial.hidden.type}")


def _check_budget(study: StudyConfig, shape: ModelShape, where: str) -> ModelStructure:
    structures = [architectures.describe(shape, units) for units in units_in_play(study)]
    most = min(reachable(structure, study.budget) for structure in structures)
    for remove, key in budgets(study).items():
        if remove > most:
            problem = f"must be at most {most:.4f} for {study.model.name}, whose embeddings and norms stay, "
            raise ConfigError(join(where, key), f"{problem}given {remove:g}")
    _check_biases(study, structures[0], where)
    return structures[0]


def _check_biases(study: StudyConfig, structure: ModelStructure, where: str) -> None:
    """Refuse compensations that a budget of uniform widths has no room for, before a trial fails of it."""
    searched = study.space.dimensions.get("compensation", {}).get("choice")
    key = "space.compensation" if searched else "trial.compensation"
    for given in searched or [study.trial.get("compensation", "none")]:
        found = component(COMPENSATION, given, join(where, key))
        if study.budget.uniform and structure.added(compensation.bias_modules(found, structure)):
            problem = f"{found.type} adds biases, which stock classes lack: leave it out, or budget.uniform"
            raise ConfigError(join(where, key), problem)


def _check_layers(study: StudyConfig, space: Space, layers: int, where: str) -> None:
    """Refuse ratios by layer that are made for a model of another number of layers, before a trial fails of it."""
    for key, trial in _trials(study, space, "allocation"):
        allocation.check(trial.allocation, layers, join(where, key))


def _check_trainings(study: StudyConfig, space: Space, shape: ModelShape, where: str) -> None:
    """Refuse trainings that the model cannot have, such as adapters of a rank above the width of a projection."""
    structure = architectures.describe(shape, UnitsConfig())
    for section in trainings.SECTIONS:
        for key, trial in _trials(study, space, section):
            trainings.check(section, getattr(trial, section), structure, shape.shapes, join(where, key))
    key = "finalize.recovery"
    trainings.check("recovery", study.finalize.recovery, structure, shape.shapes, join(where, key))
    check_export(study.finalize.formats, study.finalize.recovery, join(where, "finalize.formats"))
    _check_processes(study, where)


def _check_processes(study: StudyConfig, where: str) -> None:
    """Make sure that as many processes as are asked for can train a finalist together.

    Raises:
        ConfigError: there are no others, or a batch has too few sequences for them.
    """
    processes, key = study.finalize.training.processes, join(where, "finalize.training.processes")
    if processes == 1:
        return
    if study.cluster.address == "in_process":
        raise ConfigError(key, f"must be 1 where cluster.address is in_process, given {processes}")
    batch = getattr(study.finalize.recovery.options, "batch", processes)
    if processes > batch:
        raise ConfigError(key, f"must be at most finalize.recovery.batch, {batch}, given {processes}")


def _trials(study: StudyConfig, space: Space, section: str) -> list[tuple[str, TrialConfig]]:
    """Return trials that between them have all that may be said of a section, and the key that says so."""
    named = [(f"trial.{section}", TrialConfig.from_dict(study.trial, "trial"))]
    for name, recipe in study.recipes.items():
        named.append((f"recipes.{name}.{section}", TrialConfig.from_dict(merged(study.trial, recipe), name)))
    # The dimensions of its settings before the choice among its entries, and those at whose corners it is merely there.
    order = (f"{section}.", section, "")
    corners = sorted(space.corners(), key=lambda found: [found[0].startswith(part) for part in order].index(True))
    return named + [(join("space", path), corner) for path, corner in corners]


def _models_to_write(study: StudyConfig, out: Path) -> int:
    """Return how many times all weights are still to be written: the base, exports, a checkpoint, a learnt cut.

    The checkpoint of a full training holds weights and two moments in 32 bits. Exports that stand count no more.
    """
    recovery, trial = study.finalize.recovery, TrialConfig.from_dict(study.trial, "trial")
    whole = hasattr(recovery.options, "batch") and training_of(recovery, study.finalize.training).rank == 0
    learnt = any(hasattr(part.options, "batch") for part in (trial.schedule, trial.hidden))
    exports = study.finalize.top * len(study.finalize.formats) - len(list((out / "export").glob("[!.]*")))
    return 1 + max(0, exports) + (3 if whole else 0) + (1 if learnt else 0)


def _check_disk(folder: Path, parameters: int, models_kept: int) -> None:
    """Check that the disk has room for what is to be written, `models_kept` times the parameters of the dense model."""
    while not folder.exists():
        folder = folder.parent
    need = _FREE_BYTES + parameters * _BYTES_PER_PARAMETER * models_kept
    free = shutil.disk_usage(folder).free
    if free < need:
        raise StorageError(
            f"{folder}: must have {need / 2**30:.1f} GiB free for weights and exports, has {free / 2**30:.1f}"
        )


def _check_schedule(study: StudyConfig) -> None:
    """Refuse a schedule that can do nothing with what all trials have in common; what is searched shows in a trial."""
    if not {"importance", "compensation", "schedule"} & set(study.space.dimensions):
        schedule.check(TrialConfig.from_dict(study.trial, "trial"), "trial.schedule")


def _located(error: ConfigError, where: str) -> ConfigError:
    """Return the error with the study's file in front of its key."""
    return error if error.where.startswith(where) else ConfigError(join(where, error.where), error.problem)


def check_study(study: StudyConfig, where: str, out: Path | None = None) -> Checked:
    """Check a study as far as that needs no weights.

    Args:
        study: as read.
        where: its file with a colon, ``study.yaml:``.
        out: run folder, whose disk must have room; None does not check.

    Raises:
        ConfigError: a key, with what must hold and what was given.
        ModelError: the model is missing, damaged or of a family that is not supported.
        DataError: a task or corpus cannot be read or holds too little.
        StorageError: too little room on the disk.
    """
    try:
        space = Space.from_config(study.space, study.trial, seed=study.seed)
        text_checks.check_corpora(study)
        tasks.check_tasks(study)
        text_checks.check_amounts(study)
        _check_schedule(study)
        earlier = gather(study, space, out, where)
        sampler = choose(study, space)
    except ConfigError as error:
        raise _located(error, where) from None
    try:
        source = models.resolve(study.model, join(where, "model.name"))
        shape = models.describe_source(source)
    except ModelError as error:
        text = str(error)
        raise ModelError(text if text.startswith(where) else f"{join(where, 'model.name')}: {text}") from error
    _check_hidden(study, space, where)
    study = _in_parameters(study, source, shape, where, out)
    structure = _check_budget(study, shape, where)
    low, high = study.removes or (study.budget.fraction, study.budget.fraction)
    targets = [structure.parameters - removal(structure, study.budget.removing(remove)) for remove in (low, high)]
    _check_layers(study, space, shape.layers, where)
    _check_trainings(study, space, shape, where)
    check_model(study.finalize.formats, source, join(where, "finalize.formats"))
    if out is not None:
        _check_disk(out, structure.parameters, _models_to_write(study, out))
    items = {role: _items(study, role, where) for role in ("search", "select", "report")}
    _check_text(study, source, items["report"], where)
    checked = Checked(
        shape=shape,
        structure=structure,
        budget=study.budget,
        target=targets[0],
        smallest=targets[1],
        model_digest=_digest(source),
        items={role: {task: tuple(i.id for i in found) for task, found in by.items()} for role, by in items.items()},
        parameters=len(space.parameters),
        points=space.num_points,
        seeds=find_seeds(study, space),
        earlier=earlier,
        sampler=sampler,
    )
    _check_costs(study, checked, where)
    return checked


def _check_text(study: StudyConfig, source: ModelSource, reported: dict[str, tuple[Item, ...]], where: str) -> None:
    try:
        text_checks.check_templates(study, source)
        text_checks.check_contamination(study, itertools.chain.from_iterable(reported.values()))
    except ConfigError as error:
        raise _located(error, where) from None


def _items(study: StudyConfig, role: Role, where: str) -> dict[str, tuple[Item, ...]]:
    key = "report.tasks" if role == "report" else "objective.search"
    try:
        found: dict[str, tuple[Item, ...]] = tasks.study_items(study, role)
    except DataError as error:
        raise DataError(f"{join(where, key)}: {error}") from error
    return found


def _digest(source: ModelSource) -> str:
    """Return what tells the files of a model apart: names and sizes; a hub model is its name and revision."""
    path = Path(source.path)
    files = [path] if path.is_file() else sorted(path.glob("*")) if source.path else []
    return fingerprint((source.name, source.revision, [(f.name, f.stat().st_size) for f in files if f.is_file()]))


def machines(study: StudyConfig) -> tuple[Machine, ...]:
    """Return what the machines offer that a study runs on: this one, or those of the Ray cluster that it names.

    Raises:
        ConfigError: no Ray at `cluster.address`.
    """
    if study.cluster.address in {None, "in_process"}:
        return (local_machine(),)
    from adasearch.search.ray_executor import machines as of_cluster

    return of_cluster(study.cluster.address)


def place(
    study: StudyConfig,
    shape: ModelShape,
    offered: tuple[Machine, ...],
    *,
    finalists: bool = False,
    trained: Sequence[Training] | None = None,
    most: int | None = None,
) -> Placement:
    """Return how many workers run a study's trials, or fine-tune its finalists, with what threads and GPUs each.

    Args:
        study: as read.
        shape: of the dense model.
        offered: by the machines, see `machines`.
        finalists: of the end of a run, which takes `finalize.workers`, or at most the workers of the search.
        trained: what each of them trains, None for what a study says of its trials or finalists.
        most: workers that are of use, None for what a search of the study can use.
    """
    gpu = study.cluster.gpus_per_worker != 0 and any(offer.gpus for offer in offered)
    if trained is None:
        trained = _trained(study, finalists=finalists)
    need = _need(shape, number_size(study, gpu=gpu), trained, finalists=finalists, gpu=gpu)
    if not finalists:
        return placement.decide(study.cluster, offered, need, most or placement.most_workers(study.trials))
    processes = study.finalize.training.processes
    searching = max(place(study, shape, offered).workers, processes)
    cluster = dataclasses.replace(study.cluster, workers=study.finalize.workers or "auto")
    if processes > 1 and gpu:  # processes that train together cannot share a GPU
        cluster = dataclasses.replace(cluster, gpus_per_worker=1.0)
    return placement.decide(cluster, offered, need, searching)


def number_size(study: StudyConfig, *, gpu: bool) -> int:
    """Return the bytes of a number of the models of a study, on a GPU or on the processor of this machine."""
    return 2 if gpu and study.model.dtype == "auto" else models.pick_dtype(study.model.dtype, "cpu").itemsize


def _trained(study: StudyConfig, *, finalists: bool) -> tuple[Training, ...]:
    """Return the trainings of a study's trials, or of its finalists."""
    trial = TrialConfig.from_dict(study.trial, "trial")
    if finalists:
        return trainings_of(dataclasses.replace(trial, recovery=study.finalize.recovery), study.finalize.training)
    return trainings_of(trial)


def _need(shape: ModelShape, size: int, trained: Sequence[Training], *, finalists: bool, gpu: bool) -> Need:
    """Return what a worker needs for the hungriest of trainings; where adapters alone are trained, its steps."""
    found = [placement.trial_need(shape, size, 0, gpu=gpu)]
    for training in trained:
        whole = finalists or training.rank == 0
        found.append(
            placement.final_need(shape, size, training, gpu=gpu)
            if whole
            else placement.trial_need(shape, size, training.tokens, gpu=gpu)
        )
    return max(found, key=lambda need: (need.gpu, need.memory))


def trainings_of(trial: TrialConfig, rules: TrainingRules = TrainingRules()) -> tuple[Training, ...]:  # noqa: B008 - frozen
    """Return all that is trained in a trial, its recovery as `rules` say."""
    parts = ((trial.recovery, rules), (trial.schedule, TrainingRules()), (trial.hidden, TrainingRules()))
    return tuple(training_of(part, how) for part, how in parts if hasattr(part.options, "batch"))


def training_of(recovery: Component, rules: TrainingRules) -> Training:
    """Return what is trained by a recovery: its adapters, or all weights where it has none."""
    options = recovery.options
    taught = getattr(options, "distill", 0.0) > 0
    return Training(rank=getattr(options, "rank", 0), batch=options.batch, length=options.length, taught=taught,
                    rules=rules)  # fmt: skip


def doctor() -> Iterator[str]:
    """Yield what this machine offers and what may be missing."""
    import torch

    for name, text in {**machine(), **versions()}.items():
        yield f"{name}: {text}"
    device = models.pick_device()
    yield f"device: {device}, number format: {str(models.pick_dtype('auto', device)).removeprefix('torch.')}"
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        yield f"cuda:{index}: {torch.cuda.get_device_name(index)}, {free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
    offer = local_machine()
    yield f"usable: {offer.cores} cores, {offer.memory / GIB:.1f} GiB of memory, {len(offer.gpus)} GPUs"
    need = placement.trial_need(_SMOLLM2, models.pick_dtype("auto", device).itemsize, 512, gpu=bool(offer.gpus))
    found = placement.decide(ClusterConfig(), (offer,), need, placement.most_workers(60))
    yield f"60 trials of a model like SmolLM2-135M: {found.summary}"
    yield f"disk: {shutil.disk_usage(Path.cwd()).free / 2**30:.0f} GiB free here"
