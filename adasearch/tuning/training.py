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
        distill: weight of KL(dense || smaller) beside the next-token loss, see `Lesson`.
        temperature: of that divergence.
        hidden: weight of the error of the last hidden states.
        hard: weight of the next-token loss where there is a teacher.
    """

    tokens: int
    length: int
    batch: int
    lr: float
    warmup: float = 0.1
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    distill: float = 0.0
    temperature: float = 1.0
    hidden: float = 0.0
    hard: float = 1.0

    @property
    def steps(self) -> int:
        """Return the number of optimizer steps, at least 1."""
        return max(1, self.tokens // (self.batch * self.length))

    @staticmethod
    def of(options: Any) -> TrainingConfig:
        """Return the run that the options of a recovery describe, which name its settings as here."""
        names = [f.name for f in dataclasses.fields(TrainingConfig) if hasattr(options, f.name)]
        return TrainingConfig(**{name: getattr(options, name) for name in names})

    def lesson(self, teacher: nn.Module | None) -> Lesson | None:
        """Return what is learnt from the dense model, None where nothing is.

        Raises:
            TrialError: something is, and there is no teacher (kind ``config``).
        """
        if self.distill == 0 and self.hidden == 0:
            return None
        if teacher is None:
            raise TrialError("config", f"distill {self.distill} needs the dense model, given none", PHASE)
        return Lesson(teacher, self.distill, self.temperature, self.hidden, self.hard)


class Lesson(NamedTuple):
    """What a model learns from a teacher: loss = hard CE + weight t^2 KL(q_t || p_t) + hidden |h - g|^2 / |g|^2.

    p_t and q_t are the softmax of the model's and of the teacher's logits over the temperature t, and t^2 keeps the
    gradient's size whatever t (Hinton et al., arXiv 1503.02531, section 2); h and g are the last hidden states, whose
    squared error counts relative to the teacher's (Puzzle, arXiv 2411.19146), at each position.

    Args:
        teacher: model of the same vocabulary.
        weight: of the divergence.
        temperature: t.
        hidden: weight of the states' error; above 0 the hidden sizes must be equal.
        hard: weight of the next-token loss CE.
    """

    teacher: nn.Module
    weight: float = 1.0
    temperature: float = 1.0
    hidden: float = 0.0
    hard: float = 1.0


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

    With p the softmax of the logits, y the one-hot target, and p_t and q_t the softmax of the logits and of the
    teacher's over the temperature t, the loss per position is a CE + w t^2 KL(q_t || p_t), and its gradient on the
    logits a (p - y) + w t (p_t - q_t). Only some rows of logits exist at a time.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        teacher: Callable[[slice], Tensor] | None,
        law: tuple[float, float, float],
    ) -> tuple[Tensor, Tensor]:
        """Return (loss, next-token part), both float32 scalars.

        Args:
            ctx: of autograd.
            hidden: N × D.
            weight: V × D.
            targets: N.
            teacher: gives the teacher's logits of some rows.
            law: (a, w, t) as above.
        """
        hard, soft, temperature = law
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
                    q = teacher(part).float().div_(temperature).softmax(-1)
                    tempered = p.clone() if temperature == 1.0 else (wide / temperature).softmax(-1)
                    divergence += (q * (_log(q) - _log(tempered))).sum()
                    p.mul_(hard).add_(tempered.sub_(q), alpha=soft * temperature)
                elif hard != 1.0:
                    p.mul_(hard)
                p.scatter_add_(1, index, torch.full_like(index, -hard, dtype=torch.float32))
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
        return hard * nll + soft * temperature**2 * divergence / count, nll

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
    lesson: Lesson | None = None,
    marks: Marks | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss to minimise and its next-token part, in nats per predicted token that counts.

    Args:
        model: causal language model that `decoder` takes, with a linear output head without bias.
        ids: token ids, B × T, T at least 2.
        updates: low-rank updates of the model's linear layers.
        lesson: what is learnt from a teacher beside the next token, None for nothing. Of the teacher only the last
            hidden states are held; its logits are made again from them, chunk by chunk.
        marks: of `ids`, B × T; at least one token must count. None: all do, and sequences are whole.
    """
    hidden, weight = _states(model, ids, updates, marks)
    targets = ids[:, 1:].flatten() if marks is None else ids[:, 1:][marks.predicted()]
    if lesson is None:
        alone: tuple[Tensor, Tensor] = _HeadLoss.apply(hidden, weight, targets, None, (1.0, 0.0, 1.0))  # type: ignore[no-untyped-call]
        return alone
    with torch.no_grad():
        states, head = _states(lesson.teacher, ids, marks=marks)

    def logits(part: slice) -> Tensor:
        return states[part] @ head.T

    law = (lesson.hard, lesson.weight, lesson.temperature)
    taught = logits if lesson.weight > 0 else None
    loss, nll = _HeadLoss.apply(hidden, weight, targets, taught, law)  # type: ignore[no-untyped-call]
    if lesson.hidden > 0:
        loss = loss + lesson.hidden * relative_error(hidden, states)
    return loss, nll


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the mean over rows of |found - wanted|^2 / |wanted|^2, float32.

    Taken row by row and not over the batch as in Puzzle, so that it is the same in parts of a batch as in the whole.
    """
    wanted = wanted.float()
    return ((found.float() - wanted).square().sum(-1) / wanted.square().sum(-1)).mean()


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

    def graded(self) -> None:
        """Look at the gradients of what is trained, as the backward pass left them; nothing here."""

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

    def stepped(self, step: int, batch: Batch, masters: Masters) -> None:
        """Follow what the optimizer did; nothing here.

        Args:
            step: that was made, from 1.
            batch: that it was made on.
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
