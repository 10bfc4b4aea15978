"""A calibration sample through the model: statistics gathered by hooks, kept on disk by content.

The model is shared by the trials of a worker, so every hook, gradient and flag set here is undone, whatever happens.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional

from adasearch.errors import DataError, StorageError, TrialError
from adasearch.pruning import statistics
from adasearch.pruning.statistics import FAMILIES, Covariance, GradientSum, Moments, Statistics
from adasearch.pruning.structure import ModelStructure, Slice

# A batch this large keeps two cores busy; a larger one only holds more activations.
_CPU_TOKENS, _DEVICE_TOKENS = 512, 8192
_HEAD_ROWS = 256
_ABANDONED_SECONDS = 3600.0


def collect(
    model: nn.Module,
    structure: ModelStructure,
    tokens: Tensor,
    needs: frozenset[str],
    *,
    token_budget: int | None = None,
) -> Statistics:
    """Return the statistics in `needs` of a dense model on a calibration sample.

    Sequences go through the model in batches of at most `token_budget` tokens; one by one where `fisher` is needed,
    since it squares the gradient of each sequence. The result depends on neither, up to rounding. Gradients of the
    member matrices are held in float32 (twice that with `fisher`), everything else stays small.

    Args:
        model: causal language model in the layout of transformers: `base_model`, `get_output_embeddings`.
        structure: the groups of that model.
        tokens: N × T token ids.
        needs: names out of ``moments``, ``covariance``, ``gradient``, ``fisher``.
        token_budget: greatest number of tokens in one batch, one sequence always fits; None suits the device.

    Raises:
        DataError: there is no sequence, or sequences are too short to have a next token.
        TrialError: a statistic is not finite (kind ``nan``).
    """
    assert needs <= FAMILIES, f"unknown statistics {sorted(needs - FAMILIES)}"
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DataError(
            f"a calibration sample must be at least 1 sequence of 2 tokens, given shape {tuple(tokens.shape)}"
        )
    sequences, length = tokens.shape
    device = next(model.parameters()).device
    token_budget = token_budget or (_CPU_TOKENS if device.type == "cpu" else _DEVICE_TOKENS)
    batch = 1 if "fisher" in needs else max(1, token_budget // length)
    features: dict[str, Moments | Covariance] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        stack.enter_context(_watching(model, structure, needs, features))
        gradients = stack.enter_context(_differentiating(model, structure, needs))
        for part in torch.split(tokens.to(device), batch):
            if gradients:
                _backward(model, part)
            else:
                with torch.no_grad():
                    model.base_model(input_ids=part, use_cache=False)  # type: ignore[operator]
    tensors = _feature_tensors(features) | _gradient_tensors(model, structure, gradients, sequences, needs)
    _check_finite(tensors)
    return Statistics(tokens=sequences * length, tensors=tensors)


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off for a while."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _watching(
    model: nn.Module, structure: ModelStructure, needs: frozenset[str], features: dict[str, Moments | Covariance]
) -> Iterator[None]:
    """Merge what each output projection reads into `features`, by ``family/module``."""
    kinds: dict[str, type[Moments] | type[Covariance]] = {"moments": Moments, "covariance": Covariance}
    wanted = {name: kind for name, kind in kinds.items() if name in needs}

    def watch(module: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().flatten(0, -2)
            for name, kind in wanted.items():
                seen = features.get(f"{name}/{module}")
                new = kind.of(x)
                features[f"{name}/{module}"] = seen.merge(new) if seen else new  # type: ignore[arg-type]

        return hook

    with contextlib.ExitStack() as stack:
        for output in dict.fromkeys(group.output for group in structure.groups if wanted):
            handle = model.get_submodule(output).register_forward_pre_hook(watch(output))
            stack.callback(handle.remove)
        yield


def _members(structure: ModelStructure, model: nn.Module) -> dict[str, Slice]:
    """Return the cut matrices by parameter name; biases and norms carry no importance of their own."""
    slices = [s for group in structure.groups for s in group.slices]
    return {s.parameter: s for s in slices if model.get_parameter(s.parameter).ndim == 2}


@contextlib.contextmanager
def _differentiating(
    model: nn.Module, structure: ModelStructure, needs: frozenset[str]
) -> Iterator[dict[str, GradientSum]]:
    """Sum the gradients of the cut matrices while batches run backward; nothing else of the model has a gradient.

    A gradient is added to its float32 sum and dropped as soon as it is complete, so that one at a time is alive.
    """
    sums: dict[str, GradientSum] = {}
    if not needs & {"gradient", "fisher"}:
        yield sums
        return
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def keep(total: GradientSum) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            total.add(parameter.grad)
            parameter.grad = None

        return hook

    with contextlib.ExitStack() as stack:
        try:
            for parameter, _, _ in before:
                parameter.grad = None
                parameter.requires_grad = False
            for name in _members(structure, model):
                parameter = model.get_parameter(name)
                sums[name] = GradientSum.zeros(parameter, fisher="fisher" in needs)
                parameter.requires_grad = True
                handle = parameter.register_post_accumulate_grad_hook(keep(sums[name]))  # type: ignore[no-untyped-call]
                stack.callback(handle.remove)
            yield sums
        finally:
            for parameter, flag, gradient in before:
                parameter.requires_grad = flag
                parameter.grad = gradient


def _backward(model: nn.Module, batch: Tensor) -> None:
    """Run the sum over the sequences of `batch` (B × T) of their mean next-token cross-entropy backward.

    The head is run on some tokens at a time, since logits over the whole vocabulary would outweigh the model.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    with torch.enable_grad():
        hidden = model.base_model(input_ids=batch, use_cache=False).last_hidden_state  # type: ignore[operator]
        read = hidden[:, :-1].flatten(0, 1)
        loss, gradients = 0.0, list[Tensor]()
        inputs, labels = torch.split(read.detach(), _HEAD_ROWS), torch.split(batch[:, 1:].flatten(), _HEAD_ROWS)
        for x, y in zip(inputs, labels, strict=True):
            x.requires_grad = True
            part = functional.cross_entropy(head(x).float(), y, reduction="sum") / (batch.shape[1] - 1)
            gradients += torch.autograd.grad(part, x)
            loss += float(part.detach())
        if not math.isfinite(loss):
            raise TrialError("nan", f"the calibration loss must be finite, got {loss}", "calibrate")
        torch.autograd.backward(read, torch.cat(gradients))


