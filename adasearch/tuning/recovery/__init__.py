"""Ways to make a cut model better again; an open set, one file each.

Signature of an entry::

    recover(model: nn.Module, structure: ModelStructure, tokens: LongTensor, options, context: RecoveryContext)
        -> RecoveryReport

`tokens` is a 1-D stream; where `RecoveryContext.marks` is given, it says which of them belong together and which
count, and `loop.train` heeds it. The model is changed in place and is left in eval mode, of the dtype and shapes it
had, with adapters merged and nothing that requires a gradient, also where an error is raised. Loss that is not finite
raises ``TrialError("nan", ..., "recover")``. Entries that train have the options of `sections.TuningOptions`, read by
the trial, which fetches the stream: `corpus` None means the corpus of the calibration. An option `distill` above 0 asks
for the dense model in the context.

How a training is run say `RecoveryContext.rules`; `loop.train` heeds them for every entry: checkpoints, text held out,
parts of a batch, number format, optimizer, processes. So whatever an entry's `Adapters` remember beside what is trained
is in their `state`, and while something is still to be taken away they are not `settled`.

Fact `check`: what is wrong with the options for projections of given shapes, ``check(options, shapes)``; it raises a
ConfigError that names the setting. It is asked with the dense model's shapes before any work (`trainings.check`).

Fact `adapters`: True where what is trained are low-rank updates, which `RecoveryContext.keep` gets before the merge.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from adasearch.documents import value
from adasearch.sections import TrainingRules

if TYPE_CHECKING:
    from torch import nn

    from adasearch.streams import Marks, TrainingText
    from adasearch.tuning.decoder import Updates
    from adasearch.tuning.parallel import Group
    from adasearch.tuning.snapshots import Snapshots


@value
class Progress:
    """Where a training stands.

    Args:
        step: steps that are done.
        steps: of the whole run, less where its time ends first.
        loss: next-token loss of the last step, nats per token.
        tokens_per_second: since the run began or was resumed, over all processes.
        seconds_left: what is to be expected at that pace.
        warning: what the user should know, such as a checkpoint that could not be written; empty for nothing.
    """

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float
    warning: str = ""


@value
class RecoveryContext:
    """What a recovery needs beside model, structure, tokens and options.

    Args:
        seed: decides initial adapters and dropout.
        device: where the model lies.
        teacher: the dense model, needed only where the option `distill` is above 0.
        marks: of `tokens`, for documents that are packed, or counted in part; None is a plain stream.
        look: called after each step but the last with (steps done, steps, low-rank updates that are not merged yet); it
            may measure the model, and raise to stop the training.
        keep: called with the finished updates (float32) just before they are merged, where there are some.
        rules: how the training is run.
        held: what it is measured on where `rules.validation` asks for it; none of it is in what it trains on.
        snapshots: where checkpoints go, None for nowhere.
        group: the processes that train together, None for this one alone.
        tell: called after each step with where the training stands; it may raise to stop it.
        notice: what the user should know of this training from its first step on, empty for nothing.
    """

    seed: int = 0
    device: str = "cpu"
    teacher: nn.Module | None = None
    marks: Marks | None = None
    look: Callable[[int, int, Updates], None] | None = None
    keep: Callable[[Updates], None] | None = None
    rules: TrainingRules = TrainingRules()
    held: TrainingText | None = None
    snapshots: Snapshots | None = None
    group: Group | None = None
    tell: Callable[[Progress], None] | None = None
    notice: str = ""


@value
class RecoveryReport:
    """What a recovery did.

    Args:
        losses: mean next-token loss of each step, in nats per token, before that step's update.
        tokens: tokens that were trained on.
        seconds: wall time.
        epochs: how often the stream was gone through; `trial.recover` counts how often its text was, and of a mixture
            the corpus that was read most often.
        dropped: documents that were left out of the stream because a report item stands in them.
        validation: loss on the text held out by steps done, where any was.
        best: steps done where the weights were that were kept, 0 where the last ones were.
        ended: why the run ended before all tokens were seen, empty where it did not.
    """

    losses: tuple[float, ...] = ()
    tokens: int = 0
    seconds: float = 0.0
    epochs: float = 0.0
    dropped: int = 0
    validation: tuple[tuple[int, float], ...] = ()
    best: int = 0
    ended: str = ""
