"""What the training of every recovery is made of: batches, learning rate, next-token loss in chunks, adapters.

What dominates the cost of a short fine-tune on small models is dealt with here. The logits over the vocabulary are
never held as a whole: loss and gradient of the output head are computed some rows at a time. The layers are those of
`decoder`, whose gradients are written by hand, with none for frozen weights. And the weights stay in the dtype of the
model (bfloat16 runs on matrix units) while AdamW works on float32 masters of what is trained. The loop is in `loop`.

Shape letters: B sequences of a step, T tokens of a sequence, N = B * T positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from adasearch.documents import value
from adasearch.errors import TrialError
from adasearch.streams import Marks
from adasearch.tuning import decoder
from adasearch.tuning.decoder import Updates
from adasearch.tuning.head import HeadRows
from adasearch.tuning.masters import Masters
from adasearch.tuning.recovery import RecoveryContext

PHASE = "recover"


@value
class TrainingConfig:
    """Settings of one run of the loop.

    Args:
        tokens: tokens to train on in all; at least one step is made.
        length: tokens T of a sequence.
        batch: sequences B of a step.
        lr: greatest learning rate.
        warmup: share of the steps during which the rate rises linearly to `lr`; then it falls along a cosine to 0.
        weight_decay: AdamW's, on matrices only.
        grad_clip: greatest norm of the gradient over everything that is trained.
        distill: weight of KL(dense || smaller) beside the next-token loss.
    """

    tokens: int
    length: int
    batch: int
    lr: float
    warmup: float = 0.1
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    distill: float = 0.0

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps, at least 1."""
        return max(1, self.tokens // (self.batch * self.length))

    @staticmethod
    def of(options: Any) -> TrainingConfig:
        """Return the run that the options of a recovery describe, which name its settings as here."""
        names = [f.name for f in dataclasses.fields(TrainingConfig) if hasattr(options, f.name)]
        return TrainingConfig(**{name: getattr(options, name) for name in names})


class Batch(NamedTuple):
    """The sequences of one step: ids B × T, and the marks of those tokens where the stream has any."""

    ids: Tensor
    marks: Marks | None = None

    def to(self, device: str | torch.device) -> Batch:
        """Return the same on a device."""
        return Batch(self.ids.to(device), None if self.marks is None else self.marks.to(device))

    @property
    def predicted(self) -> int:
        """Return how many tokens are predicted that count."""
        if self.marks is None:
            return self.ids.shape[0] * (self.ids.shape[1] - 1)
        return int(self.marks.predicted().sum())

    def part(self, sequences: slice) -> Batch:
        """Return some of its sequences."""
        marks = self.marks
        if marks is not None:
            marks = Marks(segments=marks.segments[sequences], counted=marks.counted[sequences])
        return Batch(self.ids[sequences], marks)


def batches(tokens: Tensor, config: TrainingConfig, marks: Marks | None = None, first: int = 0) -> Iterator[Batch]:
    """Yield the batches of a run in the order of the stream, which starts again where it ends.

    Args:
        tokens: 1-D stream of token ids.
        config: says how many batches of which size.
        marks: of the tokens; such a stream holds whole sequences.
        first: batches of the run that are passed over.

    Raises:
        TrialError: the stream holds fewer than two tokens, or marked ones that are no whole sequences.
    """
    if marks is not None and tokens.numel() % config.length:
        problem = f"packed tokens must be whole sequences of {config.length}, given {tokens.numel()} tokens"
        raise TrialError("config", problem, PHASE)
    if tokens.dim() != 1 or tokens.numel() < 2:
        problem = f"the recovery stream must be 1-D and hold at least 2 tokens, given shape {tuple(tokens.shape)}"
        raise TrialError("config", problem, PHASE)
    size = config.batch * config.length
    offsets = torch.arange(size)
    for step in range(first, config.steps):
        places = ((offsets + step * size) % tokens.numel()).view(config.batch, config.length)
        if marks is None:
            yield Batch(tokens[places])
        else:
            yield Batch(tokens[places], Marks(segments=marks.segments[places], counted=marks.counted[places]))


def sequences(tokens: Tensor, config: TrainingConfig) -> Iterator[Tensor]:
    """Yield the ids of `batches`, B × T each, of a stream without marks."""
    return (batch.ids for batch in batches(tokens, config))


def learning_rate(step: float, config: TrainingConfig) -> float:
    """Return the rate of step `step` (from 0): linear warmup, then a cosine that would reach 0 at the last step + 1."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))


def _log(p: Tensor) -> Tensor:
    """Return the logarithm of probabilities, of the least positive number where they underflow."""
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


class _HeadLoss(torch.autograd.Function):
    """Next-token loss of an output head whose gradients are computed along with it, chunk by chunk.

    With p the softmax of the logits, t the one-hot target and q the teacher's softmax, the loss per position is
    CE + w KL(q || p) and its gradient on the logits is (1 + w) p - t - w q. Only some rows of logits exist at a time.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: Callable[[slice], Tensor] | None,
        distill: float,
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, next-token part), both float32 scalars, for hidden N × D, weight V × D and targets N."""
        count = targets.numel()
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None  # type: ignore[attr-defined]
        nll = hidden.new_zeros((), dtype=torch.float32)
        divergence = torch.zeros_like(nll)
        room = HeadRows(weight, None, count)
        for rows, logits in room.chunks(hidden):
            for piece, wide, spare in room.pieces(logits):
                part = slice(rows.start + piece.start, rows.start + piece.stop)
                p = torch.softmax(wide, -1, out=spare)
                index = targets[part, None]
                nll -= _log(p.gather(1, index)).sum()
                if teacher is not None:
                    q = teacher(part).float().softmax(-1)
                    divergence += (q * (_log(q) - _log(p))).sum()
                    p.mul_(1.0 + distill).sub_(q, alpha=distill)
                p.scatter_add_(1, index, torch.full_like(index, -1.0, dtype=torch.float32))
                logits[piece] = p  # in the dtype of the model, in place of what it came from
            torch.mm(logits, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += (logits.T @ hidden[rows]).float()
        grad_hidden.div_(count)
        rest = () if grad_weight is None else (grad_weight.div_(count).to(weight.dtype),)
        ctx.save_for_backward(grad_hidden, *rest)
        ctx.set_materialize_grads(False)
        nll = nll / count
        ctx.mark_non_differentiable(nll)
        return nll + distill * divergence / count, nll

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of `forward`'s arguments."""
        grad_hidden, *rest = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad_hidden * grad, rest[0] * grad if rest else None, None, None, None