def _feature_tensors(features: dict[str, Moments | Covariance]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for place, held in features.items():
        second = ("m2", held.m2) if isinstance(held, Moments) else ("gram", held.gram)
        tensors |= {f"{place}/mean": held.mean.cpu(), f"{place}/{second[0]}": second[1].cpu()}
    return tensors


def _gradient_tensors(
    model: nn.Module, structure: ModelStructure, sums: dict[str, GradientSum], sequences: int, needs: frozenset[str]
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, member in _members(structure, model).items() if sums else ():
        with torch.no_grad():
            rows = sums.pop(name).read(model.get_parameter(name), member.dim, sequences)
        for kind, row in rows.items():
            family, _, statistic = kind.partition("/")
            if family in needs:
                tensors[f"{family}/{name}/{statistic}"] = row.cpu()
    return tensors


def _check_finite(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise TrialError("nan", f"statistics must be finite, {name} is not", "calibrate")


def cached(
    folder: Path,
    key: str,
    needs: frozenset[str],
    compute: Callable[[frozenset[str]], Statistics],
    *,
    max_bytes: int = 4 * 1024**3,
) -> Statistics:
    """Return the statistics in `needs`, from disk where they are, computed and stored where they are not.

    There is one file per family, ``<key>.<family>.safetensors``, written beside its place and renamed, so any number of
    processes may read, write and be killed at any time; a damaged file counts as absent. Files used longest ago go
    when the folder outgrows `max_bytes`.

    Args:
        folder: made when it is missing; may be deleted at any time.
        key: fingerprint of all that the statistics depend on (weights, structure, sample); letters, digits, ``._-``.
        needs: families.
        compute: given the families that are missing, returns them.
        max_bytes: that the folder may hold.

    Raises:
        StorageError: the folder cannot be written.
    """
    assert re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", key), f"no file name: {key!r}"
    found = {need: _read(_place(folder, key, need)) for need in sorted(needs)}
    missing = frozenset(need for need, part in found.items() if part is None)
    parts = [part for part in found.values() if part is not None]
    if missing:
        fresh = compute(missing)
        assert fresh.families == missing, f"computed {sorted(fresh.families)}, not {sorted(missing)}"
        try:
            for need in sorted(missing):
                _write(fresh.only(need), _place(folder, key, need))
            _shrink(folder, max_bytes)
        except (OSError, SafetensorError) as error:
            raise StorageError(f"the cache folder {folder} must be writable: {error}") from error
        parts.append(fresh)
    return statistics.union(parts)


def _place(folder: Path, key: str, need: str) -> Path:
    return folder / f"{key}.{need}.safetensors"


def _read(path: Path) -> Statistics | None:
    try:
        found = statistics.load(path)
    except DataError:
        return None
    with contextlib.suppress(OSError):  # evicted by another process since; what was read stays mapped
        os.utime(path)
    return found


def _write(part: Statistics, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{uuid.uuid4().hex}.part")
    try:
        statistics.save(part, draft)
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def _shrink(folder: Path, max_bytes: int) -> None:
    """Delete what killed writers left behind, then the files used longest ago until the folder holds `max_bytes`."""
    files: list[tuple[float, int, Path]] = []
    ours = tuple(f".{family}.safetensors" for family in FAMILIES)
    for path in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process shrinks the folder too
            state = path.stat()
            if path.suffix == ".part" and time.time() - state.st_mtime > _ABANDONED_SECONDS:
                path.unlink()
            elif path.name.endswith(ours):
                files.append((state.st_mtime, state.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= size
