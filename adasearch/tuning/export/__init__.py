"""Open set of export formats, one file each.

Signature of an entry::

    export(goods: Goods, folder: Path, options, *, overwrite: bool = False) -> ExportReport

It writes beside the folder, opens what it wrote, compares it with the model, and only then gives it its name (see
`_folder.publish`); `overwrite` lets it replace an earlier export. Its options have a `label`, which tells the folders
of several formats of one model apart. It is registered with the fact `open`: a function (folder, device) -> model that
reads the export back, for `adasearch verify` and `adasearch.load`; and, where not every model can be written so, with
the fact `check`: a function (config, tokenizer) of the dense model that raises `ModelError` for one that cannot,
whatever is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from adasearch.documents import value
from adasearch.errors import ConfigError, ModelError
from adasearch.records import FinalRecord
from adasearch.registry import EXPORT, RECOVERY

if TYPE_CHECKING:
    from adasearch.checkpoints import ModelSource
    from adasearch.config import Component
    from adasearch.models import BaseModel
    from adasearch.pruning.plan import PruningPlan
    from adasearch.pruning.structure import ModelStructure
    from adasearch.tuning.adapter_files import Kept

MARKER = "adasearch.json"
SUMS = "SHA256SUMS"


@value
class ModelCard:
    """What the reader of an exported model should know about where it came from.

    Args:
        model: name of the base model as the study gives it.
        study: name of the study, empty for a single pruning.
        trial: number of the trial, None where there was no search.
        recipe: name of the published recipe, None for a configuration that the search proposed.
        config: the configuration, as `TrialConfig.to_dict` gives it.
        budget: the study's budget.
        recovery: the fine-tune before the export, as a mapping with its type.
        record: scores and perplexity of this model, None when it was not scored.
        dense: the same of the base model.
        dense_parameters: number of parameters of the base model.
        versions: of the packages that made it.
        command: what to run to make it again.
        licence: of the base model, None when it is unknown.
    """

    model: str
    study: str = ""
    trial: int | None = None
    recipe: str | None = None
    config: dict[str, Any] | None = None
    budget: dict[str, Any] | None = None
    recovery: dict[str, Any] | None = None
    record: FinalRecord | None = None
    dense: FinalRecord | None = None
    dense_parameters: int = 0
    seed: int = 0
    versions: dict[str, str] | None = None
    command: str = ""
    licence: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Goods:
    """What every format is made of.

    Args:
        model: the pruned (and recovered) model.
        base: the model it came from; config and tokenizer are taken from it.
        structure: groups of the base model.
        plan: what was cut.
        card: what the model card tells.
        beside: low-rank updates that were merged into the model, by module path, as they were before it; empty where
            there are none, or no format asked for them.
    """

    model: Any
    base: BaseModel
    structure: ModelStructure
    plan: PruningPlan
    card: ModelCard
    beside: Mapping[str, Kept] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        """Return the number format of the weights, such as ``bfloat16``."""
        return str(self.model.dtype).removeprefix("torch.")


def wants_adapters(formats: Iterable[Component]) -> bool:
    """Return whether a format leaves low-rank updates beside the model."""
    return any(getattr(wanted.options, "adapters", "merged") == "beside" for wanted in formats)


def check(formats: Iterable[Component], recovery: Component, where: str) -> None:
    """Return when a recovery leaves what formats ask for.

    Raises:
        ConfigError: updates shall lie beside the model, and there are none.
    """
    if wants_adapters(formats) and not RECOVERY.get(recovery.type).facts.get("adapters"):
        known = ", ".join(name for name in RECOVERY.names() if RECOVERY.get(name).facts.get("adapters"))
        raise ConfigError(where, f"adapters: beside needs a recovery with adapters ({known}), given {recovery.type}")


def check_model(formats: Iterable[Component], source: ModelSource, where: str) -> None:
    """Return when formats can hold the dense model of `source`, as far as config and tokenizer tell.

    Raises:
        ConfigError: one cannot, and the reason.
    """
    checks = {wanted.type: EXPORT.get(wanted.type).facts.get("check") for wanted in formats}
    if not any(checks.values()):
        return
    from adasearch.models import read_config  # these import torch and transformers
    from adasearch.tokenization import read_tokenizer

    config, tokenizer = read_config(source), read_tokenizer(source)
    for refuse in filter(None, checks.values()):
        try:
            refuse(config, tokenizer)
        except ModelError as error:
            raise ConfigError(where, str(error)) from error


@value
class VerifyReport:
    """What opening an export showed.

    Args:
        folder: the export.
        files: number of files whose checksum was compared.
        parameters: number of parameters of the model as loaded.
        expected: number of parameters that the plan promises.
        difference: greatest absolute difference of a logit from the model that was exported.
        tolerance: greatest difference that is accepted.
        cache_agrees: 16 tokens generated with and without a cache are the same.
        fresh: it was opened in a process of its own.
        problems: one sentence for each thing that is wrong; empty when the export is sound.
    """

    folder: str
    files: int
    parameters: int
    expected: int
    difference: float
    tolerance: float
    cache_agrees: bool
    fresh: bool
    problems: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """Return whether nothing is wrong."""
        return not self.problems

    def lines(self) -> Iterator[str]:
        """Yield what was found, a line each, for a terminal."""
        yield f"{self.folder}: {'sound' if self.sound else 'NOT sound'}"
        yield f"files: {self.files} checksums compared"
        if self.parameters:
            yield f"parameters: {self.parameters:,}, expected {self.expected:,}"
            yield f"logits: greatest difference {self.difference:.3g}, accepted {self.tolerance:.3g}"
            yield f"generation with and without cache: {'equal' if self.cache_agrees else 'different'}"
        yield from (f"problem: {problem}" for problem in self.problems)

    def require(self) -> None:
        """Return when the export is sound.

        Raises:
            ModelError: what is wrong with it.
        """
        if not self.sound:
            raise ModelError(f"{self.folder}: {'; '.join(self.problems)}")


@value
class ExportReport:
    """What was written.

    Args:
        folder: the export.
        format: name of the entry.
        layout: ``stock`` opens anywhere, ``per_layer`` needs adasearch or ``trust_remote_code=True``, ``gguf`` is for
            llama.cpp and what is built on it.
        parameters: of the model as it is read back.
        padding: how many of them are zeros that the plan has no part in.
        size: bytes of all files.
        verified: what opening it showed.
    """

    folder: str
    format: str
    layout: str
    parameters: int
    size: int
    verified: VerifyReport
    padding: int = 0
