"""Speed and memory of exported models beside the dense one, measured when a run has nothing else to do.

Batch 1: tokens per second of reading a prompt (prefill) and of writing after it with the key-value cache (decode).
Export and dense model take turns in one process, since the speed of a machine drifts; their ratio is what counts.
Greatest memory is that of a process that opens one of them alone. A GGUF file is run by llama.cpp where that is
installed, beside the dense model in the same number format.

``python -m adasearch.speed REQUEST`` is such a process.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from adasearch import checkpoints, costs, fresh, llama_cpp, loading, models
from adasearch.config import StudyConfig
from adasearch.documents import parse, plain, value
from adasearch.environment import peak_memory, usable_cores
from adasearch.errors import ModelError
from adasearch.records import FinalRecord, Rate, Speed, write_final
from adasearch.tuning.export import MARKER
from adasearch.tuning.export._card import speed_lines
from adasearch.tuning.export._folder import amend_card
from adasearch.tuning.export._verify import WEIGHTS, marker, open_export
from adasearch.workbench import cache_folder

PROMPT, WRITTEN = 128, 16
_ROOM = ".dense-"
"""How the folder begins in which the dense model lies as a GGUF file."""
_LEAST, _MOST = 3, 9
"""Pairs that a rate is taken of."""


Reader = Literal["torch", "llama_cpp"]


@value
class Request:
    """What another process is to measure.

    Args:
        folder: model to open: an export, or a folder of transformers.
        dense: dense model that it is timed beside; None has the memory alone.
        reader: what runs both.
    """

    folder: str
    dense: str | None
    device: str
    threads: int
    reader: Reader = "torch"
    prompt: int = PROMPT
    written: int = WRITTEN


@value
class Answer:
    """What it found, see `Speed`."""

    bare_bytes: int
    peak_bytes: int
    dtype: str = ""
    prefill: Rate | None = None
    decode: Rate | None = None


def _greedy(model: Any, ids: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Read a prompt, and return the cache and the most likely next token (1 × 1)."""
    read = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return read.past_key_values, read.logits[:, -1:].argmax(-1)


