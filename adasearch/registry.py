"""Open sets by name: an entry is one module of a folder, found when its name is first asked for."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adasearch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``did you mean 'x'? known: a, b, x`` for a name that is not among `known`."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}known: {', '.join(names) or 'none'}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One member of an open set.

    Args:
        name: the file name of its module.
        function: what the entry does; its signature is stated in the docstring of the folder.
        options: frozen dataclass of its settings, every field with a default.
        facts: what others must know before they call it, such as the statistics that it needs.
    """

    name: str
    function: Callable[..., Any]
    options: type
    facts: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class NoOptions:
    """Settings of an entry that has none."""


class Registry:
    """Names of the modules in one package, and the entry that each of them registers.

    Args:
        package: dotted name of the folder, such as ``adasearch.pruning.importance``.
        kind: what an entry is called in messages, such as ``importance criterion``.
    """

    def __init__(self, package: str, kind: str) -> None:
        self.package = package
        self.kind = kind
        self._entries: dict[str, Entry] = {}

    def names(self) -> tuple[str, ...]:
        """Return the names of all entries, read from the folder without importing its modules."""
        path = importlib.import_module(self.package).__path__
        return tuple(sorted(m.name for m in pkgutil.iter_modules(path) if not m.name.startswith("_")))

    def register(self, *, options: type = NoOptions, **facts: Any) -> Callable[..., Any]:
        """Return a decorator that makes a function the entry of its module."""

        def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
            package, _, name = function.__module__.rpartition(".")
            assert package == self.package, f"{function.__module__} lies outside {self.package}"
            assert name not in self._entries, f"{self.kind} {name!r} is registered twice"
            self._entries[name] = Entry(name=name, function=function, options=options, facts=facts)
            return function

        return decorate

    def get(self, name: str, where: str = "") -> Entry:
        """Return the entry called `name`.

        Raises:
            ConfigError: there is no such entry; the message names the nearest one and all of them.
        """
        if name not in self._entries:
            if name not in self.names():
                raise ConfigError(where, f"unknown {self.kind} {name!r}; {nearest(name, self.names())}")
            importlib.import_module(f"{self.package}.{name}")
        return self._entries[name]


ARCHITECTURES = Registry("adasearch.pruning.architectures", "model family")
IMPORTANCE = Registry("adasearch.pruning.importance", "importance criterion")
ALLOCATION = Registry("adasearch.pruning.allocation", "allocation")
DEPTH = Registry("adasearch.pruning.depth", "depth rule")
HIDDEN = Registry("adasearch.pruning.hidden", "rule for hidden dimensions")
TOKENS = Registry("adasearch.pruning.tokens", "vocabulary rule")
SELECTION = Registry("adasearch.pruning.selection", "unit selection")
COMPENSATION = Registry("adasearch.pruning.compensation", "compensation")
SCHEDULE = Registry("adasearch.pruning.schedule", "pruning schedule")
RECOVERY = Registry("adasearch.tuning.recovery", "recovery")
EXPORT = Registry("adasearch.tuning.export", "export format")
DIMENSIONS = Registry("adasearch.search.dimensions", "search dimension")
