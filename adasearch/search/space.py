"""The search space: named parameters and the trials that their values stand for.

A dimension lies at a dotted path into a trial:

- ``calibration.samples``, ``units.attention``: a setting of a section.
- ``importance``: which entry a component is.
- ``recovery.rank``: a setting of whichever entry `recovery` is; active where that entry has it.
- ``importance.taylor.grain``: a setting of the entry `taylor`; active where `importance` is `taylor`.
- ``allocation.layer_profile``: several settings of the entry `layer_profile` at once; the dimension gives a mapping.

Every parameter is always present; those that have no effect at a point are ignored by `decode` and pinned in the
features, so points that differ only there are the same trial.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from adasearch.config import COMPONENTS, STUDYS_OWN, SpaceConfig, TrialConfig, merged
from adasearch.documents import join, parse
from adasearch.errors import ConfigError
from adasearch.registry import DIMENSIONS, Entry, nearest
from adasearch.search.parameters import CategoricalParameter, Encoding, Parameter
from adasearch.sections import CalibrationConfig, OwnBudget, UnitsConfig

_SECTIONS: dict[str, type] = {"calibration": CalibrationConfig, "units": UnitsConfig, "budget": OwnBudget}
MANY_POINTS = 4096
"""Points up to which a space is counted exactly."""
MANY_PARAMETERS = 24
"""Parameters above which a model of few trials knows nothing far from them, so that a search stays near its best."""


class _NotExpressibleError(Exception):
    """A configuration is no point of the space; the message says why."""


@dataclass(frozen=True, slots=True)
class Dimension:
    """One line of a space.

    Args:
        path: as written.
        section: first part of the path.
        type: entry that `section` must be for the dimension to be active; None if any will do.
        keys: what follows; empty where the item replaces, or is merged into, the whole section.
        entry: the kind of dimension.
        options: its settings.
        parameters: by name, in order.
    """

    path: str
    section: str
    type: str | None
    keys: tuple[str, ...]
    entry: Entry
    options: Any
    parameters: dict[str, Parameter]

    @property
    def is_component(self) -> bool:
        """Return whether the dimension says which entry a component is."""
        return self.section in COMPONENTS and self.type is None and not self.keys

    def decode(self, params: Mapping[str, Any]) -> Any:
        """Return the item that the values of this dimension's parameters stand for."""
        values = {name: params[name] for name in self.parameters}
        return self.entry.facts["decode"](values, self.path, self.options)

    def encode(self, item: Any) -> dict[str, Any]:
        """Return the values that stand for `item`; ValueError says why there are none."""
        values: dict[str, Any] = self.entry.facts["encode"](item, self.path, self.options)
        return values

    def laid(self, item: Any) -> dict[str, Any]:
        """Return `item` as a mapping that `merged` lays over a trial."""
        for key in reversed(self.keys):
            item = {key: item}
        return {self.section: item}

    def active(self, types: Mapping[str, str]) -> bool:
        """Return whether the dimension has an effect where the components are of `types`."""
        if self.section not in COMPONENTS or self.is_component:
            return True
        if self.type is not None:
            return types[self.section] == self.type
        return self.keys[0] in _option_names(self.section, types[self.section])


