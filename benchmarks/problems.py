"""Problems to replay optimizers on: pruning in formulas, with the structure of the real thing, and recorded trials.

`Problem` says what a search needs to know of them. `Pruned` is a made-up model: sensitivities that are smooth over
depth, ratios projected onto a budget, settings that count only under others, scores that are means over items which
all trials share, rungs that know the score more or less. Each seed is another such model. See `benchmarks/replayed.py`
for the recorded trials. Letters: L layers, G groups (an MLP and an attention for each layer), K items, P parameters.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adasearch.racing import TaskValues
from adasearch.report_rungs import spearman
from adasearch.search.parameters import CategoricalParameter, Encoding, FloatParameter, IntParameter, Parameter
from benchmarks.table import task_error, task_mean

Params = Mapping[str, Any]

BUDGET, MOST = 0.3, 0.9  # mean ratio that is removed, and the largest of a group
SPREAD, PER_TASK, TASKS = 0.03, 30, 2
COMMON = 2.0  # what all trials' scores share, in standard errors of what they do not
SECONDS = 26.2  # of a whole trial, and what follows: benchmarks/RESULTS.md, "How well each rung ranks trials"
CUT, RECOVER, SCORE = 0.221, 0.477, 0.302
RUNG_COSTS = {"divergence": 0.059, "unrecovered": 0.119, "midway": 0.059}
RUNG_RANKS = {"divergence": 0.82, "unrecovered": 0.90, "midway": 0.88}  # `midway` was not measured there
BLOCKS = (0.3, 0.6, 1.0)
_SAMPLE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A stretch of a trial.

    Args:
        name: of the stretch.
        seconds: that it takes.
        merit: what is known of the trial after it, higher is better; None where it measures nothing.
        items: how many items the merit is the mean of; 0 for other merits.
        extra: it is gone through only where its merit is wanted.
    """

    name: str
    seconds: float
    merit: float | None = None
    items: int = 0
    extra: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What a whole trial gives.

    Args:
        score: mean over tasks of the mean over items.
        stderr: its standard error over items.
        phases: in order.
        items: K values; the items of tasks alternate, so that every beginning holds them evenly.
        of_task: which task each item belongs to (K).
    """

    score: float
    stderr: float
    phases: tuple[Phase, ...]
    items: np.ndarray
    of_task: np.ndarray

    @property
    def by_task(self) -> TaskValues:
        """Return the values of the items of each task."""
        return {str(task): self.items[self.of_task == task] for task in np.unique(self.of_task)}

    @property
    def seconds(self) -> float:
        """Return what the trial costs without extra rungs."""
        return sum(phase.seconds for phase in self.phases if not phase.extra)

    @property
    def rungs(self) -> tuple[Phase, ...]:
        """Return the phases after which something is known."""
        return tuple(phase for phase in self.phases if phase.merit is not None)


class Problem:
    """A search space with trials; what the samplers of `adasearch.search` want of a space, they find here too.

    Args:
        name: of the problem.
        parameters: by name.
        conditions: of a parameter that does not always count, the other one and the values of it under which it does.
        recipes: seed trials by name.
    """

    fresh = True
    """Whether another seed scores a point on items that tell something new of it."""

    def __init__(
        self,
        name: str,
        parameters: dict[str, Parameter],
        conditions: dict[str, tuple[str, tuple[Any, ...]]],
        recipes: dict[str, dict[str, Any]],
    ) -> None:
        self.name = name
        self.parameters = parameters
        self.conditions = conditions
        self.recipes = recipes
        self.encoding = Encoding(parameters)

    def active(self, params: Params) -> frozenset[str]:
        """Return the names of the parameters that have an effect at a point."""
        held = self.conditions
        return frozenset(n for n in self.parameters if n not in held or params.get(held[n][0]) in held[n][1])

    def point_key(self, params: Params) -> str:
        """Return a text that two points share exactly if their active parameters are equal."""
        return json.dumps({name: params.get(name) for name in sorted(self.active(params))})

    def features(self, params: Params) -> np.ndarray:
        """Return the features (d) of a point; see `Encoding`."""
        return self.encoding.features(params, self.active(params))

    def evaluate(self, params: Params, seed: int) -> Outcome:
        """Return the trial at a point; the same for the same seed, which draws the items."""
        raise NotImplementedError

    def held_out(self, params: Params) -> float:
        """Return what a configuration is worth."""
        raise NotImplementedError

    @functools.cached_property
    def seconds(self) -> float:
        """Return the mean seconds of a whole trial at a random point."""
        return float(np.mean([self.evaluate(params, 0).seconds for params in self.sample(64)]))

    @functools.cached_property
    def scale(self) -> tuple[float, float]:
        """Return the held-out values of the median random point and of the best one known."""
        points = self.sample(512)
        values = np.array([self.held_out(params) for params in points])
        rng, median = np.random.default_rng(1), float(np.median(values))
        best, top = points[int(values.argmax())], float(values.max())
        for _ in range(1000):
            params = self.encoding.mutated(best, rng)
            value = self.held_out(params)
            if value > top:
                best, top = params, value
        return median, top

    def sample(self, count: int, seed: int = 0) -> list[dict[str, Any]]:
        """Return random points."""
        rng = np.random.default_rng(seed)
        return [self.encoding.from_units(rng.random(len(self.parameters))) for _ in range(count)]


def drawn(*key: object) -> np.random.Generator:
    """Return a source of random numbers that depends on `key` alone."""
    return np.random.default_rng(list(hashlib.sha256(repr(key).encode()).digest()))


def projected(shape: np.ndarray, weights: np.ndarray, mean: float = BUDGET, most: float = MOST) -> np.ndarray:
    """Return ratios (G) in proportion to `shape`, at most `most`, whose weighted mean is `mean`.

    Args:
        shape: positive (G).
        weights: share of the parameters that each group holds (G, sum 1).
        mean: of the ratios.
        most: of a ratio; not below `mean`.
    """
    order = np.argsort(-shape)
    s, w = shape[order], weights[order]
    capped = np.concatenate([[0.0], np.cumsum(w)])[:-1] * most  # what is removed where the first k are at the cap
    rest = np.cumsum((s * w)[::-1])[::-1]
    scale = (mean - capped) / rest
    k = int(np.argmax(scale * s <= most + 1e-12))  # the first k for which the next one stays below the cap
    return np.minimum(most, scale[k] * shape)


def smooth(rng: np.random.Generator, depth: np.ndarray, terms: int = 4) -> np.ndarray:
    """Return a random smooth function of depth in [0, 1]: cosines with amplitudes that fall with their frequency."""
    k = np.arange(1, terms + 1)
    return np.asarray((rng.standard_normal(terms) / k) @ np.cos(np.pi * k[:, None] * depth))


IMPORTANCE = ("wanda_sp", "flap", "act_norm", "taylor")
COMPENSATION = ("none", "bias", "least_squares")
SETTINGS: dict[str, Parameter] = {
    "importance": CategoricalParameter(choices=IMPORTANCE),
    "importance.taylor.grain": CategoricalParameter(choices=("element", "vector")),
    "compensation": CategoricalParameter(choices=COMPENSATION),
    "calibration.corpus": CategoricalParameter(choices=("c4", "alpaca", "wikipedia")),
    "calibration.samples": IntParameter(low=8, high=128, log=True),
    "recovery": CategoricalParameter(choices=("lora", "none")),
    "recovery.rank": IntParameter(low=4, high=32, log=True),
    "recovery.lr": FloatParameter(low=1e-5, high=1e-3, log=True),
}
CONDITIONS = {
    "importance.taylor.grain": ("importance", ("taylor",)),
    "recovery.rank": ("recovery", ("lora",)),
    "recovery.lr": ("recovery", ("lora",)),
}
PLAIN = {
    "importance.taylor.grain": "element", "compensation": "none", "calibration.corpus": "c4",
    "calibration.samples": 32, "recovery": "lora", "recovery.rank": 8, "recovery.lr": 1e-4,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a made-up model searches.

    Args:
        settings: by name.
        noise: standard error of a score, without what all trials share, in deviations over random points.
        mlp: number of coefficients of the profile over depth.
        attention: the same for attention.
        layers: of the model.
        free: a ratio for each group in place of the profiles.
    """

    settings: tuple[str, ...]
    noise: float
    mlp: int = 0
    attention: int = 0
    layers: int = 16
    free: bool = False


