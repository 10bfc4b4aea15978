"""The durable records of a run: written once, atomically, checked when read. The study can be rebuilt from them.

``trials/<number>-<attempt>/result.json`` holds a `Record`; ``items.npz`` beside it the score of every item, by task.
``prior.json`` holds what was taken from earlier runs, as it was when the search began.
``final/<name>.json`` holds a `FinalRecord`, ``final/<name>/failure.json`` why there is none. A file that fails its
checksum counts as absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from adasearch.config import TaskScore, TrialResult, mean_of
from adasearch.documents import parse, plain, value
from adasearch.errors import ConfigError, StorageError
from adasearch.sections import Metric

SCHEMA = 1
DENSE = -1


@value
class Failure:
    """Why a trial gave no score: `kind` is one of those of `adasearch.errors.TrialError`."""

    kind: str
    message: str
    phase: str = ""


@value
class Record:
    """One attempt at one trial. `number` is `DENSE` and `config` None for the dense model.

    Args:
        recipe: name of the published recipe that the trial is, None for a proposal.
        environment: versions, host, device and threads that made it.
    """

    number: int
    attempt: int
    recipe: str | None
    config: dict[str, Any] | None
    result: TrialResult | None
    failure: Failure | None
    environment: dict[str, str]


@value
class Evidence:
    """What a search knows of a trial: its observed score and standard error, and posterior mean and deviation if any.

    The observed score of a winner is too high on average; see `adasearch.search.belief`.
    """

    score: float
    stderr: float
    mean: float | None = None
    sd: float | None = None

    @property
    def believed(self) -> float:
        """The posterior mean; the observed score where there is none."""
        return self.score if self.mean is None else self.mean


@value
class Rate:
    """Tokens per second of a model and of the dense one, by turns in one process.

    Args:
        own: median over repeats.
        dense: the same.
        gain: median of the ratios of neighbours, own over dense.
        spread: its standard error.
    """

    own: float
    dense: float
    gain: float
    spread: float


@value
class Speed:
    """What an exported model takes beside the dense one, one sequence at a time; see `adasearch.speed`.

    Args:
        format: label of the export, ``hf`` where it has none.
        file_bytes: of its weights.
        dense_file_bytes: of those of the dense model in the number format of the export; 0 beside a GGUF file that was
            not timed.
        prefill: reading a prompt of `prompt` tokens; None for a GGUF file where llama.cpp is not installed.
        decode: writing `written` tokens after it, with the key-value cache; None likewise.
        peak_bytes: greatest memory of a process that opens it, reads and writes; on a GPU of its tensors there.
        dense_peak_bytes: the same of the dense model.
        bare_bytes: what such a process holds before it opens a model, 0 on a GPU.
        device: ``cpu`` or ``cuda``.
        dtype: number format.
        threads: of the CPU.
    """

    format: str
    file_bytes: int
    dense_file_bytes: int
    prefill: Rate | None = None
    decode: Rate | None = None
    peak_bytes: int = 0
    dense_peak_bytes: int = 0
    bare_bytes: int = 0
    device: str = "cpu"
    dtype: str = ""
    threads: int = 1
    prompt: int = 0
    written: int = 0

    @property
    def gguf(self) -> bool:
        """Return whether it is a GGUF file, which llama.cpp runs."""
        return self.format.startswith("gguf")


def last_quarter(losses: Sequence[float]) -> float:
    """Return the mean over the last quarter of the steps of a loss curve, of which there is one at least."""
    tail = losses[-max(1, len(losses) // 4) :]
    return sum(tail) / len(tail)


@value
class FinalRecord:
    """What became of one model at the end of a run: a finalist, the dense model, a recipe, or one pruned alone.

    Args:
        name: of its files; ``dense``, ``trial<number>``, or that of a recipe with the key of its configuration.
        trial: number of the trial, or the place among the recipes compared; `DENSE` for the dense model.
        role: ``dense``, ``finalist``, ``recipe`` (the best one, beside the finalists), ``compared`` or ``pruned``.
        selected: scores on the select items, empty where it was not scored on them.
        report: scores on the report items, empty likewise.
        perplexity: by ``<corpus>@<window>``.
        removed: fraction of all parameters removed.
        export: folder of the export relative to the run, None where there is none.
        losses: loss curve of its recovery.
        peak_bytes: greatest memory of the worker while it was made and scored, the mapped base weights included.
        gpu_bytes: greatest memory of the worker's tensors on a GPU, 0 without one.
        search: what the search knows of it, None where there was none.
        merit: what finalists are ranked by, None before all of them are there; see `adasearch.winner`.
        speeds: what its exports take, empty before that is measured.
        validation: loss on text held out from its recovery by steps done, where that was asked for.
        ended: why its recovery ended before all of its tokens were seen, empty where it did not.
        dropped: documents left out of what it was tuned on because a report item stands in them.
        epochs: how often its recovery went through its text, of a mixture the corpus that was read most often.
        made: fingerprints of what it was made and scored by, by the section of the study that says so; one that has
            none for a section, such as a record of an older version, counts as made by what the study says.
        formats: labels of the formats that it was to be exported in, ``hf`` where one has none.
        unwritten: why there is no export in a format, by its label.
    """

    name: str
    trial: int
    role: str
    recipe: str | None
    selected: tuple[TaskScore, ...]
    report: tuple[TaskScore, ...]
    perplexity: dict[str, float]
    parameters: int
    removed: float
    seconds: dict[str, float]
    export: str | None
    losses: tuple[float, ...]
    peak_bytes: int = 0
    gpu_bytes: int = 0
    search: Evidence | None = None
    merit: float | None = None
    speeds: tuple[Speed, ...] = ()
    validation: tuple[tuple[int, float], ...] = ()
    ended: str = ""
    dropped: int = 0
    epochs: float = 0.0
    made: dict[str, str] = dataclasses.field(default_factory=dict)
    formats: tuple[str, ...] = ()
    unwritten: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def training(self) -> tuple[str, ...]:
        """Return what a reader should know of its recovery, in sentences; none for a model that was not tuned."""
        said = []
        if self.losses:
            said.append(f"loss {self.losses[0]:.3f} at first, {last_quarter(self.losses):.3f} over the last quarter")
        if self.validation:
            step, best = min(self.validation, key=lambda point: point[1])
            said.append(f"on text held out {best:.3f} at best, after {step} of {len(self.losses)} steps")
        said += [f"its text was gone through {self.epochs:.1f} times"] if self.epochs > 1 else []
        said += [f"ended early: {self.ended}"] if self.ended else []
        said += [f"{self.dropped} documents with report items in them were left out"] if self.dropped else []
        return tuple(said)


@contextlib.contextmanager
def storage_errors(path: Path) -> Any:
    """Turn what the disk answers into a `StorageError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            problem = "the disk is full; nothing finished is lost: free space and run the same command again"
            raise StorageError(f"{path}: {problem}") from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise StorageError(f"{path}: must be writable: {error.strerror}") from error
        raise


@contextlib.contextmanager
def writing_atomically(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write, which takes the place of `path` at the end: the old or the new content, never a part.

    Raises:
        StorageError: the disk is full or the folder is not writable; the old content stays.
    """
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with draft.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_atomically(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that at any moment the old or the new content stands there, never a part.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    with writing_atomically(path) as file:
        file.write(data)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON, atomically."""
    write_atomically(path, json.dumps(plain(data), indent=1, sort_keys=True).encode())


def _checksum(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_checked(path: Path, body: Any) -> None:
    data = json.loads(json.dumps(plain(body)))
    write_json(path, {"schema": SCHEMA, "sha256": _checksum(data), "body": data})


def _read_checked(path: Path) -> dict[str, Any] | None:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        body = data["body"]
        sound = data["schema"] == SCHEMA and data["sha256"] == _checksum(body)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return body if sound else None


def trial_folder(run: Path, number: int, attempt: int) -> Path:
    """Return the folder of one attempt at a trial."""
    name = "dense" if number == DENSE else str(number)
    return run / "trials" / f"{name}-{attempt}"


def write_record(run: Path, record: Record) -> None:
    """Write the record of a trial; an attempt is recorded once."""
    _write_checked(trial_folder(run, record.number, record.attempt) / "result.json", record)


def _parsed(cls: type[Any], body: dict[str, Any] | None, path: Path) -> Any:
    if body is None:
        return None
    try:
        return parse(cls, body, f"{path}:")
    except ConfigError:
        return None


def read_record(folder: Path) -> Record | None:
    """Return the record in a trial's folder, None where there is none or it is damaged."""
    path = folder / "result.json"
    record: Record | None = _parsed(Record, _read_checked(path), path)
    return record


def read_records(run: Path) -> list[Record]:
    """Return all sound records of a run, ordered by trial number and attempt."""
    found = (read_record(folder) for folder in (run / "trials").glob("*-*"))
    return sorted((r for r in found if r is not None), key=lambda r: (r.number, r.attempt))


def write_items(folder: Path, items: dict[str, np.ndarray]) -> None:
    """Write the score of every item, one array per task."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{key.replace("/", "|"): array for key, array in items.items()})  # type: ignore[arg-type]
    write_atomically(folder / "items.npz", buffer.getvalue())


def read_items(folder: Path) -> dict[str, np.ndarray] | None:
    """Return what `write_items` wrote, None where there is none or it is damaged."""
    try:
        with np.load(folder / "items.npz", allow_pickle=False) as data:
            return {key.replace("|", "/"): data[key] for key in data.files}
    except (OSError, ValueError, EOFError, KeyError):
        return None


def write_final(run: Path, record: FinalRecord) -> None:
    """Write the record of a finalist."""
    _write_checked(run / "final" / f"{record.name}.json", record)


def read_finals(run: Path) -> list[FinalRecord]:
    """Return the sound records of finalists, by name."""
    paths = sorted((run / "final").glob("*.json"))
    found = (_parsed(FinalRecord, _read_checked(path), path) for path in paths)
    return [record for record in found if record is not None]


def keep_earlier(run: Path, name: str) -> None:
    """Keep the record of a model, which will be replaced, as ``final/<name>/earlier.json``."""
    record = run / "final" / f"{name}.json"
    write_atomically(run / "final" / name / "earlier.json", record.read_bytes())


def forget_final(run: Path, name: str) -> None:
    """Take the record of a model away, so that it counts as not made."""
    (run / "final" / f"{name}.json").unlink(missing_ok=True)


def write_failure(run: Path, name: str, failure: Failure) -> None:
    """Write why the model `name` could not be made; a record of it, once there is one, counts instead."""
    _write_checked(run / "final" / name / "failure.json", failure)


def read_failures(run: Path) -> dict[str, Failure]:
    """Return why models without a record could not be made, by name."""
    scored = {record.name for record in read_finals(run)}
    paths = sorted((run / "final").glob("*/failure.json"))
    found = {path.parent.name: _parsed(Failure, _read_checked(path), path) for path in paths}
    return {name: failure for name, failure in found.items() if failure is not None and name not in scored}


def write_prior(run: Path, body: Any) -> None:
    """Write what a run has taken from earlier ones: ``prior.json``."""
    _write_checked(run / "prior.json", body)


def read_prior(run: Path) -> dict[str, Any] | None:
    """Return what `write_prior` wrote, None where there is none or it is damaged."""
    return _read_checked(run / "prior.json")


def job_of(run: Path) -> str | None:
    """Return what a run folder is for, ``run`` or ``compare``, None where that is not known yet."""
    try:
        manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
        return str(manifest.get("job", "run"))
    except (OSError, ValueError, AttributeError):
        return None


def ranked_finals(finals: Iterable[FinalRecord], metric: Metric) -> list[FinalRecord]:
    """Return finalists, best first: by merit where all of them have one, else by their score on select items.

    That is the mean over the tasks of the study's `metric`; equal ones go by number.
    """
    found = list(finals)
    if all(r.merit is not None for r in found):
        return sorted(found, key=lambda r: (-(r.merit or 0.0), r.trial))
    return sorted(found, key=lambda r: (-mean_of(r.selected, metric)[0], r.trial))


def state_writer(folder: Path) -> Callable[[str, float | None, Any], None]:
    """Return an observer that writes ``state.json`` at each new phase, and at most once a second within one.

    It is called with a phase, the progress in it, and where its training stands, None for what is not known.
    """
    last = {"phase": "", "time": 0.0}

    def observe(phase: str, progress: float | None, training: Any = None) -> None:
        now = time.time()
        if phase == last["phase"] and now - float(last["time"]) < 1.0:
            return
        last.update(phase=phase, time=now)
        state = {"phase": phase, "progress": progress, "training": training, "since": now, "pid": os.getpid()}
        write_json(folder / "state.json", state)

    return observe
