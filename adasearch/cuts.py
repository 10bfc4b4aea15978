"""The cut of a final model, kept on disk until the model has its record.

A cut that is learnt may take as long as the recovery behind it, and on a GPU may come out otherwise a second time: then
a checkpoint of that recovery would be of another plan.
"""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from adasearch import models
from adasearch.documents import fingerprint, parse, plain
from adasearch.pruning.plan import PruningPlan
from adasearch.pruning.surgery import skeleton
from adasearch.trial import Clock, Pruned, prune
from adasearch.tuning.snapshots import Snapshots

if TYPE_CHECKING:
    from torch import Tensor

    from adasearch.conduct import Conduct
    from adasearch.config import TrialConfig
    from adasearch.workbench import Workbench

PATTERN = "cut-*.pt"
"""Of its file's name, which tells by a fingerprint what it was cut from, and how."""


def obtain(config: TrialConfig, bench: Workbench, clock: Clock, conduct: Conduct) -> tuple[Pruned, Conduct]:
    """Return the model of a configuration after its cut, not yet recovered, and how its recovery is to be conducted.

    The cut is kept where it took longer than what may pass between two checkpoints of a training. One of another model,
    configuration, budget or calibration text is not taken, and stays as it is.

    Args:
        config: of the trial.
        bench: whose model is cut.
        clock: told what is going on.
        conduct: says where a cut is kept, and by which process; where it could not be, the one returned says so.

    Raises:
        TrialError: see `prune`.
    """
    patience = conduct.rules.save_seconds
    if conduct.folder is None or patience is None:
        return prune(config, bench, clock), conduct
    made_of = (bench.sample_key(config.calibration), config.to_dict(), plain(bench.study.budget))
    snapshots = Snapshots(path=conduct.folder / PATTERN.replace("*", fingerprint(made_of)[:12]), parts={})
    state = snapshots.load()
    if state is not None:
        return _opened(state, config, bench), conduct
    begun = clock.spent
    pruned = prune(config, bench, clock)
    if conduct.rank > 0 or clock.spent - begun < patience:
        return pruned, conduct
    weights = {name: weight.detach() for name, weight in pruned.model.named_parameters()}
    problem = snapshots.save({"plan": json.dumps(plain(pruned.plan)), "weights": weights})
    return pruned, conduct if problem is None else dataclasses.replace(conduct, notice=f"no cut: {problem}")


def _opened(state: dict[str, Any], config: TrialConfig, bench: Workbench) -> Pruned:
    plan = parse(PruningPlan, json.loads(state["plan"]), "plan")
    base, structure = bench.outlined(plan.outline), bench.structure(config.units, plan.outline)
    weights: dict[str, Tensor] = {name: weight.clone() for name, weight in state["weights"].items()}
    model = models.assemble(skeleton(base.config, structure, plan), weights).to(bench.device)
    return Pruned(model=model, structure=structure, plan=plan, base=base)
