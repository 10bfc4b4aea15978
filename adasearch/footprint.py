"""What a training takes of a device's memory: weights, gradients, states, activations, from the sizes of the model.

It counts what `tuning.loop` holds at its peak, the backward pass of a step with fused attention, as a sum of parts that
do not all have their peak at the same time: what is really taken is a little less. The model counts as it was before
the cut. Not counted: on a CPU, sequences of up to 512 tokens hold their attention weights too (`decoder`), about
H (T + 128) / 2 numbers for each token and layer.

Letters, per layer: D hidden size, A query heads times their size, K key-value heads times theirs, I intermediate size;
N tokens of one forward, V vocabulary, R rank, s bytes of a weight.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from adasearch.documents import Count, Index, value
from adasearch.sections import TrainingRules

if TYPE_CHECKING:
    from adasearch.pruning.structure import ModelShape

_LOGIT_LINES, _LOGIT_BYTES = 256, 10
"""Lines of logits that exist at a time: in the number format, in float32, and their gradient."""
_EIGHT_BIT_STATES = 2 * (1 + 4 / 256)
_UPDATE_COPIES = 6
"""Float32 copies of the largest tensor that exist while its 8-bit states are read, moved and packed again."""
_BYTES = {"float32": 4, "bfloat16": 2}


@value
class Training:
    """What is trained, and how.

    Args:
        rank: of the adapters, on average; 0 trains every weight.
        batch: sequences of a step.
        length: tokens of a sequence.
        taught: the dense model is there too, to learn from.
        rules: of the run.
    """

    rank: Index = 0
    batch: Count = 8
    length: Count = 256
    taught: bool = False
    rules: TrainingRules = TrainingRules()

    @property
    def tokens(self) -> int:
        """Return the tokens of one forward in one process, N."""
        share = -(-self.batch // self.rules.processes)
        return min(share, self.rules.micro_batch or share) * self.length


@value
class Footprint:
    """Bytes by what they are for.

    Args:
        work: what exists only for a moment.
        best: the best weights so far where some text is held out; in the memory of the host, whatever trains.
    """

    weights: Index
    masters: Index
    gradients: Index
    states: Index
    activations: Index
    work: Index
    teacher: Index = 0
    best: Index = 0

    @property
    def total(self) -> int:
        """Return the sum of what lies where the model is trained."""
        parts = (self.weights, self.masters, self.gradients, self.states, self.activations, self.work, self.teacher)
        return sum(parts)


def footprint(shape: ModelShape, weight_bytes: int, training: Training) -> Footprint:
    """Return what training a model takes.

    A weight of 2 bytes that is trained needs a float32 master (4), and its gradient and states: under AdamW float32
    gradients (4) and moments (8), 18 in all; with 8-bit states its gradient stays in 2 bytes and is made float32 tensor
    by tensor, the moments take 2, 10 in all.

    Args:
        shape: of the model.
        weight_bytes: of one weight, s.
        training: what is trained, and how.
    """
    rules = training.rules
    size = _BYTES.get(rules.precision, weight_bytes)
    parameters = parameters_of(shape)
    trained = parameters if training.rank == 0 else adapter_parameters(shape, training.rank)
    eight = rules.optimizer == "adamw8bit"
    largest = max(math.prod(sizes) for sizes in shape.shapes.values()) if training.rank == 0 else 0
    kept = parameters * weight_bytes if size != weight_bytes and training.rank else 0  # frozen weights as they were
    weights = parameters * size + kept + (trained * size if training.rank else 0)
    head = training.rank == 0
    return Footprint(
        weights=weights,
        masters=0 if size == 4 else 4 * trained,
        gradients=trained * (size if eight else 4),
        states=round(trained * (_EIGHT_BIT_STATES if eight else 8)),
        activations=_activations(shape, training, size),
        work=_work(shape, training.tokens, size, head=head) + (4 * _UPDATE_COPIES * largest if eight else 0),
        teacher=parameters * weight_bytes if training.taught else 0,
        best=4 * trained if rules.validation else 0,
    )


def parameters_of(shape: ModelShape) -> int:
    """Return the elements of all parameters."""
    return sum(math.prod(sizes) for sizes in shape.shapes.values())


def logit_bytes(shape: ModelShape, tokens: int) -> int:
    """Return what the logits of `tokens` take while some lines of them exist at a time."""
    return _LOGIT_BYTES * min(tokens, _LOGIT_LINES) * shape.vocabulary


def adapter_parameters(shape: ModelShape, rank: int) -> int:
    """Return the elements of low-rank updates of all projections."""
    sides = (sizes for name, sizes in shape.shapes.items() if name.endswith("_proj.weight"))
    return sum(min(rank, *sizes) * sum(sizes) for sizes in sides)


def layer_bytes(shape: ModelShape, rank: int, size: int) -> int:
    """Return what the backward pass of one layer needs of its forward, per token.

    Both norms' inputs (2 D), queries, keys and values (A + 2 K), what was attended to (A), gate, up and silu(gate)
    (3 I); float32 scales of both norms and of each head's softmax; adapters' inner states (7 R).
    """
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    elements = 2 * shape.hidden + 2 * queries + 2 * keys + 3 * shape.intermediate + 7 * rank
    return elements * size + 4 * (2 + shape.heads)


def _activations(shape: ModelShape, training: Training, size: int) -> int:
    """Return what a forward holds for its backward; where layers are recomputed, their inputs and one of them."""
    tokens, layer = training.tokens, layer_bytes(shape, training.rank, size)
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    shared = 2 * (queries + keys) * size  # rotations
    ends = 3 * shape.hidden * size  # the last norm's input, what the head reads, and its gradient
    layers = shape.hidden * size * shape.layers + layer if training.rules.recompute else layer * shape.layers
    return tokens * (layers + shared + ends)


def _work(shape: ModelShape, tokens: int, size: int, *, head: bool) -> int:
    """Return what exists for a moment: gradients inside a layer, lines of logits, the head's float32 gradient."""
    inside = tokens * size * (4 * shape.intermediate + 4 * shape.hidden)
    return inside + logit_bytes(shape, tokens) + (4 * shape.vocabulary * shape.hidden if head else 0)