def decode_seconds(model: Any, ids: torch.Tensor, written: int) -> float:
    """Return the seconds of writing tokens one by one, the most likely each time, after a prompt that is read before.

    Args:
        model: causal language model in the layout of transformers.
        ids: the prompt, 1 × T.
        written: tokens.
    """
    cache, last = _greedy(model, ids)

    def write() -> None:
        token = last
        for _ in range(written):
            logits = model(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            token = logits[:, -1:].argmax(-1)

    return costs.seconds_of(write, ids.device)


def prefill_seconds(model: Any, ids: torch.Tensor) -> float:
    """Return the seconds of reading a prompt (1 × T), its keys and values kept."""
    return costs.seconds_of(lambda: _greedy(model, ids), ids.device)


def rate(tokens: int, own: Callable[[], float], dense: Callable[[], float]) -> Rate:
    """Return the tokens per second of two works of `tokens` tokens each that take turns, see `costs.in_turns`."""
    times = costs.in_turns(own, dense, least=_LEAST, most=_MOST)
    gains = times[:, 1] / times[:, 0]
    speeds = tokens / np.median(times, axis=0)
    return Rate(
        own=float(speeds[0]), dense=float(speeds[1]), gain=float(np.median(gains)), spread=costs.median_error(gains)
    )


class Reading(Protocol):
    """A model that some program runs, and what it takes there.

    Args:
        dtype: number format of its weights, empty where the program does not tell.
    """

    dtype: str

    def prefill(self) -> float:
        """Return the seconds of reading the prompt."""

    def decode(self) -> float:
        """Return the seconds of writing after it."""

    def settle(self) -> None:
        """Make ready for being timed, once the memory was looked at."""


class _InTorch:
    """A model that torch runs, see `Reading`."""

    def __init__(self, folder: Path, asked: Request) -> None:
        is_export = (folder / MARKER).is_file()
        self._model = open_export(folder, asked.device) if is_export else loading.load(folder, device=asked.device)
        self.dtype = str(self._model.dtype).removeprefix("torch.")
        self._ids = torch.arange(asked.prompt, device=asked.device)[None] % self._model.config.vocab_size
        self._written = asked.written

    def prefill(self) -> float:
        return prefill_seconds(self._model, self._ids)

    def decode(self) -> float:
        return decode_seconds(self._model, self._ids, self._written)

    def settle(self) -> None:
        # How weights lie in memory follows from how a file was opened, and is no matter of the model.
        self._model = costs.aligned(self._model)


class _InLlamaCpp:
    """A GGUF file that llama.cpp runs, see `Reading`."""

    dtype = ""

    def __init__(self, folder: Path, asked: Request) -> None:
        self._prompt, self._written = list(range(asked.prompt)), asked.written
        self._runner = llama_cpp.Runner(folder, asked.threads, 2 * (asked.prompt + asked.written))

    def prefill(self) -> float:
        return self._runner.seconds(self._prompt, 1)[0]

    def decode(self) -> float:
        return self._runner.seconds(self._prompt, self._written)[1]

    def settle(self) -> None:
        pass


_READERS: dict[Reader, Callable[[Path, Request], Reading]] = {"torch": _InTorch, "llama_cpp": _InLlamaCpp}


def measure(asked: Request) -> Answer:
    """Return what a request asks for, measured in this process; its peak memory is that of the first model alone."""
    models.set_threads(asked.threads)
    on_gpu, opened = asked.device == "cuda", _READERS[asked.reader]
    bare = 0 if on_gpu else peak_memory()
    with torch.inference_mode():
        own = opened(Path(asked.folder), asked)
        own.decode()
        found = Answer(bare_bytes=bare, peak_bytes=models.gpu_peak() if on_gpu else peak_memory(), dtype=own.dtype)
        if asked.dense is None:
            return found
        dense = opened(Path(asked.dense), asked)
        for model in (own, dense):
            model.settle()
        prefill = rate(asked.prompt, own.prefill, dense.prefill)
        return dataclasses.replace(found, prefill=prefill, decode=rate(asked.written, own.decode, dense.decode))


def _ask(asked: Request) -> Answer:
    """Do `measure` in a new interpreter."""
    with tempfile.TemporaryDirectory() as room:
        path = Path(room) / "request.json"
        path.write_text(json.dumps(plain(asked)), encoding="utf-8")
        return parse(Answer, fresh.ask(__name__, [str(path)]), "speed:")


def exports_of(run: Path, record: FinalRecord) -> dict[str, Path]:
    """Return the exports of a model by the label of their format, ``""`` first, whatever rank they are named by."""
    pattern = re.compile(rf"(?:\d+-)?{re.escape(record.name)}(?:\.(.+))?")
    found = ((pattern.fullmatch(path.name), path) for path in sorted((run / "export").glob(f"*{record.name}*")))
    return dict(sorted((match[1] or "", path) for match, path in found if match))


def _weights_size(folder: Path) -> int:
    return sum(path.stat().st_size for kind in WEIGHTS for path in folder.rglob(kind))


class Scale:
    """Measures exports of one run beside its dense model, whose own memory is measured once for each number format.

    Args:
        study: of the run.
        run: its folder.
    """

    def __init__(self, study: StudyConfig, run: Path) -> None:
        self._device = "cpu" if study.cluster.gpus_per_worker == 0 else models.pick_device().type
        self._source = models.resolve(study.model)
        self._dtype = models.pick_dtype(study.model.dtype, self._device)
        self._run = run
        for left in run.glob(f"{_ROOM}*"):  # by a driver that was killed; only one works on a run
            shutil.rmtree(left, ignore_errors=True)
        self._threads = usable_cores()
        self._dense_peaks: dict[str, int] = {}

    def speed(self, folder: Path, label: str) -> Speed:
        """Return what the export in `folder` takes; of a GGUF file its size alone where llama.cpp is not installed.

        Raises:
            ModelError: it cannot be opened, or there is not memory or disk enough for both models.
        """
        told = marker(folder)
        dtype = str(told["dtype"])
        sizes = Speed(format=label or "hf", file_bytes=_weights_size(folder), dense_file_bytes=0, dtype=dtype)
        if told.get("layout") != "gguf":
            # that of the export: the machine of the workers may have had another one to offer
            dense = self._dense(getattr(torch, dtype))
            sizes = dataclasses.replace(
                sizes, dense_file_bytes=sum(Path(s.path).stat().st_size for s in checkpoints.check_folder(dense))
            )
            return self._timed(sizes, self._request(folder, dense, "torch", self._device))
        if not llama_cpp.installed():
            return sizes
        # beside the run: the system's folder for temporary files may be small
        with tempfile.TemporaryDirectory(prefix=_ROOM, dir=self._run) as room:
            _write_dense(self._dense(self._dtype), Path(room), dtype)
            sizes = dataclasses.replace(sizes, dense_file_bytes=_weights_size(Path(room)))
            return self._timed(sizes, self._request(folder, Path(room), "llama_cpp", "cpu"))

    def _dense(self, dtype: torch.dtype) -> Path:
        return models.fetch_weights(self._source, cache_folder(self._run) / "models", dtype)

    def _timed(self, sizes: Speed, asked: Request) -> Speed:
        key = f"{asked.reader} {sizes.dtype}"
        if key not in self._dense_peaks:
            assert asked.dense is not None
            alone = dataclasses.replace(asked, folder=asked.dense, dense=None)
            self._dense_peaks[key] = _ask(alone).peak_bytes
        found = _ask(asked)
        return dataclasses.replace(
            sizes,
            prefill=found.prefill,
            decode=found.decode,
            peak_bytes=found.peak_bytes,
            dense_peak_bytes=self._dense_peaks[key],
            bare_bytes=found.bare_bytes,
            device=asked.device,
            dtype=found.dtype or sizes.dtype,
            threads=asked.threads,
            prompt=asked.prompt,
            written=asked.written,
        )

    def _request(self, folder: Path, dense: Path, reader: Reader, device: str) -> Request:
        return Request(folder=str(folder.resolve()), dense=str(dense.resolve()), device=device, threads=self._threads,
                       reader=reader)  # fmt: skip


def _write_dense(weights: Path, folder: Path, dtype: str) -> None:
    """Write the dense model into `folder` as a GGUF file.

    Raises:
        ModelError: llama.cpp does not know such models, or the disk is full.
    """
    from adasearch.tuning.export import gguf

    try:
        gguf.write_dense(models.open_base(weights), folder / loading.GGUF, gguf.GgufOptions(dtype=dtype))  # type: ignore[arg-type]
    except OSError as error:
        raise ModelError(f"the dense model cannot be written beside it: {error}") from error


def measure_exports(
    study: StudyConfig, run: Path, records: Iterable[FinalRecord], say: Callable[[str], None]
) -> list[FinalRecord]:
    """Measure the exports of models that have no figures yet, write these into records and cards, return all records.

    To be called when nothing else of the run computes. What cannot be measured is said, and left out.
    """
    found, scale = [], None
    for record in records:
        exports = exports_of(run, record)
        if exports and not record.speeds:
            speeds = []
            for label, folder in exports.items():
                try:
                    if scale is None:
                        say("measuring speed and memory of the exports beside the dense model")
                        scale = Scale(study, run)
                    speeds.append(scale.speed(folder, label))
                    amend_card(folder, speed_lines(speeds[-1]))
                except ModelError as error:
                    say(f"{folder.name}: speed and memory are not known: {error}")
            record = dataclasses.replace(record, speeds=tuple(speeds))
            write_final(run, record)
        found.append(record)
    return found


if __name__ == "__main__":
    fresh.respond(
        lambda: measure(parse(Request, json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), "request:"))
    )
