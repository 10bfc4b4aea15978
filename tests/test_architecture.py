"""Who may import whom: floors, rooms, doors; and nothing heavy before it is needed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "adasearch"

# A module imports from its own floor and those below. The longest prefix counts.
FLOORS = [
    ["errors"],
    ["registry"],
    ["documents"],
    ["fresh"],
    ["racing", "library", "sections", "pareto", "passages"],
    ["promotion"],
    ["config"],
    ["records", "losses"],
    ["tradeoff"],
    ["tuning.kernels", "tuning.attention", "tuning.head"],
    ["tuning.decoder"],
    ["pruning", "search.dimensions", "search.space", "search.parameters", "tuning.items", "tuning.scoring"],
    ["checkpoints", "footprint", "placement"],
    ["modeling_adasearch"],
    ["corpora"],
    ["models", "data", "chat", "streams", "tokenization"],
    ["search.gaussian", "search.shifted", "search.ranking", "search.surrogate", "tuning.cloze"],
    ["pruning.calibration", "pruning.surgery", "pruning.compensation", "pruning.masking", "pruning.schedule"],
    ["outlined"],
    ["tuning", "loading"],
    ["search"],
    ["environment", "workbench", "conduct"],
    ["costs", "latencies", "llama_cpp"],
    ["goals"],
    ["outlining", "text_checks", "trainings"],
    ["trial", "speed"],
    ["cuts"],
    [
        "worker",
        "winner",
        "finalists",
        "finalize",
        "comparison",
        "comparison_html",
        "dashboard",
        "report",
        "report_html",
        "report_front",
        "report_parts",
        "report_rungs",
        "report_speed",
        "report_style",
        "pictures",
        "checks",
        "describe",
        "verdicts",
        "display",
        "teams",
    ],
    ["run", "single"],
    ["cli"],
]
# A room never imports these; the point of the house is that search and pruning do not meet.
ROOMS = {
    "search": ("adasearch.pruning", "adasearch.tuning", "adasearch.models", "transformers", "peft", "lm_eval"),
    "pruning": ("adasearch.search", "adasearch.tuning"),
    "tuning": ("adasearch.search",),
}
# The modules that may import a heavy dependency.
DOORS = {
    "transformers": ("models", "modeling_adasearch", "tokenization", "tuning.export", "loading"),
    "huggingface_hub": ("models", "modeling_adasearch", "data", "tuning.export"),
    "safetensors": (
        "models",
        "pruning.statistics",
        "pruning.statistics_cache",
        "tuning.export",
        "tuning.adapter_files",
        "loading",
    ),
    "gguf": ("checkpoints", "tuning.export"),
    "xllamacpp": ("llama_cpp",),
    "peft": (),  # what our updates are compared with
    "lm_eval": ("tuning.evaluation", "tuning.tasks", "tuning.items"),
    "datasets": ("data", "tuning.tasks"),
    "botorch": ("search.ranking", "search.surrogate", "search.several"),
    "gpytorch": ("search.surrogate", "search.shifted"),
    "optuna": ("search.sampler", "search.samplers", "search.evolution", "search.study", "search.telling", "dashboard"),
    "optuna_dashboard": ("dashboard", "search.study"),
    "ray": ("search.ray_executor",),
    "pandas": ("report", "data"),
    "plotly": ("report", "dashboard"),
}


def _modules():
    files = sorted(PACKAGE.rglob("*.py"))
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = _modules()


def _typing_only(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _walk(node, *, types, functions):
    """Nodes below `node`, leaving out blocks for type checkers and bodies of functions unless asked for."""
    for child in ast.iter_child_nodes(node):
        if (_typing_only(child) and not types) or (isinstance(child, ast.FunctionDef) and not functions):
            continue
        yield child
        yield from _walk(child, types=types, functions=functions)


def _imports(name, *, types=False, functions=True):
    """Dotted names that a module imports; `from a import b` counts as a.b where that is a module of ours."""
    found = set()
    for node in _walk(ast.parse(MODULES[name].read_text(encoding="utf-8")), types=types, functions=functions):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("adasearch.") in MODULES else node.module)
    return found


def _within(name, prefix):
    return name == prefix or name.startswith(f"{prefix}.")


def _floor(name):
    fits = [(len(prefix), floor) for floor, names in enumerate(FLOORS) for prefix in names if _within(name, prefix)]
    return max(fits)[1] if fits else None


def _own(names):
    return {n.removeprefix("adasearch.") for n in names if n.startswith("adasearch.")} & set(MODULES)


@pytest.mark.parametrize("name", [n for n in MODULES if n != "__init__"])
def test_floors(name):
    floor = _floor(name)
    assert floor is not None, f"{name} has no floor: add it to FLOORS"
    floors = {other: _floor(other) for other in _own(_imports(name)) - {"__init__"}}
    above = {other for other, its in floors.items() if its is None or its > floor}
    assert not above, f"{name} (floor {floor}) must not import from above: {sorted(above)}"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms(room):
    for name in MODULES:
        if _within(name, room):
            bad = {i for i in _imports(name, types=True) for closed in ROOMS[room] if _within(i, closed)}
            assert not bad, f"{name} must not import {sorted(bad)}"


@pytest.mark.parametrize("library", DOORS)
def test_doors(library):
    for name in MODULES:
        if any(_within(i, library) for i in _imports(name)):
            assert any(_within(name, door) for door in DOORS[library]), f"{name} must not import {library}"


def test_no_cycles():
    graph = {name: _own(_imports(name, functions=False)) - {name} for name in MODULES}
    done, path = set(), []

    def visit(name):
        assert name not in path, f"import cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            path.append(name)
            for other in sorted(graph[name]):
                visit(other)
            done.add(path.pop())

    for name in sorted(graph):
        visit(name)


def test_files_are_short():
    long = {name: lines for name, file in MODULES.items() if (lines := len(file.read_text().splitlines())) > 450}
    assert not long


HEAVY = ("torch", "transformers", "optuna", "botorch", "ray", "pandas", "datasets", "peft", "lm_eval")


@pytest.mark.parametrize("module", ["adasearch", "adasearch.config", "adasearch.checkpoints", "adasearch.cli"])
def test_light_imports(module):
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=False
    )
    assert found.stdout.strip() == "[]", found.stdout + found.stderr


def test_public_packages_say_what_their_entries_are():
    for name, file in MODULES.items():
        assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), f"{name} has no docstring"
