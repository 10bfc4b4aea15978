"""How a recovery is conducted beside what a trial says of it: rules, checkpoints, text held out, processes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from adasearch.config import Component
from adasearch.documents import fingerprint, plain, value
from adasearch.errors import TrialError
from adasearch.sections import TrainingRules
from adasearch.tuning import parallel
from adasearch.tuning.recovery import RecoveryContext
from adasearch.tuning.snapshots import Snapshots, digest

if TYPE_CHECKING:
    from adasearch.pruning.plan import PruningPlan
    from adasearch.streams import TrainingText
    from adasearch.tuning.decoder import Updates

Look = Callable[[int, int, "Updates"], None]
CHECKPOINT = "checkpoint.pt"


@value
class Conduct:
    """How a recovery is run.

    Args:
        look: see `RecoveryContext`.
        rules: of the training.
        folder: where its checkpoint goes, None for none.
        rank: of this process among those that train the model together.
        meeting: folder in which they meet, where there are several.
        notice: what a user should know before it has run, beside that of the text; empty for nothing.
    """

    look: Look | None = None
    rules: TrainingRules = TrainingRules()
    folder: Path | None = None
    rank: int = 0
    meeting: Path | None = None
    notice: str = ""


@contextlib.contextmanager
def conducted(
    conduct: Conduct, context: RecoveryContext, recovery: Component, text: TrainingText, plan: PruningPlan, model: str
) -> Iterator[RecoveryContext]:
    """Give the context of a recovery that is run as `conduct` says.

    Args:
        conduct: how.
        context: seed, device, teacher, marks.
        recovery: what is run.
        text: it reads.
        plan: of the model that is tuned.
        model: what identifies the one it was cut from.

    Raises:
        TrialError: the other processes did not come (kind ``worker_lost``), or train something else (``error``).
    """
    rules, parts, snapshots = conduct.rules, dict[str, str](), None
    if conduct.folder is not None:
        parts = {
            "base model": model,
            "plan": fingerprint(plan),
            "recovery": fingerprint(recovery.to_dict()),
            "training (validation, precision or optimizer)": fingerprint(
                [plain(rules.validation), rules.precision, rules.optimizer]
            ),
            "text": _text_key(text),
            "seed": str(context.seed),
        }
        snapshots = Snapshots(path=conduct.folder / CHECKPOINT, parts=parts)
    size = conduct.rules.processes if conduct.meeting is not None else 1
    with contextlib.ExitStack() as stack:
        try:
            group = stack.enter_context(parallel.joined(conduct.meeting or Path(), conduct.rank, size, context.device))
        except RuntimeError as error:
            problem = f"the {size} processes that train this model did not meet: {error}"
            raise TrialError("worker_lost", problem, "recover") from error
        check_agreement(group, parts)
        notice = "; ".join(filter(None, (context.notice, conduct.notice)))
        yield dataclasses.replace(
            context, look=conduct.look, rules=rules, held=text.held, snapshots=snapshots, group=group, notice=notice
        )


def check_agreement(group: parallel.Group, parts: Mapping[str, str]) -> None:
    """Return when all processes that train together have the same to train: each has cut its own copy of the model.

    Raises:
        TrialError: what is not the same, in all of them.
    """
    strange = []
    for name, found in parts.items() if group.size > 1 else ():
        own = float(int(fingerprint(found)[:12], 16))
        apart = torch.tensor([abs(own - parallel.first_says(group, own))], dtype=torch.float64)
        group.sum(apart)
        strange += [name] if apart else []
    if strange:
        problem = f"the {group.size} processes that train this model together differ in {', '.join(strange)}"
        advice = "a cut that is learnt may come out otherwise on another device: train it with processes: 1"
        raise TrialError("error", f"{problem}; {advice}", "recover")


def _text_key(text: TrainingText) -> str:
    tensors = []
    for part in (text, text.held):
        marks = None if part is None else part.marks
        tensors += [None if part is None else part.tokens]
        tensors += [None, None] if marks is None else [marks.segments, marks.counted]
    return digest(tensors)
