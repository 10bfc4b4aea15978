"""Sequential: each sublayer is measured, cut and compensated on what comes through everything cut before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from adasearch import models
from adasearch.pruning import calibration, compensation, importance, selection, surgery
from adasearch.pruning.plan import make_plan
from adasearch.pruning.projection import project
from adasearch.pruning.schedule import Decision, Output, ScheduleContext
from adasearch.pruning.statistics import Statistics
from adasearch.pruning.structure import Group, ModelStructure
from adasearch.registry import SCHEDULE, NoOptions

_FORWARD = frozenset({"features", "sequences", "inputs"})


class _ReachedError(Exception):
    """A forward pass came to where it need not go on."""


class _Recorder(nn.Module):
    """Stands in for a decoder layer: remembers what it is called with, and hands the residual stream on."""

    def __init__(self) -> None:
        super().__init__()
        self.given: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        self.given = {"hidden_states": hidden_states, **given}
        return hidden_states


class _Stream:
    """The residual stream of a calibration sample (N × T × D) on its way through a model, one decoder layer at a time.

    Only the states before one layer are held. What layers are given beside them (positions, masks) the model makes
    itself; it depends on the size of a batch alone, as no sequence is padded.

    Args:
        model: causal language model in the layout of transformers.
        paths: module path of every decoder layer, in order.
        tokens: N × T token ids.
    """

    def __init__(self, model: nn.Module, paths: tuple[str, ...], tokens: Tensor) -> None:
        self.tokens = tokens.numel()
        self._model = model
        self._given: dict[int, dict[str, dict[str, Any]]] = {}
        self._states: list[Tensor] = []
        layers = {path: model.get_submodule(path) for path in paths}
        recorders = {path: _Recorder() for path in paths}
        for path, recorder in recorders.items():
            model.set_submodule(path, recorder)
        for part in calibration.batches(tokens.to(next(model.parameters()).device)):
            model.base_model(input_ids=part, use_cache=False)  # type: ignore[operator]
            self._states.append(recorders[paths[0]].given["hidden_states"])
            others = {path: {k: x for k, x in r.given.items() if k != "hidden_states"} for path, r in recorders.items()}
            self._given.setdefault(len(part), others)
        for path, layer in layers.items():
            model.set_submodule(path, layer)

    def _through(self, path: str) -> Iterator[Tensor]:
        """Yield the stream behind the layer at `path`, batch by batch."""
        layer = self._model.get_submodule(path)
        for states in self._states:
            output = layer(hidden_states=states, **self._given[len(states)][path])
            yield output if isinstance(output, Tensor) else output[0]

    def advance(self, path: str) -> None:
        """Go on to behind the layer at `path`."""
        for index, states in enumerate(self._through(path)):
            self._states[index] = states

    def reach(self, path: str, module: str) -> None:
        """Send the stream into the layer at `path`, as far as the input of `module` in it."""

        def stop(*_: Any) -> None:
            raise _ReachedError

        handle = self._model.get_submodule(module).register_forward_pre_hook(stop)
        layer = self._model.get_submodule(path)
        try:
            for states in self._states:
                try:
                    layer(hidden_states=states, **self._given[len(states)][path])
                except _ReachedError:
                    continue
        finally:
            handle.remove()


def _layers(structure: ModelStructure) -> dict[str, list[Group]]:
    """Return the groups of each decoder layer, attention before the MLP, by the layer's module path, in order."""
    found: dict[str, list[Group]] = {f"model.layers.{index}": [] for index in range(structure.layers)}
    for group in structure.groups:
        found[group.name.rpartition(".")[0]].append(group)
    return found


def _output(model: nn.Module, name: str) -> Output:
    module = model.get_submodule(name)
    assert isinstance(module.weight, Tensor)
    return module.weight.detach(), None if module.bias is None else module.bias.detach()  # type: ignore[operator]


def _cut(model: nn.Module, context: ScheduleContext, name: str, width: int, statistics: Statistics) -> tuple[int, ...]:
    """Cut and compensate one group of `model` in place, by its statistics, and return the units that stay."""
    part, trial = context.part(name), context.trial
    scores, biases = context.scores(statistics, part), compensation.bias_modules(trial.compensation, part)
    plan = make_plan(part, trial.units, scores, {name: width}, biases, context.choose(statistics))
    surgery.narrow(model, part, plan)
    compensation.apply(model, part, plan, statistics, context.weights, trial.compensation)
    return plan.keep[name]


def _widths(context: ScheduleContext) -> dict[str, int]:
    scores = context.scores(context.statistics)
    ratios = context.ratios(scores, context.statistics, context.budget)
    return project(context.structure, ratios, context.budget, context.biases)


@SCHEDULE.register(compensates=True, selects=True, sources=_FORWARD, learns=False)
def decide(context: ScheduleContext, options: NoOptions) -> Decision:  # noqa: ARG001 - the set's signature
    """Go through the model layer by layer, attention before the MLP: measure, score, cut and compensate each sublayer.

    The widths follow from the dense model, as in one shot. The statistics of a sublayer are those of the features f
    that it makes of what comes through everything cut and compensated before it; units are scored by them, and the
    target of compensation is W f, the output that the sublayer would have on them if it were whole. This is the order
    of Wanda-SP (arXiv 2312.11983), SlimGPT (arXiv 2412.18110) and SlimLLM (arXiv 2505.22689).

    It costs two forward passes of the sample, and a third of its attention: each sublayer is run once to be measured,
    the MLP behind its attention, and the layer once more to go on. The states before one layer are held.

    Raises:
        ConfigError: no widths meet the budget.
        TrialError: a score, a statistic or a weight is not finite (kind ``nan``).
    """
    widths = _widths(context)
    trial, layers = context.trial, _layers(context.structure)
    chosen_by = importance.needs(trial.importance) | selection.needs(trial.selection)
    families = chosen_by | compensation.needs(trial.compensation)
    # Over the base weights themselves: `narrow` replaces what it cuts.
    model = models.assemble(models.empty_model(context.config), context.weights)
    model = model.requires_grad_(requires_grad=False).to(context.device)
    kept: dict[str, tuple[int, ...]] = {}
    outputs: dict[str, Output] = {}
    with torch.no_grad():
        stream = _Stream(model, tuple(layers), context.tokens())
        for path, groups in layers.items():
            for group in (g for g in groups if widths[g.name] < g.width):
                part = context.part(group.name)

                def run(path: str = path, module: str = group.output) -> None:
                    stream.reach(path, module)

                statistics = calibration.observe(model, part, families, run, stream.tokens)
                kept[group.name] = _cut(model, context, group.name, widths[group.name], statistics)
                outputs[group.output] = _output(model, group.output)
            stream.advance(path)
    scores = {g.name: torch.zeros(g.units) for g in context.structure.groups}
    plan = make_plan(context.structure, trial.units, scores, widths, context.biases, lambda group, *_: kept[group.name])
    return Decision(plan=plan, outputs=outputs)
