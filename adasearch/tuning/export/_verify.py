"""Open an export as a user will, in a process of its own, and compare it with what was exported.

``python -m adasearch.tuning.export._verify FOLDER REFERENCE DEVICE`` is that process; it answers with JSON.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adasearch.documents import parse, plain, value
from adasearch.errors import AdaSearchError, ConfigError, ModelError
from adasearch.registry import EXPORT
from adasearch.tuning.export import MARKER, SUMS, VerifyReport

if TYPE_CHECKING:
    import torch

PROMPTS = 8
LENGTH = 24
NEW_TOKENS = 16
SAMPLED = 16
ANSWER = "adasearch-verify:"
SECONDS = 3600
WEIGHTS = ("*.safetensors", "*.gguf")


@value
class Opened:
    """What the other process saw: parameters, difference of logits and their scale, and whether the cache agrees."""

    parameters: int
    difference: float
    scale: float
    cache_agrees: bool


def prompts(vocabulary: int) -> torch.Tensor:
    """Return the fixed prompts, P × T token ids: arithmetic, so that they need neither tokenizer nor random numbers."""
    import torch

    row, column = torch.arange(PROMPTS)[:, None], torch.arange(LENGTH)[None, :]
    return (row * 7919 + column * (104729 + 31 * row) + 17) % vocabulary


def widened(model: Any) -> Any:
    """Return the model in float32, in evaluation mode: itself or a copy.

    In half precision another number of threads is enough to move a logit by a third of the scale, so that two
    processes cannot be compared; every weight of half precision is a float32 number.
    """
    import torch

    exact = all(p.dtype in {torch.float32, torch.float64} for p in model.parameters())
    return (model if exact else copy.deepcopy(model).float()).eval()


def logits_of(model: Any) -> torch.Tensor:
    """Return the logits after each token of the fixed prompts, P × T × V, computed in float32, on the CPU."""
    import torch

    was_training = model.training
    wide = widened(model)
    device = next(wide.parameters()).device
    with torch.inference_mode():
        logits = wide(input_ids=prompts(model.config.vocab_size).to(device), use_cache=False).logits
    model.train(was_training)
    found: torch.Tensor = logits.float().cpu()
    return found


def sample_of(logits: torch.Tensor) -> list[list[float]]:
    """Return a few logits at the end of each prompt, enough to recognise the model later: P × 16."""
    import torch

    columns = torch.arange(SAMPLED) * logits.shape[-1] // SAMPLED
    return [[round(float(x), 5) for x in row] for row in logits[:, -1, columns]]


def sha256(path: Path) -> str:
    """Return the checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(folder: Path) -> tuple[int, list[str]]:
    """Return how many files `SHA256SUMS` lists, and what is wrong with them."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines if line)}
    except (OSError, UnicodeDecodeError) as error:
        return 0, [f"{SUMS} must be readable: {error}"]
    problems = []
    for name, digest in sums.items():
        if Path(name).name != name:
            problems.append(f"{SUMS} must list plain file names, given {name!r}")
        elif not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif sha256(folder / name) != digest:
            problems.append(f"{name} has changed since it was written")
    stray = sorted(p.name for kind in WEIGHTS for p in folder.glob(kind) if p.name not in sums)
    problems += [f"{name} is not listed in {SUMS}" for name in stray]
    if MARKER not in sums:
        problems.append(f"{SUMS} must list {MARKER}")
    return len(sums), problems


def _open(folder: Path, device: str) -> Any:
    """Open `folder` as its format does, which the marker names."""
    name = str(_marker(folder).get("format"))
    try:
        return EXPORT.get(name, f"{folder}/{MARKER}").facts["open"](folder, device)
    except ConfigError as error:
        raise ModelError(str(error)) from error


def _cache_agrees(model: Any) -> bool:
    import torch

    ids = prompts(model.config.vocab_size)[:1].to(model.device)
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    with_cache = model.generate(ids, use_cache=True, **options)
    return bool(torch.equal(with_cache, model.generate(ids, use_cache=False, **options)))


def open_and_compare(folder: Path, reference: Path | None, device: str) -> Opened:
    """Return what the model in `folder` does on the fixed prompts.

    Args:
        folder: the export.
        reference: file with the logits of the model in memory; None compares with the sample kept in the export.
        device: where to run.
    """
    import torch
    from safetensors.torch import load_file

    model = widened(_open(folder, device))
    logits = logits_of(model)
    if reference is None:
        kept = _marker(folder)["logits"]
        difference = float((torch.tensor(sample_of(logits)) - torch.tensor(kept)).abs().max())
    else:
        difference = float((logits - load_file(reference)["logits"]).abs().max())
    return Opened(
        parameters=sum(p.numel() for p in model.parameters()),
        difference=difference,
        scale=float(logits.abs().max()),
        cache_agrees=_cache_agrees(model),
    )


def _open_fresh(folder: Path, reference: Path | None, device: str) -> Opened:
    """Do `open_and_compare` in a new interpreter that is told to stay off the network."""
    root = str(Path(__file__).resolve().parents[3])
    with tempfile.TemporaryDirectory() as modules:
        env = {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_MODULES_CACHE": modules}
        env["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", __name__, str(folder.resolve()), str(reference or ""), device]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=SECONDS)
    answers = [line.removeprefix(ANSWER) for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if not answers:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise ModelError(f"it cannot be opened in a fresh process: {last[0]}")
    answer = json.loads(answers[-1])
    if "error" in answer:
        raise ModelError(answer["error"])
    return parse(Opened, answer, "verify:")


def _judge(opened: Opened, expected: int, tolerance: float) -> list[str]:
    problems = []
    if opened.parameters != expected:
        problems.append(f"it has {opened.parameters:,} parameters, the plan promises {expected:,}")
    if not opened.difference <= tolerance:
        problems.append(f"its logits differ by {opened.difference:.3g}, more than {tolerance:.3g}")
    if not opened.cache_agrees:
        problems.append("generating with and without a cache gives different tokens")
    return problems


def _marker(folder: Path) -> dict[str, Any]:
    try:
        data = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return {**data, "parameters": int(data["parameters"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: must be an export of adasearch with a readable {MARKER}: {error}") from error


def verify(folder: Path, *, reference: Path | None = None, device: str = "cpu", fresh: bool = True) -> VerifyReport:
    """Check an export: checksums, shapes, parameter count, logits on fixed prompts, generation with and without cache.

    Args:
        folder: the export.
        reference: file with the logits of the model that was exported; None compares with the sample in the export.
        device: where to run the model.
        fresh: open it in a new process, as a user will; False stays in this one.

    Raises:
        ModelError: `folder` is no export of adasearch.
    """
    folder = Path(folder)
    expected = _marker(folder)["parameters"]
    files, problems = check_files(folder)
    opened = Opened(parameters=0, difference=float("nan"), scale=0.0, cache_agrees=False)
    tolerance = 1e-4
    if not problems:
        try:
            opened = (_open_fresh if fresh else open_and_compare)(folder, reference, device)
            # Relative to the size of the logits; another device sums in another order.
            tolerance = (1e-4 if reference is not None else 1e-3) * max(1.0, opened.scale / 10)
            problems = _judge(opened, expected, tolerance)
        except ModelError as error:
            problems = [str(error)]
        except subprocess.TimeoutExpired:
            problems = [f"opening it took more than {SECONDS} seconds"]
    return VerifyReport(
        folder=str(folder),
        files=files,
        parameters=opened.parameters,
        expected=expected,
        difference=opened.difference,
        tolerance=tolerance,
        cache_agrees=opened.cache_agrees,
        fresh=fresh,
        problems=tuple(problems),
    )


def main(arguments: list[str]) -> None:
    """Answer for one export on standard output."""
    folder, reference, device = arguments
    try:
        answer = plain(open_and_compare(Path(folder), Path(reference) if reference else None, device))
    except AdaSearchError as error:
        answer = {"error": str(error)}
    sys.stdout.write(f"\n{ANSWER}{json.dumps(answer)}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