class Space:
    """Named parameters, in the order of the file, and the map from their values to trials.

    Args:
        name: of the space.
        dimensions: its lines.
        base: trial mapping that they are laid upon, with a type for every component.
        seed: of every trial; the same for all, so that they differ by configuration alone.
    """

    def __init__(self, name: str, dimensions: tuple[Dimension, ...], base: dict[str, Any], seed: int) -> None:
        self.name = name
        self.seed = seed
        self._base = {**base, "seed": seed}
        # components come first, because their types say which of the others are active
        self._dimensions = tuple(sorted(dimensions, key=lambda d: not d.is_component))
        self.parameters = {name: p for d in dimensions for name, p in d.parameters.items()}
        self.encoding = Encoding(self.parameters)

    @staticmethod
    def from_config(config: SpaceConfig, base: dict[str, Any], seed: int = 0) -> Space:
        """Return the space that a file describes.

        Args:
            config: dimensions by path.
            base: what all trials have in common, a partial `TrialConfig` mapping.
            seed: of the study, handed to every trial.

        Raises:
            ConfigError: an unknown path, kind, setting or value, or a dimension that is never active; the message
                starts with ``space.<path>``.
        """
        filled = merged(_default_types(), base)
        dimensions = tuple(_read(path, spec) for path, spec in config.dimensions.items())
        space = Space(config.name, dimensions, filled, seed)
        for _ in space.corners():  # decoded to be checked
            pass
        return space

    def corners(self) -> Iterator[tuple[str, TrialConfig]]:
        """Yield trials that between them hold every choice, and both ends of every number, with the dimension's path.

        Raises:
            ConfigError: a dimension is never active, or one of its values is refused.
        """
        middle = {name: parameter.from_unit(0.5) for name, parameter in self.parameters.items()}
        for dimension in self._dimensions:
            where = join("space", dimension.path)
            if dimension.is_component:
                _check_component(dimension, where)
            seats = [params for params in _seats(self, dimension, middle) if dimension.active(self._types(params))]
            if not seats:
                raise ConfigError(where, _never_active(self, dimension, middle))
            for params in seats:
                for corner in _corners(dimension):
                    try:
                        found = self.decode({**params, **corner})
                    except ConfigError as error:
                        raise ConfigError(where, f"{error.problem} ({error.where})") from None
                    yield dimension.path, found

    def mapping(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Return the trial mapping at a point, unchecked."""
        types = self._types(params)
        trial = self._base
        for dimension in self._dimensions:
            if dimension.active(types):
                trial = _merged_deep(trial, dimension.laid(dimension.decode(params)))
        return trial

    def decode(self, params: Mapping[str, Any]) -> TrialConfig:
        """Return the trial at a point; `params` holds a value of every parameter."""
        return TrialConfig.from_dict(self.mapping(params), "space")

    def active(self, params: Mapping[str, Any]) -> frozenset[str]:
        """Return the names of the parameters that have an effect at a point."""
        types = self._types(params)
        return frozenset(name for d in self._dimensions if d.active(types) for name in d.parameters)

    def point_key(self, params: Mapping[str, Any]) -> str:
        """Return a text that two points share exactly if their active parameters are equal."""
        return json.dumps({name: params.get(name) for name in sorted(self.active(params))})

    @functools.cached_property
    def num_points(self) -> float:
        """Return how many points differ in an active parameter; infinity above `MANY_POINTS` combinations of values."""
        if math.prod(parameter.size for parameter in self.parameters.values()) > MANY_POINTS:
            return math.inf
        grid = itertools.product(*(parameter.values() for parameter in self.parameters.values()))
        points = (dict(zip(self.parameters, items, strict=True)) for items in grid)
        return len({self.point_key(params) for params in points})

    def exhausted(self, points: Iterable[Mapping[str, Any]]) -> str | None:
        """Return why a search has nothing left to try where `points` are known, None while there are others."""
        if math.isinf(self.num_points) or len({self.point_key(p) for p in points}) < self.num_points:
            return None
        return f"all {self.num_points:g} points of the space have been tried"

    def features(self, params: Mapping[str, Any]) -> np.ndarray:
        """Return the features (d float64, in [0, 1]) of a point; see `Encoding`."""
        return self.encoding.features(params, self.active(params))

    def encode(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """Return the point at which `decode` gives `config` (a trial mapping), None if there is none."""
        try:
            return self._encoded(config)
        except _NotExpressibleError:
            return None

    def obstacle(self, config: dict[str, Any]) -> str:
        """Return why `encode` gives None for `config`, the empty text if it does not."""
        try:
            self._encoded(config)
        except _NotExpressibleError as reason:
            return str(reason)
        return ""

    def partial(self, config: dict[str, Any]) -> dict[str, Any]:
        """Return the values of active parameters at which this space says the same as `config`, of another study.

        Those that it cannot say, such as another corpus or a number out of range, are left out. What the two studies
        fix differently, such as the tokens of recovery, does not matter.

        Raises:
            ConfigError: the trial is none of this version, or one of its components is never so here.
        """
        wanted = TrialConfig.from_dict(config, "trial").to_dict()
        params: dict[str, Any] = {}
        for dimension in self._dimensions:  # components first, so that all types are known
            section, item = dimension.section, wanted[dimension.section]
            try:
                if dimension.is_component:
                    params |= _encoded_component(dimension, item)
                elif dimension.active({part: wanted[part]["type"] for part in COMPONENTS}):
                    with contextlib.suppress(_NotExpressibleError):
                        params |= _encoded_item(dimension, wanted)
            except _NotExpressibleError as reason:
                raise ConfigError(section, str(reason)) from None
        for section, fixed in self._types(params).items():
            if wanted[section]["type"] != fixed:
                raise ConfigError(
                    section, f"{section} is {fixed!r} throughout the space, {wanted[section]['type']!r} there"
                )
        return params

    def _types(self, params: Mapping[str, Any]) -> dict[str, str]:
        types = {section: _type_of(self._base[section]) for section in COMPONENTS}
        for dimension in self._dimensions:
            # a trial of another version of the space may lack the parameter
            if dimension.is_component and all(name in params for name in dimension.parameters):
                types[dimension.section] = _type_of(dimension.decode(params))
        return types

    def _encoded(self, config: dict[str, Any]) -> dict[str, Any]:
        wanted = TrialConfig.from_dict({**config, "seed": self.seed}, "recipe").to_dict()
        types = {section: wanted[section]["type"] for section in COMPONENTS}
        params = {name: parameter.from_unit(0.5) for name, parameter in self.parameters.items()}
        for dimension in self._dimensions:
            if dimension.is_component:
                params |= _encoded_component(dimension, wanted[dimension.section])
            elif dimension.active(types):
                params |= _encoded_or_middle(dimension, wanted, config, params)
                # a profile may be written shorter than the space writes it
                wanted = _merged_deep(wanted, dimension.laid(dimension.decode(params)))
        made = self.decode(params).to_dict()
        for path, item in _leaves(made):
            other = dict(_leaves(wanted)).get(path)
            if item != other:
                raise _NotExpressibleError(f"{path} is {item!r} throughout the space, {other!r} here")
        return params


def _encoded_component(dimension: Dimension, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return the values for the choice that says most of what `wanted`, a component's mapping, says."""
    (name, parameter), *_ = dimension.parameters.items()
    assert isinstance(parameter, CategoricalParameter)
    best: tuple[int, dict[str, Any]] | None = None
    for label in parameter.choices:
        item = dimension.decode({name: label})
        item = {"type": item} if isinstance(item, str) else item
        if item["type"] == wanted["type"]:
            agreeing = sum(wanted.get(key) == given for key, given in item.items())
            if best is None or agreeing > best[0]:
                best = agreeing, {name: label}
    if best is None:
        raise _NotExpressibleError(f"{dimension.path} is never {wanted['type']!r} in the space")
    return best[1]


def _encoded_or_middle(
    dimension: Dimension, wanted: dict[str, Any], config: dict[str, Any], middle: dict[str, Any]
) -> dict[str, Any]:
    """Return `_encoded_item`, or the middle of the dimension where `config` leaves it open.

    A recipe says nothing of `STUDYS_OWN`: where the study leaves such a setting out too, and its default lies outside
    of the space, the space has the say.
    """
    try:
        return _encoded_item(dimension, wanted)
    except _NotExpressibleError:
        given = config.get(dimension.section)
        stated = isinstance(given, dict) and (not dimension.keys or dimension.keys[0] in given)
        if stated or dimension.section not in STUDYS_OWN:
            raise
        return {name: middle[name] for name in dimension.parameters}


def _encoded_item(dimension: Dimension, wanted: dict[str, Any]) -> dict[str, Any]:
    item: Any = wanted[dimension.section]
    for key in dimension.keys:
        item = item.get(key) if isinstance(item, dict) else None
    if not dimension.keys:
        item = {key: given for key, given in item.items() if key != "type"}
    try:
        return dimension.encode(item)
    except ValueError as reason:
        raise _NotExpressibleError(f"{dimension.path}: {reason}") from None


def _leaves(data: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the items of nested mappings by dotted path."""
    for key, item in data.items():
        if isinstance(item, dict) and item:
            yield from _leaves(item, f"{above}{key}.")
        else:
            yield f"{above}{key}", item


def _merged_deep(trial: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `merged`, but with the mappings inside of a section merged too."""
    ((section, item),) = over.items()
    old = trial.get(section)
    if isinstance(item, dict) and isinstance(old, dict):
        deep = {k: {**old[k], **v} for k, v in item.items() if isinstance(v, dict) and isinstance(old.get(k), dict)}
        return merged(trial, {section: {**item, **deep}})
    return merged(trial, over)


def _type_of(item: Any) -> str:
    return str(item["type"]) if isinstance(item, dict) else str(item)


def _default_types() -> dict[str, Any]:
    """Return the type of every component that a study leaves out."""
    trial = TrialConfig.from_dict({"calibration": {"corpus": "none"}}, "")
    return {section: {"type": getattr(trial, section).type} for section in COMPONENTS}


def _field_names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _option_names(section: str, name: str) -> list[str]:
    return _field_names(COMPONENTS[section].get(name, section).options)


def _read(path: str, spec: dict[str, Any]) -> Dimension:
    """Return the dimension that a line of a space file describes."""
    where = join("space", path)
    kinds = [key for key in spec if key in DIMENSIONS.names()]
    if len(kinds) != 1:
        raise ConfigError(where, f"must name one kind of dimension, given {sorted(spec)}; {_kinds(spec)}")
    entry = DIMENSIONS.get(kinds[0], where)
    settings = {key: item for key, item in spec.items() if key != kinds[0]}
    domain = spec[kinds[0]]
    if not isinstance(domain, dict):
        domain = {_field_names(entry.options)[0]: domain}
    options: Any = parse(entry.options, {**domain, **settings}, f"{where}.{kinds[0]}")
    section, needed, keys = _resolved(path, where)
    try:
        parameters = entry.function(path, options)
    except ValueError as error:
        raise ConfigError(f"{where}.{kinds[0]}", str(error)) from None
    return Dimension(path, section, needed, keys, entry, options, parameters)


def _kinds(spec: dict[str, Any]) -> str:
    return nearest(next(iter(spec), ""), DIMENSIONS.names())


def _resolved(path: str, where: str) -> tuple[str, str | None, tuple[str, ...]]:
    """Return the section of a path, the type that it names if it does, and the keys below."""
    section, *rest = path.split(".")
    if section not in {*_SECTIONS, *COMPONENTS}:
        raise ConfigError(where, f"unknown path {section!r}; {nearest(section, [*_SECTIONS, *COMPONENTS])}")
    if section in _SECTIONS:
        known = _field_names(_SECTIONS[section])
        if not rest or rest[0] not in known:
            given = rest[0] if rest else ""
            raise ConfigError(where, f"unknown key {given!r} of {section}; {nearest(given, known)}")
        return section, None, tuple(rest)
    if rest and rest[0] in COMPONENTS[section].names():
        known = _option_names(section, rest[0])
        if len(rest) > 1 and rest[1] not in known:
            raise ConfigError(where, f"unknown setting {rest[1]!r} of {rest[0]}; {nearest(rest[1], known)}")
        return section, rest[0], tuple(rest[1:])
    return section, None, tuple(rest)


def _check_component(dimension: Dimension, where: str) -> None:
    choices = [p.choices for p in dimension.parameters.values() if isinstance(p, CategoricalParameter)]
    if len(dimension.parameters) != 1 or not choices:
        raise ConfigError(where, f"must be a choice among entries, given a {dimension.entry.name} dimension")
    (name,) = dimension.parameters
    for label in choices[0]:
        item = dimension.decode({name: label})
        if not isinstance(item, str) and not (isinstance(item, dict) and "type" in item):
            raise ConfigError(where, f"must list names, or mappings with the key type, given {item!r}")
        COMPONENTS[dimension.section].get(_type_of(item), where)


def _seats(space: Space, dimension: Dimension, middle: dict[str, Any]) -> list[dict[str, Any]]:
    """Return points that between them hold every type of the dimension's own component."""
    for other in space._dimensions:
        if other.is_component and other.section == dimension.section and other is not dimension:
            ((name, parameter),) = other.parameters.items()
            assert isinstance(parameter, CategoricalParameter)
            return [{**middle, name: label} for label in parameter.choices]
    return [middle]


def _corners(dimension: Dimension) -> list[dict[str, Any]]:
    """Return both ends of all numbers together, and every choice."""
    ends = [{name: p.from_unit(unit) for name, p in dimension.parameters.items()} for unit in (0.0, 1.0)]
    for name, parameter in dimension.parameters.items():
        if isinstance(parameter, CategoricalParameter):
            ends.extend({**ends[0], name: label} for label in parameter.choices[1:-1])
    return ends


def _never_active(space: Space, dimension: Dimension, middle: dict[str, Any]) -> str:
    types = sorted({space._types(params)[dimension.section] for params in _seats(space, dimension, middle)})
    named = f"{dimension.section} is only ever {', '.join(types)}"
    if dimension.type is None:
        known = {option for name in types for option in _option_names(dimension.section, name)}
        below = len(dimension.keys) > 1  # the first may be meant for an entry
        known |= {*COMPONENTS[dimension.section].names()} if below else set()
        kind = "entry or setting" if below else "setting"
        return f"unknown {kind} {dimension.keys[0]!r}: {named}; {nearest(dimension.keys[0], known)}"
    return f"is never active: {named}; add {dimension.type} to the choices of {dimension.section}, or set it in trial"