_FEW = ("importance", "importance.taylor.grain", "compensation")
FORMS = {
    "profile_5": Form(settings=_FEW, noise=0.6, mlp=1, attention=1),
    "profile_8": Form(settings=(*_FEW, "calibration.samples", "calibration.corpus"), noise=0.3, mlp=2, attention=1),
    "profile_12": Form(settings=tuple(SETTINGS), noise=0.45, mlp=2, attention=2),
    "free_50": Form(settings=("importance", "compensation"), noise=0.45, layers=24, free=True),
}


class Pruned(Problem):
    """A made-up model that is pruned; `seed` makes the model, its items and everything else that is random."""

    def __init__(self, name: str, form: Form, seed: int) -> None:
        profile = {f"mlp.{i}": 1.5 for i in range(form.mlp)} | {f"attention.{i}": 1.5 for i in range(form.attention)}
        if form.free:
            profile = {f"{kind}.{i}": 1.5 for kind in ("mlp", "attention") for i in range(form.layers)}
        parameters = {key: SETTINGS[key] for key in form.settings}
        parameters |= {key: FloatParameter(low=-bound, high=bound) for key, bound in profile.items()}
        conditions = {
            key: held for key, held in CONDITIONS.items() if key in form.settings and held[0] in form.settings
        }
        plain = {key: PLAIN[key] for key in form.settings if key != "importance"} | dict.fromkeys(profile, 0.0)
        super().__init__(name, parameters, conditions, {kind: {"importance": kind, **plain} for kind in IMPORTANCE})
        self._form, self._seed = form, seed
        self._truth = _Model(form, drawn(name, seed, "truth"))
        self._other = _Model(form, drawn(name, seed, "other"))
        sample = self.sample(_SAMPLE, seed=seed)
        self._true_scale = _scale(np.array([self._truth.quality(self._effective(p)) for p in sample]))
        self._other_scale = _scale(np.array([self._other.quality(self._effective(p)) for p in sample]))
        z = np.array([self._standard(p) for p in sample])
        doubt = np.array([self._doubt(p, "divergence") for p in sample])
        self._doubts = {name: _calibrated(z, doubt, rank) for name, rank in RUNG_RANKS.items()}

    def _effective(self, params: Params) -> dict[str, Any]:
        """Return the settings that act, those that are not searched being plain."""
        active = self.active(params)
        return {**PLAIN, **{name: params[name] for name in active}}

    def _standard(self, params: Params) -> float:
        """Return the quality in standard deviations over random points."""
        mean, spread = self._true_scale
        return (self._truth.quality(self._effective(params)) - mean) / spread

    def _doubt(self, params: Params, rung: str) -> float:
        """Return what a rung takes for quality and is not: half that of another model, half chance, of variance 1."""
        mean, spread = self._other_scale
        chance = drawn(self.name, self._seed, rung, self.point_key(params)).standard_normal()
        other = (self._other.quality(self._effective(params)) - mean) / spread
        return float(math.sqrt(0.5) * other + math.sqrt(0.5) * chance)

    def held_out(self, params: Params) -> float:
        """Return the mean over endlessly many items."""
        return 0.4 + SPREAD * self._standard(params)

    def evaluate(self, params: Params, seed: int) -> Outcome:
        """Return the trial at a point: K item values m + b[k] + e[i, k], b shared by all trials of a seed."""
        count = PER_TASK * TASKS
        error = self._form.noise * SPREAD * math.sqrt(count)
        of_task = np.tile(np.arange(TASKS), PER_TASK)
        shared = COMMON * error * drawn(self.name, self._seed, seed, "items").standard_normal(count)
        rng = drawn(self.name, self._seed, seed, self.point_key(params))
        items = self.held_out(params) + shared + error * rng.standard_normal(count)
        return Outcome(
            score=float(task_mean(items, of_task)),
            stderr=float(task_error(items, of_task)),
            phases=self._phases(params, items, of_task, rng),
            items=items,
            of_task=of_task,
        )

    def _phases(
        self, params: Params, items: np.ndarray, of_task: np.ndarray, rng: np.random.Generator
    ) -> tuple[Phase, ...]:
        found = self._effective(params)
        luck = functools.partial(rng.lognormal, 0.0, 0.2)
        recover = RECOVER * (0.05 if found["recovery"] == "none" else (found["recovery.rank"] / 8) ** 0.2)
        cut = CUT * (found["calibration.samples"] / 32) ** 0.5
        z = self._standard(params)

        def rung(name: str) -> Phase:
            guess = z + self._doubts[name] * self._doubt(params, name)
            score = 0.35 + SPREAD * guess
            merit = score if name == "unrecovered" else -1.5 * math.exp(-0.4 * guess)  # a divergence has a heavy tail
            return Phase(name=name, seconds=SECONDS * RUNG_COSTS[name] * luck(), merit=merit, extra=True)

        blocks = scored(items, of_task, SECONDS * SCORE)
        return (
            Phase(name="cut", seconds=SECONDS * cut * luck()), rung("divergence"), rung("unrecovered"),
            Phase(name="recover_short", seconds=SECONDS * recover / 3 * luck()), rung("midway"),
            Phase(name="recover_rest", seconds=SECONDS * recover * 2 / 3 * luck()), *blocks,
        )  # fmt: skip


