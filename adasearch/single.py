"""One recipe on one model, without a search: cut, perhaps tuned a little, exported and verified."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adasearch.checks import check_study
from adasearch.config import SpaceConfig, StudyConfig, TrialConfig, component, export_formats, merged
from adasearch.display import STAGE_SECONDS
from adasearch.documents import Count, Fraction, Index, parse, value
from adasearch.environment import usable_cores
from adasearch.errors import ConfigError, NoTrialError, StorageError, TrialError
from adasearch.finalists import FinalTask, dense_task
from adasearch.finalize import run_final
from adasearch.library import load_recipe
from adasearch.records import FinalRecord
from adasearch.registry import RECOVERY
from adasearch.run import quieten
from adasearch.speed import measure_exports
from adasearch.teams import followed
from adasearch.workbench import Workbench

WINDOW = 128
PERPLEXITY_TOKENS = 16384
_WHERE = "prune:"


@value
class Order:
    """What to prune, and how.

    Args:
        model: hub id, folder, ``file.gguf`` or ``package:name``.
        recipe: name in ``search_spaces/recipes``, or a path ending in ``.yaml``.
        remove: fraction of all parameters that goes.
        corpus: calibration and recovery read one part of it, perplexity another.
        samples: calibration sequences, of 128 tokens each.
        tokens: tokens of LoRA recovery after the cut, 0 for none.
        seed: of all that is drawn.

    A recipe that fixes its own calibration or recovery keeps it.
    """

    model: str
    recipe: str
    remove: Fraction = 0.2
    corpus: str = "pydoc"
    samples: Count = 32
    tokens: Index = 0
    seed: Index = 0

    @property
    def title(self) -> str:
        """Return what the recipe is called."""
        return Path(self.recipe).name.removesuffix(".yaml")

    @property
    def name(self) -> str:
        """Return a name for what comes out, such as ``SmolLM2-135M-flap-0.2``."""
        model, recipe = (re.sub(r"[^A-Za-z0-9_.-]+", "-", x) for x in (Path(self.model).name, self.title))
        return f"{model}-{recipe}-{self.remove:g}".strip(".-")

    @property
    def command(self) -> str:
        """Return the command that does this again."""
        names = (field.name for field in dataclasses.fields(self) if field.name != "model")
        options = (text for name in names for text in (f"--{name}", str(getattr(self, name))))
        return shlex.join(["adasearch", "prune", self.model, *options])


def _trial(order: Order) -> dict[str, Any]:
    """Return the recipe as a trial mapping."""
    recovery = {"type": "lora", "tokens": order.tokens} if order.tokens else {"type": "none"}
    sample = {"corpus": order.corpus, "samples": order.samples, "length": WINDOW}
    base = {"calibration": sample, "recovery": recovery, "seed": order.seed}
    trial = merged(base, load_recipe(order.recipe, Path("prune"), "--recipe"))
    TrialConfig.from_dict(trial, f"{order.recipe}:")
    return trial


def study_of(order: Order) -> StudyConfig:
    """Return the study of one trial and no items that an order is: what checks and workbench read.

    Raises:
        ConfigError: an unknown recipe, or a value out of range.
    """
    trial = _trial(order)
    facts: dict[str, Any] = {
        "name": "prune",
        "model": {"name": order.model},
        "space": SpaceConfig(name="none", dimensions={}),
        "budget": {"remove": order.remove},
        "objective": {"search": ()},
        "report": {
            "tasks": (),
            "perplexity": (order.corpus,),
            "perplexity_tokens": PERPLEXITY_TOKENS,
            "windows": (WINDOW,),
        },
        "finalize": {
            "top": 1,
            "recovery": component(RECOVERY, trial["recovery"], "recovery"),
            "formats": export_formats(["hf"], "--format"),
        },
        "trial": trial,
        "recipes": {},
        "trials": 1,
        "seed": order.seed,
        "data_root": os.environ.get("ADASEARCH_DATA_ROOT"),
    }
    return parse(StudyConfig, facts, _WHERE)


def _check_out(out: Path) -> None:
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise StorageError(f"{out}: must be an empty folder or not exist yet; give another one with --out")


def prune_model(order: Order, out: Path | None, say: Callable[[str], None]) -> Path:
    """Prune one model by one recipe and return the folder of the exported, verified model.

    Args:
        order: what to do.
        out: folder to make, None for ``runs/<model>-<recipe>-<remove>``.
        say: called with each line for the user.

    Raises:
        ConfigError: an unknown recipe or corpus, or a budget out of reach.
        ModelError: the model is missing, damaged or of a family that is not supported, or the export is not sound.
        StorageError: `out` holds something, or the disk has no room.
        NoTrialError: the smaller model gives no finite figures.
    """
    quieten()
    out = out or Path("runs") / order.name
    out = out if out.name.strip(".") else out.resolve()
    _check_out(out)
    study = study_of(order)
    checked = check_study(study, _WHERE, out)
    say(f"{order.model}, {order.recipe}: {checked.summary} -> {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the goal, so that the finished model gets its name in one step; nothing else stays.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as room:
        with followed(Path(room), (out.name,), say, STAGE_SECONDS):
            dense, pruned = _records(order, study, out.name, Path(room))
        (pruned,) = measure_exports(study, Path(room), [pruned], say)
        assert pruned.export is not None
        _check_out(out)
        (Path(room) / pruned.export).rename(out)
    for line in _lines(dense, pruned):
        say(line)
    say(f"exported and verified: {out}")
    return out


def _records(order: Order, study: StudyConfig, name: str, room: Path) -> tuple[FinalRecord, FinalRecord]:
    """Return the records of the dense and of the pruned model, which is exported below the folder `room`."""
    config = TrialConfig.from_dict(study.trial, f"{order.recipe}:")
    bench = Workbench(study, room, usable_cores())
    task = FinalTask(
        name=name,
        trial=0,
        role="pruned",
        recipe=order.title,
        config=config.to_dict(),
        recovery=config.recovery,
        items=(),
        formats=study.finalize.formats,
        command=order.command,
    )
    try:
        dense, pruned = run_final(dense_task(items=()), bench), run_final(task, bench)
        assert dense is not None
        assert pruned is not None
        return dense, pruned
    except TrialError as error:
        if error.kind == "config":
            raise ConfigError(_WHERE.rstrip(":"), error.message) from error
        raise NoTrialError(f"{order.recipe}: {error}") from error


def _lines(dense: FinalRecord, pruned: FinalRecord) -> list[str]:
    """Return what came out, for the user."""
    figures = f"parameters: {dense.parameters:,} -> {pruned.parameters:,} ({pruned.removed:.2%} removed)"
    lines = [figures]
    for name, before in dense.perplexity.items():
        corpus, _, window = name.rpartition("@")
        after = pruned.perplexity[name]
        lines.append(f"perplexity on {corpus}, windows of {window} tokens: {before:.2f} -> {after:.2f}")
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in pruned.seconds.items())
    return [*lines, f"seconds: {sum(pruned.seconds.values()):.1f} ({phases})"]
