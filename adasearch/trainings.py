"""What the sections of a trial that train are given: text, the dense model as a teacher, seed and progress.

A recovery trains the smaller model, a schedule the dense one to learn which units go, and a rule for hidden dimensions
the dense one to learn which of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

from adasearch import models
from adasearch.config import COMPONENTS
from adasearch.documents import join
from adasearch.errors import ConfigError, TrialError
from adasearch.pruning.structure import WHOLE, Outline
from adasearch.tuning import learning, sparsification
from adasearch.tuning.recovery import RecoveryContext, RecoveryReport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from adasearch.config import Component, TrialConfig
    from adasearch.pruning.learning import Learner
    from adasearch.pruning.structure import ModelStructure
    from adasearch.sections import ValidationConfig
    from adasearch.streams import TrainingText
    from adasearch.tuning.recovery import Progress
    from adasearch.workbench import Workbench

SECTIONS = {"recovery": ("recover", 0), "schedule": ("learn", 1_000_003), "hidden": ("learn", 2_000_003)}
"""Phase by section that may train, and what is added to the seed of its text: each should see its own."""

REPEATS = 2.0
"""Times that a text may be gone through before a user is told that it may be learnt by heart."""


def check(
    section: str, part: Component, structure: ModelStructure, shapes: Mapping[str, tuple[int, ...]], where: str
) -> None:
    """Make sure that a model can be trained as a section of a trial says, as far as that shows before the cut.

    Args:
        section: of `SECTIONS`.
        part: what the trial has there; the fact `check` of its entry is asked, if there is one.
        structure: of the dense model.
        shapes: of its parameters by full name.
        where: key of the section, or of the setting that made it so.

    Raises:
        ConfigError: names the key below `where`, and what must hold.
    """
    facts = COMPONENTS[section].get(part.type).facts
    names = {name: name.removesuffix(".weight") for name in shapes}
    linear = {n: shapes[key] for key, n in names.items() if n.rpartition(".")[2] in structure.lora_targets}
    try:
        if "check" in facts:
            facts["check"](part.options, linear)
    except ConfigError as error:
        key = where if where.endswith(f".{error.where}") else join(where, error.where)
        raise ConfigError(key, error.problem) from None


class Follower(Protocol):
    """Is told what goes on."""

    def enter(self, phase: str, progress: float | None = None, training: Progress | None = None) -> None:
        """Note that `phase` goes on, and how much of it is done."""


def given(
    section: str,
    config: TrialConfig,
    bench: Workbench,
    outline: Outline,
    clock: Follower,
    validation: ValidationConfig | None = None,
) -> tuple[TrainingText, RecoveryContext]:
    """Return the text, and what else is needed, for a component that trains, which is a `section` of the trial.

    With `validation` some of the text is held out. What learns from the dense model learns its predictions among the
    tokens that stay, of text in these tokens.

    Raises:
        TrialError: the text cannot be had (kind ``config``).
    """
    phase, draw = SECTIONS[section]
    part: Component = getattr(config, section)
    clock.enter(phase)
    taught = getattr(part.options, "distill", 0.0) > 0
    text = bench.recovery_text(part, config.calibration.corpus, config.seed + draw, outline, section, validation)
    context = RecoveryContext(
        seed=config.seed,
        device=str(bench.device),
        tell=lambda progress: clock.enter(phase, progress.step / progress.steps, progress),
        teacher=bench.origin.dense(Outline(tokens=outline.tokens)) if taught else None,
        marks=text.marks,
        notice=notice_of(text, validation),
    )
    return text, context


def notice_of(text: TrainingText, validation: ValidationConfig | None = None) -> str:
    """Return what a user should know of the text of a training before it has run, empty for nothing."""
    if validation is not None and text.held is not None and len(text.held.tokens) < validation.tokens / 2:
        asked = f"where {validation.tokens:,} are asked for: name a larger corpus or hold out a greater share"
        return f"the text held out has {len(text.held.tokens):,} tokens {asked}"
    if text.epochs <= REPEATS or text.held is not None:
        return ""
    return f"its text is gone through {text.epochs:.1f} times and none is held out: it may be learnt by heart"


@contextlib.contextmanager
def _phase(section: str) -> Iterator[None]:
    """Make what fails inside fail in the phase of a section; the training loop knows of recoveries alone."""
    try:
        yield
    except TrialError as error:
        raise TrialError(error.kind, error.message, SECTIONS[section][0]) from error


def of_schedule(
    config: TrialConfig, bench: Workbench, structure: ModelStructure, clock: Follower
) -> Callable[[nn.Module, Learner], RecoveryReport]:
    """Return how a schedule trains a model with a learner's gates; `structure` is that of the model."""

    def train(model: nn.Module, learner: Learner) -> RecoveryReport:
        with _phase("schedule"):
            text, context = given("schedule", config, bench, structure.outline, clock)
            return learning.learn(model, structure, text.tokens, config.schedule.options, learner, context)

    return train


def of_hidden(
    config: TrialConfig, bench: Workbench, clock: Follower, weights: dict[str, Tensor]
) -> Callable[[Tensor, int, Any], Tensor]:
    """Return how a rule for hidden dimensions trains the dense model; it puts the weights that came of it in `weights`.

    See `hidden.HiddenContext.train` for what it takes and returns.
    """

    def train(start: Tensor, number: int, options: Any) -> Tensor:
        with _phase("hidden"):
            text, context = given("hidden", config, bench, WHOLE, clock)
            base, structure = bench.base, bench.structure(config.units)
            model = models.assemble(models.empty_model(base.config), base.weights).to(bench.device)
            goal = sparsification.Goal(start, number, options)
            found = sparsification.sparsify(model, structure, text.tokens, goal, context)
            changed = dict(model.named_parameters())
            weights.update({name: changed[name].detach().to(old.device) for name, old in base.weights.items()})
            return found

    return train
