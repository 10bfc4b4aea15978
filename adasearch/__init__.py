"""adasearch: find the smallest language model that still does your work.

``adasearch.load(folder)`` opens an exported model; everything else starts from the command line or from the rooms
(`adasearch.pruning`, `adasearch.tuning`, `adasearch.search`). Importing this package imports nothing heavy.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["load", "load_study", "run_study", "verify"]

_PLACES = {
    "load": "adasearch.loading",
    "verify": "adasearch.loading",
    "load_study": "adasearch.config",
    "run_study": "adasearch.run",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PLACES[name]), name)
