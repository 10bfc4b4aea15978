"""Movement pruning: units whose weights move towards zero while the model is tuned go."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adasearch.documents import Index, Positive, value
from adasearch.pruning.learning import RampOptions, check_rank
from adasearch.pruning.schedule import Decision, ScheduleContext
from adasearch.pruning.schedule._learning import Ramped, Training, prior
from adasearch.registry import SCHEDULE


@value
class MovementOptions(RampOptions):
    """Settings of movement pruning beside those of all that mask on their way.

    Args:
        rank: of the updates that tune the weights meanwhile; 0 tunes all weights, which wants a far smaller `lr` and
            about 18 bytes per parameter.
        score_lr: learning rate of the scores; their ranks by the criterion, times `prior`, are the first scores.
    """

    rank: Index = 8
    score_lr: Positive = 0.05


class _Moving(Ramped):
    """Scores are trained through the masks, whose derivative by them is taken for 1."""

    def __init__(self, context: ScheduleContext, options: MovementOptions) -> None:
        super().__init__(context, options)
        # AdamW moves what it trains by the rate whatever the size of the gradient: a score is `ratio` times as fast
        self._ratio = options.score_lr / options.lr
        start = prior(context, "rank")
        self._z = {name: nn.Parameter(options.prior * part / self._ratio) for name, part in start.items()}

    def parameters(self) -> list[nn.Parameter]:
        return list(self._z.values())

    def scores(self) -> dict[str, Tensor]:
        return {name: z.detach().cpu() * self._ratio for name, z in self._z.items()}

    def gates(self, done: float) -> dict[str, Tensor]:
        chosen = self.masks(done)
        return {name: chosen.get(name, torch.ones_like(z)) + (z - z.detach()) for name, z in self._z.items()}


@SCHEDULE.register(
    options=MovementOptions, compensates=False, selects=False, sources=None, learns=True, check=check_rank
)
def decide(context: ScheduleContext, options: MovementOptions) -> Decision:
    """Return the units with the highest movement when the training ends: Sanh et al. (arXiv 2005.07683), by unit.

    A unit's output is multiplied by a mask M, 1 for the units of the highest scores S and 0 for the others, along a
    cubic ramp; through the mask the gradient goes straight to the scores, dL/dS = dL/dM, which is the sum over what the
    unit writes of dL/dW' W: S rises where weights grow away from zero, also while the unit is masked. Published for
    single weights and blocks (arXiv 2109.04838); a unit here is a block of one column or more.

    Raises:
        ConfigError: no widths meet the budget.
        TrialError: a score or a loss is not finite (kind ``nan``), or the text or the teacher cannot be had.
    """
    training, learner = Training(context), _Moving(context, options)
    context.plan(learner.scores())  # a budget that cannot be met is told before any training
    training.run(learner)
    return training.end(learner.plan())
