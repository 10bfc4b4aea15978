"""YAML documents <-> frozen values: unknown keys, wrong types and wrong ranges are refused with their path."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform, get_args

import pydantic
import yaml

from adasearch.errors import ConfigError
from adasearch.registry import nearest

T = TypeVar("T")

Fraction = Annotated[float, pydantic.Field(gt=0, lt=1, allow_inf_nan=False)]
Share = Annotated[float, pydantic.Field(ge=0, le=1, allow_inf_nan=False)]
Positive = Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, pydantic.Field(ge=0, allow_inf_nan=False)]
Finite = Annotated[float, pydantic.Field(allow_inf_nan=False)]
Count = Annotated[int, pydantic.Field(ge=1)]
Index = Annotated[int, pydantic.Field(ge=0)]
Name = Annotated[str, pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]

_MAX_NODES = 20_000
_UNKNOWN_KEY = {"unexpected_keyword_argument", "extra_forbidden"}


@dataclass_transform(frozen_default=True, kw_only_default=True)
def value(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, slotted, keyword-only dataclass that `parse` checks strictly."""
    made = dataclass(frozen=True, slots=True, kw_only=True)(cls)
    made.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    return made


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but `1e-4` is a number, `no` is a string and a key may stand once."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own protocol
        first: [
            (tag, pattern) for tag, pattern in rules if tag not in {"tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"}
        ]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for i, key in enumerate(keys) if key in keys[:i]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$", re.IGNORECASE), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.inf|\.nan)$"
    ),
    list("-+0123456789."),
)


def _num_nodes(data: Any, limit: int) -> int:
    if limit <= 0:
        return 1
    children = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
    total = 1
    for child in children:
        total += _num_nodes(child, limit - total)
        if total > limit:
            break
    return total


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping that the YAML file `path` holds.

    Raises:
        ConfigError: the file is missing, is no YAML, holds a duplicate key or is no mapping.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), f"must be a readable text file: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(str(path), f"must be YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(str(path), f"must be a mapping of keys to values, given {type(data).__name__}")
    if _num_nodes(data, _MAX_NODES) > _MAX_NODES:
        raise ConfigError(str(path), f"must hold at most {_MAX_NODES} values once its aliases are followed")
    return data


def join(where: str, *keys: object) -> str:
    """Return the path of a key below `where`: ``file.yaml: a.b``; `where` ends in ``:`` when it names a file."""
    dotted = ".".join(str(key) for key in keys if str(key))
    if not dotted:
        return where.rstrip(":")
    if not where:
        return dotted
    return f"{where} {dotted}" if where.endswith(":") else f"{where}.{dotted}"


def _field_names(cls: type, path: tuple[object, ...]) -> list[str]:
    """Return the fields of the dataclass that lies at `path` below `cls`, empty where it cannot be told."""
    for key in path:
        if isinstance(key, int):  # in a list
            found: Any = next((kind for kind in get_args(cls) if dataclasses.is_dataclass(kind)), type(None))
            cls = found
            continue
        if not dataclasses.is_dataclass(cls):
            return []
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        kind = kinds.get(str(key))
        if isinstance(kind, str):
            kind = _resolve(cls, str(key))
        cls = kind if isinstance(kind, type) or get_args(kind) else type(None)
    return [f.name for f in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []


def _resolve(cls: type, name: str) -> Any:
    import typing

    return typing.get_type_hints(cls).get(name)


_reader: Callable[[type], pydantic.TypeAdapter[Any]] = functools.cache(pydantic.TypeAdapter)
"""Returns what reads values of a type. To make one takes milliseconds, and a search reads thousands of values."""


def parse(cls: type[T], data: Any, where: str) -> T:
    """Return the value of type `cls` that `data` (plain mappings, lists, scalars) describes.

    Args:
        cls: a dataclass made by `value`.
        data: what a YAML file held.
        where: path of `data`, for messages.

    Raises:
        ConfigError: an unknown key (with the nearest known one), a wrong type or a value out of range.
    """
    if not isinstance(data, dict):
        raise ConfigError(where.rstrip(":"), f"must be a mapping, given {data!r}")
    try:
        result: T = _reader(cls).validate_python(data)
    except ConfigError as error:  # of a field that is read by a function of its own, which names the key below here
        raise ConfigError(join(where, error.where), error.problem) from None
    except pydantic.ValidationError as error:
        # A misspelt key also makes the right one missing: the misspelling is the cause, so it goes first.
        found = sorted(error.errors(), key=lambda e: e["type"] not in _UNKNOWN_KEY)
        first = found[0]
        path = tuple(first["loc"])
        if first["type"] in _UNKNOWN_KEY:
            known = _field_names(cls, path[:-1])
            raise ConfigError(
                join(where, *path), f"unknown key {path[-1]!r}; {nearest(str(path[-1]), known)}"
            ) from None
        if first["type"] == "missing_keyword_only_argument" or first["type"] == "missing":
            raise ConfigError(join(where, *path), "must be given") from None
        problem = first["msg"].removeprefix("Value error, ")  # of our own validators, whose words are enough
        problem = problem[0].lower() + problem[1:]
        raise ConfigError(join(where, *path), f"{problem}, given {first['input']!r}") from None
    return result


def plain(data: Any) -> Any:
    """Return `data` as mappings, lists and scalars, as YAML and JSON hold them."""
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return {f.name: plain(getattr(data, f.name)) for f in dataclasses.fields(data)}
    if isinstance(data, dict):
        return {str(key): plain(item) for key, item in data.items()}
    if isinstance(data, tuple | list):
        return [plain(item) for item in data]
    if isinstance(data, Path):
        return str(data)
    return data


def fingerprint(data: Any) -> str:
    """Return 16 hexadecimal digits that tell `data` from any other value, the same on every machine."""
    text = json.dumps(plain(data), sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
