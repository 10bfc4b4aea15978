"""Spaces and recipes that a study calls by name: which files they are, and which recipes come first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adasearch.documents import read_yaml
from adasearch.errors import ConfigError
from adasearch.registry import nearest

REPOSITORY = Path(__file__).resolve().parent.parent
RECIPES = "search_spaces/recipes"
FIRST = (
    "magnitude_l2", "random", "llm_pruner_e1", "llm_pruner_e2", "llm_pruner_vector", "flap", "wanda_sp", "fasp",
    "slimgpt", "slimllm", "cfsp", "two_ssp", "adapt_pruner", "shortgpt",
)  # fmt: skip
"""Recipes that a search begins with, where there is no room for all: two floors, then what is compared with most."""
_FOR_READERS = {"title", "source", "fidelity"}


def _roots(kind: str, near: Path) -> list[Path]:
    """Return the folders that spaces or recipes are looked up in by name, the first one first."""
    return [near.parent.parent / kind, Path(kind), REPOSITORY / kind]


def find(kind: str, name: str, near: Path, where: str) -> Path:
    """Return the file of a space or recipe: a path ending in ``.yaml``, or a name looked up in the folder `kind`.

    Args:
        kind: ``search_spaces``, or `RECIPES`.
        name: name or path.
        near: file of the study; its neighbourhood is looked at first.
        where: key of the study, for messages.

    Raises:
        ConfigError: there is none; the message names the nearest one.
    """
    if name.endswith((".yaml", ".yml")):
        tries = [near.parent / name, Path(name)]
    else:
        tries = [root / f"{name}.yaml" for root in _roots(kind, near)]
    for path in tries:
        if path.is_file():
            return path
    known = sorted({file.stem for path in tries for file in path.parent.glob("*.yaml")})
    raise ConfigError(where, f"no file for {name!r}; {nearest(name, known)}")


def recipe_names(near: Path) -> tuple[str, ...]:
    """Return the names of the recipes that a study in the file `near` may name: `FIRST`, then by the alphabet."""
    found = {file.stem for root in _roots(RECIPES, near) for file in root.glob("*.yaml")}
    return (*(name for name in FIRST if name in found), *sorted(found - set(FIRST)))


def load_recipe(name: str, near: Path, where: str) -> dict[str, Any]:
    """Return the recipe called `name` (``search_spaces/recipes/<name>.yaml``): a partial `TrialConfig` mapping.

    The keys `title`, `source` and `fidelity` are for readers and are left out.
    """
    data = read_yaml(find(RECIPES, name, near, where))
    return {key: item for key, item in data.items() if key not in _FOR_READERS}