def scored(items: np.ndarray, of_task: np.ndarray, seconds: float) -> tuple[Phase, ...]:
    """Return the phases in which items are scored, in `BLOCKS`; their merits are means over the first items."""
    found, done = [], 0.0
    for share in BLOCKS:
        count = round(share * len(items))
        merit = float(task_mean(items[:count], of_task[:count]))
        name = f"recovered_{100 * share:.0f}"
        found.append(Phase(name=name, seconds=(share - done) * seconds, merit=merit, items=count))
        done = share
    return tuple(found)


def _scale(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), float(values.std())


def _calibrated(truth: np.ndarray, doubt: np.ndarray, rank: float) -> float:
    """Return how much of `doubt` makes `truth` correlate with what it was as strongly as `rank` (Spearman)."""
    low, high = 0.0, 16.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if float(spearman(truth, truth + middle * doubt)) > rank else (low, middle)
    return low


class _Model:
    """Sensitivities and effects of settings, drawn once."""

    def __init__(self, form: Form, rng: np.random.Generator) -> None:
        layers = form.layers
        depth = (np.arange(layers) + 0.5) / layers
        self._form = form
        self._weights = np.repeat([0.75, 0.25], layers) / layers
        ends = 0.8 * (np.exp(-12 * depth) + 0.5 * np.exp(-12 * (1 - depth)))
        common = np.concatenate([smooth(rng, depth) + ends, smooth(rng, depth) + ends + 0.5 * rng.standard_normal()])
        self._sensitivity = {
            kind: np.exp(common + 0.4 * np.concatenate([smooth(rng, depth), smooth(rng, depth)]))
            for kind in IMPORTANCE
        }  # fmt: skip
        self._basis = np.array([np.cos(np.pi * k * depth) for k in range(5)])

        def effect(names: Any, size: float) -> dict[Any, float]:
            return {name: size * float(rng.standard_normal()) for name in names}

        self._importance = effect(IMPORTANCE, 0.10)
        self._grain = effect(("element", "vector"), 0.05)
        gains = rng.normal((0.95, 0.86), (0.03, 0.05), (len(IMPORTANCE), 2))
        self._gain = {
            kind: dict(zip(COMPENSATION, (1.0, *gain), strict=True))
            for kind, gain in zip(IMPORTANCE, gains, strict=True)
        }
        self._corpus = {kind: effect(("c4", "alpaca", "wikipedia"), 0.04) for kind in IMPORTANCE}
        self._rate = math.log(1e-4) + 0.6 * rng.standard_normal()

    def ratios(self, params: Params) -> np.ndarray:
        """Return the ratio of each group (2 L), MLPs first, their weighted mean being the budget."""
        form = self._form
        if form.free:
            logs = np.array([params[f"{kind}.{i}"] for kind in ("mlp", "attention") for i in range(form.layers)])
        else:
            mlp = sum((params[f"mlp.{i}"] * self._basis[i + 1] for i in range(form.mlp)), np.zeros(form.layers))
            attention = [params[f"attention.{i}"] * self._basis[i] for i in range(form.attention)]
            logs = np.concatenate([mlp, sum(attention, np.zeros(form.layers))])
        return projected(np.exp(logs), self._weights)

    def quality(self, params: Params) -> float:
        """Return the negative loss: sum of weight * sensitivity * r^2 / (1 - r), and what the settings do to it.

        It is in units of the loss of equal ratios; a long recovery wins a part of it back.
        """
        kind = params["importance"]
        s, r = self._sensitivity[kind], self.ratios(params)
        even = BUDGET**2 / (1 - BUDGET)
        loss = float((self._weights * s * r**2 / (1 - r)).sum() / ((self._weights * s).sum() * even))
        loss = loss * self._gain[kind][params["compensation"]] + self._importance[kind]
        loss += self._grain[params["importance.taylor.grain"]] if kind == "taylor" else 0.0
        loss += self._corpus[kind][params["calibration.corpus"]] + 0.3 / math.sqrt(params["calibration.samples"])
        if params["recovery"] == "lora":
            away = (math.log(params["recovery.lr"]) - self._rate) / 1.2
            loss -= 0.25 * (1 - math.exp(-params["recovery.rank"] / 8)) * math.exp(-0.5 * away**2)
        return -math.log1p(max(loss, -0.5))


def analytic(name: str) -> Callable[[int], Problem]:
    """Return what makes the made-up model of a seed, for one of `FORMS`."""
    return functools.partial(Pruned, name, FORMS[name])
