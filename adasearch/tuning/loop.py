"""The training loop that every recovery shares: steps, measurements on text held out, checkpoints, an end.

How it is run say `TrainingRules`, whatever is trained. A run that is resumed from a checkpoint goes on as it would
have, bit for bit where the machine's arithmetic is repeatable: weights, optimizer, random numbers, what adapters
remember, the place in the text, losses, and the best weights are all in it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adasearch.errors import TrialError
from adasearch.tuning import decoder
from adasearch.tuning.masters import Masters, computing_in
from adasearch.tuning.parallel import Alone, first_says
from adasearch.tuning.recovery import Progress, RecoveryContext, RecoveryReport
from adasearch.tuning.training import PHASE, Adapters, Batch, TrainingConfig, batches, learning_rate, next_token_loss


def train(
    model: nn.Module,
    masters: Masters,
    tokens: Tensor,
    config: TrainingConfig,
    context: RecoveryContext,
    adapters: Adapters | None = None,
) -> RecoveryReport:
    """Train what `masters` holds on the stream and return what happened; call it inside `seeded`.

    Args:
        model: causal language model; only parameters that require a gradient change.
        masters: of those parameters.
        tokens: 1-D stream of token ids.
        config: the run.
        context: progress callback, device, teacher, marks of the tokens, how the training is run.
        adapters: low-rank updates of the model's linear layers, None for none.

    Raises:
        TrialError: kind ``nan`` where a loss or gradient is not finite; kind ``config`` where the stream is too short,
            a teacher is missing, a checkpoint is of another run, or the time does not do.
    """
    course = _Course(model, masters, config, context, adapters)
    with course.open():
        for drawn in batches(tokens, config, context.marks, course.first):
            if course.ended:
                break
            course.advance(drawn.to(context.device))
        course.close()
    return course.report(tokens.numel())


class _Course:
    """One run of the loop, from its beginning or a checkpoint to its end; arguments are those of `train`."""

    def __init__(
        self,
        model: nn.Module,
        masters: Masters,
        config: TrainingConfig,
        context: RecoveryContext,
        adapters: Adapters | None,
    ) -> None:
        self._model, self._masters, self._config, self._context = model, masters, config, context
        self._riding, self._hooked = adapters or Adapters({}), adapters is not None
        self._rules, self._group = context.rules, context.group or Alone()
        self._watch = _Watch(context) if context.held is not None and context.rules.validation is not None else None
        self._losses: list[float] = []
        self._warning, self.ended = context.notice, ""
        self.first, self._before = 0, 0.0
        self._begun = self._saved = time.monotonic()
        self._seed = torch.initial_seed()

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Make ready what the rules ask for, and go on from a checkpoint if there is one."""
        with (
            decoder.recomputing(self._rules.recompute),
            computing_in(self._model, self._masters, self._rules.precision),
        ):
            self._masters.prepare(self._rules)
            snapshots = self._context.snapshots
            state = snapshots.load() if snapshots is not None and self._saves else None
            if state is not None:
                self._restore(state)
            self._begun = self._saved = time.monotonic()
            yield

    @property
    def _saves(self) -> bool:
        return self._context.snapshots is not None and self._rules.save_seconds is not None

    @property
    def _step(self) -> int:
        return len(self._losses)

    @property
    def _spent(self) -> float:
        """Return the seconds of training, those before a checkpoint included."""
        return self._before + time.monotonic() - self._begun

    def advance(self, batch: Batch) -> None:
        """Make one step, and whatever is due after it."""
        spent = first_says(self._group, self._spent)
        limit = self._rules.seconds
        done = max(self._step, spent / limit * self._config.steps if limit else 0.0)
        if self._group.rank > 0:  # dropout differs between the processes; a checkpoint holds the state of the first
            torch.manual_seed((self._seed + (self._group.rank << 32) + self._step) % 2**63)
        total, nll = self._gradients(batch)
        step = self._step + 1
        stepped = functools.partial(self._riding.stepped, step, batch, self._masters) if self._hooked else None
        norm = self._masters.step(learning_rate(min(done, self._config.steps), self._config), stepped)
        self._losses.append(nll)
        if not (math.isfinite(total) and math.isfinite(norm)):
            where = f"step {step} of {self._config.steps}"
            problem = f"the loss must stay finite, given {total} (gradient norm {norm}) at {where}"
            raise TrialError("nan", f"{problem}, lr {self._config.lr}", PHASE)
        self._tell(nll)
        self._look()
        self._measure()
        self._end_in_time(first_says(self._group, self._spent))
        if self._saves and first_says(self._group, time.monotonic() - self._saved) >= (self._rules.save_seconds or 0.0):
            self._save()

    def _gradients(self, batch: Batch) -> tuple[float, float]:
        """Leave the gradients of a batch with the masters, and return its loss and the next-token part of it.

        The batch is split among the processes, and each share into parts that fit into memory. A part counts by its
        tokens, so that all of them together are the batch.
        """
        sizes = [len(share) for share in torch.arange(len(batch.ids)).tensor_split(self._group.size)]
        begin, size = sum(sizes[: self._group.rank]), sizes[self._group.rank]
        micro = self._rules.micro_batch or size
        whole, sums = batch.predicted, torch.zeros(2, dtype=torch.float64)
        for start in range(begin, begin + size, max(1, micro)):
            part = batch.part(slice(start, min(start + micro, begin + size)))
            if not part.predicted:
                continue
            share = part.predicted / whole
            total, nll = _loss(self._model, part, self._riding, self._config, self._context)
            (total if share == 1.0 else total * share).backward()  # type: ignore[no-untyped-call]
            self._riding.graded()
            sums += torch.stack((total.detach(), nll)).cpu().double() * share
            if share < 1.0:
                self._masters.gather()
        if self._group.size > 1:
            self._group.sum(sums)
            self._masters.reduce(self._group)
        return float(sums[0]), float(sums[1])

    def _tell(self, loss: float) -> None:
        step, steps, context = self._step, self._config.steps, self._context
        if context.tell is not None:
            passed = max(time.monotonic() - self._begun, 1e-9)
            pace = (step - self.first) / passed
            left, rules = (steps - step) / pace, self._rules
            left = left if rules.seconds is None else max(0.0, min(left, rules.seconds - self._spent))
            tokens = pace * self._config.batch * self._config.length
            whole = max(step, min(steps, step + round(left * pace)))
            context.tell(Progress(step=step, steps=whole, loss=loss, tokens_per_second=tokens, seconds_left=left,
                                  warning=self._warning))  # fmt: skip

    def _look(self) -> None:
        if self._context.look is not None and self._step < self._config.steps:
            with torch.no_grad():
                self._context.look(self._step, self._config.steps, decoder.without_dropout(self._riding.updates()))

    def _measure(self) -> None:
        """Measure the loss on the text held out where that is due, keep the best weights, and end without progress."""
        watch = self._watch
        if watch is None or not watch.due(self._step, self._config.steps, self.ended):
            return
        loss = watch.measure(self._model, self._riding, self._config)
        loss = first_says(self._group, loss)
        if watch.enter(self._step, loss, self._riding.settled(self._step, self._config.steps)):
            watch.keep(self._masters.copies, self._riding.state())
        if watch.patience_is_out:
            self.ended = f"no lower loss on the text held out in {watch.stale} measurements"

    def _end_in_time(self, spent: float) -> None:
        """End the run where its time is over.

        Raises:
            TrialError: a recovery that takes something away will not be done with that in time (kind ``config``).
        """
        limit, step, steps = self._rules.seconds, self._step, self._config.steps
        if limit is None or step == steps or spent < limit / 2:
            return
        if not self._riding.settled(min(steps, int(step * max(1.0, limit / spent))), steps):
            problem = f"{limit:g} s are too little for a recovery that takes away what it must by a share of its steps"
            given = f"{step} of {steps} steps took {spent:.0f} s"
            raise TrialError("config", f"seconds: {problem}: {given}; give more seconds or fewer tokens", PHASE)
        if spent >= limit and self._riding.settled(step, steps):
            self.ended = self.ended or f"its time of {limit:g} s was over"

    def close(self) -> None:
        """Measure where the run ended, save that, and go back to the best weights."""
        watch = self._watch
        if watch is not None and (not watch.curve or watch.curve[-1][0] != self._step):
            self._measure()
        if self._saves and self._spent > (self._rules.save_seconds or 0.0) and self._step > self.first:
            self._save()
        if watch is not None and watch.kept is not None and watch.best[0] != self._step:
            self._masters.take(watch.kept["weights"])
            self._riding.restore(watch.kept["adapters"])

    def report(self, length: int) -> RecoveryReport:
        """Return what happened, on a stream of `length` tokens."""
        trained = self._step * self._config.batch * self._config.length
        watch = self._watch
        return RecoveryReport(
            losses=tuple(self._losses),
            tokens=trained,
            seconds=self._spent,
            epochs=trained / length,
            validation=tuple(watch.curve) if watch else (),
            best=watch.best[0] if watch and watch.kept is not None and watch.best[0] != self._step else 0,
            ended=self.ended,
        )

    def _save(self) -> None:
        """Write a checkpoint. Where that cannot be, the former one stays, and the training goes on with a warning."""
        assert self._context.snapshots is not None
        if self._group.rank == 0:
            problem = self._context.snapshots.save(self._state())
            self._warning = self._context.notice if problem is None else f"no checkpoint: {problem}"
        self._saved = time.monotonic()

    def _state(self) -> dict[str, Any]:
        return {
            "losses": self._losses,
            "seconds": self._spent,
            "ended": self.ended,
            "masters": self._masters.state(),
            "adapters": self._riding.state(),
            "random": _random_state(self._context.device),
            "watch": None if self._watch is None else self._watch.state(),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        self._losses, self._before = list(state["losses"]), float(state["seconds"])
        self.first = self._step
        self._masters.restore(state["masters"])
        self._riding.restore(state["adapters"])
        if self._group.rank == 0:
            _set_random_state(state["random"], self._context.device)
        if self._watch is not None and state["watch"] is not None:
            self._watch.restore(state["watch"])
            if self._watch.patience_is_out:
                self.ended = state["ended"]
        self._end_in_time(self._before)  # of which there may be more now


class _Watch:
    """The loss on text held out in the course of a run, and the weights where it was least."""

    def __init__(self, context: RecoveryContext) -> None:
        assert context.held is not None
        assert context.rules.validation is not None
        self._context, self._held, self._rules = context, context.held, context.rules.validation
        self.curve: list[tuple[int, float]] = []
        self.best = (0, math.inf)
        self.kept: dict[str, Any] | None = None
        self.stale = 0

    def due(self, step: int, steps: int, ended: str) -> bool:
        """Return whether the loss is to be measured after `step` of `steps`."""
        return step % self._rules.every == 0 or step == steps or bool(ended)

    def measure(self, model: nn.Module, riding: Adapters, config: TrainingConfig) -> float:
        """Return the mean next-token loss over all text held out, nats per token that counts; inf if not finite."""
        total = count = 0.0
        size = self._context.rules.micro_batch or config.batch
        lines = self._held.tokens.view(-1, config.length)
        marks = None if self._held.marks is None else self._held.marks.lines(config.length)
        every = Batch(lines, marks)
        with torch.no_grad():
            updates = decoder.without_dropout(riding.updates())
            for start in range(0, len(lines), size):
                part = every.part(slice(start, start + size))
                if part.predicted:
                    there = part.to(self._context.device)
                    _, nll = next_token_loss(model, there.ids, updates=updates, marks=there.marks)
                    total, count = total + float(nll) * part.predicted, count + part.predicted
        return total / count if math.isfinite(total) else math.inf

    def enter(self, step: int, loss: float, settled: bool) -> bool:  # noqa: FBT001 - a fact beside the others
        """Enter a measurement, and return whether to keep its weights: the best of those that may be the last."""
        self.curve.append((step, loss))
        if not settled:
            return False
        better = loss < self.best[1]
        self.best = (step, loss) if better else self.best
        self.stale = 0 if better else self.stale + 1
        return better

    def keep(self, weights: Sequence[Tensor], adapters: Any) -> None:
        """Keep weights as the best ones, in the memory of the last that were kept."""
        held = self.kept["weights"] if self.kept else [torch.empty_like(w, device="cpu") for w in weights]
        for there, weight in zip(held, weights, strict=True):
            there.copy_(weight.detach())
        self.kept = {"weights": held, "adapters": copy.deepcopy(adapters)}

    @property
    def patience_is_out(self) -> bool:
        """Return whether so many measurements in a row were no better that the run should end."""
        return self._rules.patience is not None and self.stale >= self._rules.patience

    def state(self) -> dict[str, Any]:
        """Return what `restore` takes over."""
        return {"curve": self.curve, "best": self.best, "kept": self.kept, "stale": self.stale}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where the run was that gave `state`."""
        self.curve = [(int(step), float(loss)) for step, loss in state["curve"]]
        self.best = (int(state["best"][0]), float(state["best"][1]))
        self.kept, self.stale = state["kept"], int(state["stale"])


def _loss(
    model: nn.Module, batch: Batch, riding: Adapters, config: TrainingConfig, context: RecoveryContext
) -> tuple[Tensor, Tensor]:
    """Return the loss of sequences, the penalty of what is trained included, and the next-token part of it."""
    total, nll = next_token_loss(
        model,
        batch.ids,
        updates=riding.updates(),
        lesson=config.lesson(context.teacher),
        marks=batch.marks,
    )
    penalty = riding.penalty()
    return (total if penalty is None else total + penalty), nll


def _random_state(device: str) -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(device)
    return found


def _set_random_state(state: dict[str, Tensor], device: str) -> None:
    torch.set_rng_state(state["cpu"].clone())
    if "cuda" in state and torch.device(device).type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].clone(), device)