def _states(
    model: Any, ids: Tensor, updates: Updates | None = None, marks: Marks | None = None
) -> tuple[Tensor, Tensor]:
    """Return the last hidden states, N × D, that predict a token which counts, and the head's weight, V × D."""
    segments = None if marks is None else marks.segments
    hidden = decoder.hidden_states(model, ids, updates=updates, segments=segments)[:, :-1].flatten(0, 1)
    weight = model.get_output_embeddings().weight
    return (hidden if marks is None else hidden[marks.predicted().flatten()]), weight


def next_token_loss(
    model: nn.Module,
    ids: Tensor,
    *,
    updates: Updates | None = None,
    teacher: nn.Module | None = None,
    distill: float = 0.0,
    marks: Marks | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss to minimise and its next-token part, in nats per predicted token that counts.

    Args:
        model: causal language model that `decoder` takes, with a linear output head without bias.
        ids: token ids, B × T, T at least 2.
        updates: low-rank updates of the model's linear layers.
        teacher: model of the same vocabulary; used where `distill` is above 0.
        distill: weight of KL(teacher || model).
        marks: of `ids`, B × T; at least one token must count. None: all do, and sequences are whole.
    """
    hidden, weight = _states(model, ids, updates, marks)
    targets = ids[:, 1:].flatten() if marks is None else ids[:, 1:][marks.predicted()]
    logits = None
    if teacher is not None and distill > 0:
        with torch.no_grad():
            states, head = _states(teacher, ids, marks=marks)

        def logits(part: slice) -> Tensor:
            return states[part] @ head.T

    losses: tuple[Tensor, Tensor] = _HeadLoss.apply(hidden, weight, targets, logits, distill)  # type: ignore[no-untyped-call]
    return losses


class Adapters:
    """Low-rank updates that ride along the frozen weights of a run; strategies that change them on their way derive.

    Args:
        updates: by linear module of the model; their factors are what is trained.
    """

    def __init__(self, updates: Updates) -> None:
        self._updates = dict(updates)

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return [factor for u in self._updates.values() for factor in (u.a, u.b) if isinstance(factor, nn.Parameter)]

    def updates(self) -> Updates:
        """Return the updates of the next forward, in the graph of what is trained; made anew for every step."""
        return self._updates

    def penalty(self) -> Tensor | None:
        """Return what is added to the loss (float32 scalar), None for nothing."""
        return None

    def settled(self, step: int, steps: int) -> bool:  # noqa: ARG002 - for those that derive
        """Return whether the weights after `step` of `steps` may be the last ones: nothing is still to be taken away.

        Only such weights are kept as the best, and a run ends early in no other state.
        """
        return True

    def state(self) -> dict[str, Any]:
        """Return what this object remembers beside what is trained: tensors, numbers and lists, for `restore`."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Remember what `state` says; objects of other runs of the same model and options give it."""

    def stepped(self, step: int, ids: Tensor, masters: Masters) -> None:
        """Follow what the optimizer did; nothing here.

        Args:
            step: that was made, from 1.
            ids: its batch, B × T.
            masters: whose copies have moved, still hold their clipped gradients, and may be changed in place.
        """


@contextlib.contextmanager
def seeded(context: RecoveryContext) -> Iterator[None]:
    """Make everything drawn inside follow from the seed, and leave the generators outside as they were."""
    device = torch.device(context.device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(context.seed)
        yield
