"""A folder that stands whole or not at all: written beside its place, sealed, opened, compared, and only then named.

Every format fills a draft with its own files; the rest (plan, marker, card, checksums, the comparison in a fresh
process, the step into place) is the same for all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch.errors import ModelError, StorageError
from adasearch.records import storage_errors, write_atomically, write_json
from adasearch.tuning.export import MARKER, SUMS, ExportReport, Goods, VerifyReport
from adasearch.tuning.export._card import model_card, with_section
from adasearch.tuning.export._verify import logits_of, sample_of, sha256, verify

if TYPE_CHECKING:
    from torch import nn

    from adasearch.pruning.plan import PruningPlan
    from adasearch.pruning.structure import ModelStructure


CARD = "README.md"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Contents:
    """What a format wrote into a draft.

    Args:
        layout: how it is opened, see `ExportReport`.
        as_read: the model as a reader will see it: the one that was exported, or that with its weights rounded.
        parameters: as a reader counts them; None for those of the plan.
        dtype: number format of the weights in the file; None for that of the model.
        notes: sentences for the card.
    """

    layout: str
    as_read: nn.Module
    parameters: int | None = None
    dtype: str | None = None
    notes: tuple[str, ...] = ()


def _check_target(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds anything but an earlier export that may be replaced."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise StorageError(f"{folder}: must be a folder or not exist yet")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not ((folder / MARKER).is_file() and (folder / SUMS).is_file()):
        raise StorageError(
            f"{folder}: must be empty, it holds files that are no export of adasearch; give another folder"
        )
    if not overwrite:
        raise StorageError(f"{folder}: holds an earlier export; ask for overwriting or give another folder")


def _check_cut(model: nn.Module, structure: ModelStructure, plan: PruningPlan) -> None:
    """Check that every cut parameter of `model` has the size that `plan` says."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for group in structure.groups:
        kept = len(plan.keep[group.name])
        for part in group.slices:
            size = parameters[part.parameter].shape[part.dim]
            if size != kept * part.block:
                raise ModelError(
                    f"{part.parameter}: dimension {part.dim} must be {kept * part.block} by the plan, given {size}"
                )
    total = sum(p.numel() for p in model.parameters())
    if total != plan.parameters:
        raise ModelError(f"the model has {total:,} parameters, the plan promises {plan.parameters:,}")


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[None]:
    """Turn a full disk into a `StorageError`, also where a library reports it in its own words.

    numpy's `tofile` says how much was asked and how much was written, without an error number; safetensors has an
    error of its own.
    """
    from safetensors import SafetensorError

    with storage_errors(folder):
        try:
            yield
        except SafetensorError as error:
            if f"os error {errno.ENOSPC}" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        except OSError as error:
            if error.errno is not None or "requested and" not in str(error):
                raise
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error


def files_of(folder: Path) -> list[Path]:
    """Return the files below a folder, in the order of their names."""
    return sorted(p for p in folder.rglob("*") if p.is_file())


def seal(draft: Path) -> int:
    """Write the checksum of every file, bring all of them to the disk, and return their size in bytes."""
    paths = [path for path in files_of(draft) if path.name != SUMS]
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
    lines = (f"{sha256(path)}  {path.relative_to(draft).as_posix()}\n" for path in paths)
    write_atomically(draft / SUMS, "".join(lines).encode())
    return sum(path.stat().st_size for path in paths)


def _marker(goods: Goods, name: str, found: Contents, logits: Any) -> dict[str, Any]:
    return {
        "schema": 1,
        "format": name,
        "layout": found.layout,
        "family": goods.plan.family,
        "parameters": found.parameters or goods.plan.parameters,
        "dense_parameters": goods.plan.dense_parameters,
        "dtype": found.dtype or goods.dtype,
        "logits": sample_of(logits),
        "versions": {
            package: metadata.version(package)
            for package in ("adasearch", "torch", "transformers", "gguf")
            if _installed(package)
        },
    }


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _verified(draft: Path, logits: Any, device: str) -> VerifyReport:
    """Open the draft in a fresh process and compare it with the logits of the model in memory."""
    from safetensors.torch import save_file

    with tempfile.TemporaryDirectory() as room:
        reference = Path(room) / "logits.safetensors"
        save_file({"logits": logits}, reference)
        return verify(draft, reference=reference, device=device)


_ASIDE = re.compile(r"\.(.+)\.[0-9a-f]{8}\.(old|tmp)")


def sweep(parent: Path) -> None:
    """Put in order what a killed process left among exports: drafts go, an export that had stepped aside comes back.

    To be called while no other process works there.
    """
    for left in parent.glob(".*") if parent.is_dir() else ():
        match = _ASIDE.fullmatch(left.name)
        if match and match[2] == "old" and not left.with_name(match[1]).exists():
            left.rename(left.with_name(match[1]))
        elif match:
            shutil.rmtree(left, ignore_errors=True)


def _place(draft: Path, folder: Path) -> None:
    """Give the draft its name; an earlier export steps aside first and goes when the new one stands, see `sweep`."""
    aside = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.old")
    if folder.exists():
        folder.rename(aside)
    draft.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def _linked(source: str, target: str) -> str:
    """Give a file a second name, or copy it where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
    return target


def amend_card(folder: Path, section: Sequence[str]) -> None:
    """Put a section into the card of an export that stands already, see `_card.with_section`.

    A folder of the same files, but for the card and its checksum, takes its place; none does where the card says so
    already.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    old = (folder / CARD).read_text(encoding="utf-8")
    text = with_section(old, section)
    if text == old:
        return
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _disk(folder):
            shutil.copytree(folder, draft, copy_function=_linked)
            card, sums = draft / CARD, (draft / SUMS).read_text(encoding="utf-8")
            before = f"{sha256(card)}  {CARD}\n"
            write_atomically(card, text.encode())
            write_atomically(draft / SUMS, sums.replace(before, f"{sha256(card)}  {CARD}\n").encode())
            _place(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def publish(
    goods: Goods, folder: Path, name: str, write: Callable[[Path], Contents], *, overwrite: bool
) -> ExportReport:
    """Write an export, and open it in a fresh process before it gets its name.

    Args:
        goods: the model and where it came from.
        folder: where to write.
        name: of the format.
        write: fills a new, empty folder with the format's own files.
        overwrite: replace an earlier export in `folder`.

    Raises:
        StorageError: `folder` holds something else, or the disk is full.
        ModelError: the model does not match its plan, or what was written does not open as the same model.
    """
    folder, plan = Path(folder), goods.plan
    _check_target(folder, overwrite=overwrite)
    _check_cut(goods.model, goods.structure, plan)
    draft = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        with _disk(folder):
            draft.mkdir(parents=True)
            found = write(draft)
            logits = logits_of(found.as_read)
            plan.save(draft / "plan.json")
            write_json(draft / MARKER, _marker(goods, name, found, logits))
            text = model_card(goods.card, title=folder.name, layout=found.layout, plan=plan, notes=found.notes)
            write_atomically(draft / CARD, text.encode())
            size = seal(draft)
            report = _verified(draft, logits, next(goods.model.parameters()).device.type)
            if not report.sound:
                raise ModelError(
                    f"{folder}: not written, since what was written is not the model: {'; '.join(report.problems)}"
                )
            _place(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    parameters = found.parameters or plan.parameters
    return ExportReport(
        folder=str(folder),
        format=name,
        layout=found.layout,
        parameters=parameters,
        padding=parameters - plan.parameters,
        size=size,
        verified=dataclasses.replace(report, folder=str(folder)),
    )
