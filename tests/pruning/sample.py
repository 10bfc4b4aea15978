"""A tiny model with its structure, tokens and recorded activations: what the tests of scores and compensation share."""

import dataclasses
import functools
from types import SimpleNamespace

import torch

from adasearch.config import Component, TrialConfig
from adasearch.pruning import calibration, surgery
from adasearch.pruning.plan import make_plan
from adasearch.pruning.schedule import ScheduleContext, needs
from adasearch.pruning.statistics import STREAM, Statistics
from adasearch.pruning.structure import Group, ModelStructure, Slice
from adasearch.registry import ALLOCATION, COMPENSATION, IMPORTANCE
from adasearch.sections import BudgetConfig
from adasearch.tuning.learning import learn
from adasearch.tuning.recovery import RecoveryContext
from tests.tiny import VOCABULARY, tiny_config, tiny_structure, tiny_weights

NEEDS = frozenset({"moments", "covariance", "votes", "inputs", "gradient", "fisher"})


def tokens(samples=5, length=12, seed=0):
    return torch.randint(3, VOCABULARY, (samples, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def sample(attention="kv_group", dtype=torch.float64, family="llama", **changes):
    """Dense model, weights, structure, units, tokens and all statistics; shared, so not to be changed."""
    config = tiny_config(family, **changes)
    structure, units = tiny_structure(config, attention)
    weights = tiny_weights(config, dtype)
    dense = make_plan(structure, units, {}, {})
    model = surgery.cut(config, weights, structure, dense)
    own, other = (calibration.collect(model, structure, tokens(seed=seed), NEEDS) for seed in (0, 1))
    # As if the second sample were of the corpus that `two_corpora` looks at by default.
    statistics = dataclasses.replace(own, others={"stdlib": other})
    return SimpleNamespace(
        config=config,
        structure=structure,
        units=units,
        weights=weights,
        model=model,
        tokens=tokens(),
        statistics=statistics,
    )


STEPS = {"tokens": 120, "length": 10, "batch": 3}  # four of them
QUICK = {
    "mask_regression": {"type": "mask_regression", "masks": 8, "steps": 2, "sequences": 2},
    "gates": {"type": "gates", **STEPS},
    "lora_prune": {"type": "lora_prune", "every": 1, **STEPS},
    "movement": {"type": "movement", "every": 1, **STEPS},
}


def schedule_context(case, schedule, remove=0.2, weights=None, budget_of=None, **parts):
    """What a schedule decides from on a sample's model: parts of a trial by section, statistics fresh and no more
    than needed."""
    units = {"attention": case.units.attention, "mlp": case.units.mlp}
    told = {"calibration": {"corpus": "none"}, "units": units, "schedule": QUICK.get(str(schedule), schedule), **parts}
    trial = TrialConfig.from_dict(told, "trial")

    def train(model, learner):
        context = RecoveryContext(seed=trial.seed, teacher=case.model)
        return learn(model, case.structure, case.tokens.flatten(), trial.schedule.options, learner, context)

    return ScheduleContext(
        train=train,
        config=case.config,
        weights=weights or case.weights,
        structure=case.structure,
        statistics=calibration.collect(case.model, case.structure, case.tokens, needs(trial)),
        tokens=lambda: case.tokens,
        trial=trial,
        budget=BudgetConfig(remove=remove, **(budget_of or {})),
        device=torch.device("cpu"),
    )


def activations(model, module, batch):
    """Input features of a module over all tokens (T × F, float64)."""
    seen = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)
    handle.remove()
    return torch.cat(seen).flatten(0, 1).double()


def sequence_gradients(model, batch):
    """Gradient of the mean next-token cross-entropy of each sequence, by parameter name (N × shape)."""
    found = {}
    for sequence in batch:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        model.zero_grad()
        logits = model(input_ids=sequence[None], use_cache=False).logits[0]
        log_p = logits.log_softmax(-1)
        loss = -sum(log_p[t, sequence[t + 1]] for t in range(len(sequence) - 1)) / (len(sequence) - 1)
        loss.backward()
        for name, parameter in model.named_parameters():
            found.setdefault(name, []).append(parameter.grad.clone())
    return {name: torch.stack(items) for name, items in found.items()}


def component(kind, name, **options):
    entry = {"importance": IMPORTANCE, "allocation": ALLOCATION, "compensation": COMPENSATION}[kind].get(name)
    return Component(type=name, options=entry.options(**options))


def made_structure(layers, *, channels=40, heads=3, channel_cost=30, head_cost=400, partitions=1, biases=24):
    """Structure of a model that does not exist: numbers alone."""
    groups = []
    for layer in range(layers):
        attention = f"model.layers.{layer}.self_attn"
        mlp = f"model.layers.{layer}.mlp"
        for name, kind, units, parts, cost, out in (
            (attention, "attention", heads * partitions, partitions, head_cost, "o_proj"),
            (mlp, "mlp", channels, 1, channel_cost, "down_proj"),
        ):
            part = Slice(parameter=f"{name}.{out}.weight", dim=1, block=1)
            groups.append(
                Group(
                    name=name,
                    layer=layer,
                    kind=kind,
                    unit="made",
                    units=units,
                    partitions=parts,
                    slices=(part,),
                    output=f"{name}.{out}",
                    unit_cost=cost,
                )
            )
    embedding = 1000
    return ModelStructure(
        family="made",
        layers=layers,
        groups=tuple(groups),
        parameters=embedding + 7 * layers + sum(g.units * g.unit_cost for g in groups),
        embedding_parameters=embedding,
        output_biases={g.output: biases for g in groups},
        lora_targets=(),
    )


def made_statistics(structure, seed=0):
    """Moments of every output projection and cosines of every layer and sublayer, at random."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for group in structure.groups:
        features = group.units * group.output_block
        tensors[f"moments/{group.output}/mean"] = torch.randn(features, generator=generator, dtype=torch.float64)
        m2 = torch.randn(features, generator=generator, dtype=torch.float64).exp() * 100
        tensors[f"moments/{group.output}/m2"] = m2
        for place in (group.name, group.name.rpartition(".")[0]):
            cosine = 0.5 + torch.rand((), generator=generator, dtype=torch.float64) / 2
            tensors[f"cosine/{place}/mean"] = cosine
    return Statistics(tokens=100, tensors=tensors)


def made_weights(structure, seed=0, rows=8):
    """Weights of the output projections (rows × features), at random with a few large entries."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for group in structure.groups:
        noise = torch.randn(rows, group.units * group.output_block, generator=generator)
        weights[f"{group.output}.weight"] = noise.pow(3)
    return weights


def budget(remove=0.2, **more):
    return BudgetConfig(remove=remove, **more)


def made_boundaries(layers, seed=0):
    """Cosines and angles between all layer boundaries, at random, by the keys of `Statistics`."""
    generator = torch.Generator().manual_seed(seed)
    cosine = torch.rand(layers + 1, layers + 1, generator=generator, dtype=torch.float64)
    tensors = {"cosine": cosine, "angle": torch.rand(cosine.shape, generator=generator, dtype=torch.float64)}
    return {f"boundaries/{STREAM}/{name}": item for name, item in tensors.items()}
