"""The ``README.md`` of an exported model: what it is, how good it is, how to open it and how to make it again."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from adasearch.config import TaskScore
from adasearch.records import FinalRecord, Speed
from adasearch.tuning.export import ModelCard

if TYPE_CHECKING:
    from adasearch.pruning.plan import PruningPlan

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")

MADE = "## How it was made"
_UNKNOWN_LICENCE = "unknown to adasearch; that of the base model applies, so look it up before you share this"

_LOAD_STOCK = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/folder")"""

_LOAD_PER_LAYER = """import adasearch

model = adasearch.load("path/to/folder")  # runs no code from the folder"""

_LOAD_GGUF = "llama-cli -m path/to/folder/model.gguf"

_LOAD_TRUSTED = """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/folder", trust_remote_code=True)  # runs modeling_adasearch.py
tokenizer = AutoTokenizer.from_pretrained("path/to/folder")"""


def _cell(text: object) -> str:
    """Return `text` so that it cannot leave its table cell."""
    return " ".join(str(text).replace("|", "\\|").replace("<", "&lt;").split())


def _figure(mean: float | None, stderr: float | None) -> str:
    return "" if mean is None else f"{100 * mean:.2f} ± {100 * (stderr or 0.0):.2f}"


def score_sections(record: FinalRecord | None, dense: FinalRecord | None) -> list[list[str]]:
    """Return the sections of the card on scores and perplexities beside the dense model, those that there are."""
    if record is None:
        return []
    return [section for section in (_scores(record, dense), _perplexities(record, dense)) if section]


def _scores(record: FinalRecord, known: FinalRecord | None) -> list[str]:
    if not record.report:
        return []
    dense = {score.task: score for score in known.report} if known else {}
    head = ["| task | items | acc | acc_norm |", "|---|---:|---:|---:|"]
    if dense:
        head = [head[0] + " dense acc | dense acc_norm |", head[1] + "---:|---:|"]

    def row(score: TaskScore) -> str:
        cells = [_cell(score.task), str(score.n)]
        for found in (score, dense.get(score.task)) if dense else (score,):
            cells.append(_figure(found.acc, found.acc_stderr) if found else "")
            cells.append(_figure(found.acc_norm, found.acc_norm_stderr) if found else "")
        return f"| {' | '.join(cells)} |"

    note = "Zero-shot, in percent ± standard error over items; the search saw none of these items."
    return ["## Scores", "", note, "", *head, *map(row, record.report), ""]


def _perplexities(record: FinalRecord, known: FinalRecord | None) -> list[str]:
    if not record.perplexity:
        return []
    dense = known.perplexity if known else {}
    rows = [
        f"| {_cell(name)} | {figure:.3f} | {format(dense[name], '.3f') if name in dense else ''} |"
        for name, figure in sorted(record.perplexity.items())
    ]
    return ["## Perplexity", "", "| corpus@window | this model | dense |", "|---|---:|---:|", *rows, ""]


def _loading(layout: str) -> list[str]:
    if layout == "gguf":
        note = "llama.cpp and what is built on it (llama-cpp-python, Ollama, LM Studio) open it; with adasearch too:"
        return [
            "## How to load it",
            "",
            "```sh",
            _LOAD_GGUF,
            "```",
            "",
            note,
            "",
            "```python",
            _LOAD_PER_LAYER,
            "```",
            "",
        ]
    if layout == "stock":
        note = "Every layer has the same widths, so a stock class of transformers opens it."
        return ["## How to load it", "", note, "", "```python", _LOAD_STOCK, "```", ""]
    note = "Layers differ from what the stock class can build. With adasearch installed:"
    lines = ["## How to load it", "", note, "", "```python", _LOAD_PER_LAYER, "```", ""]
    return [*lines, "Without it:", "", "```python", _LOAD_TRUSTED, "```", ""]


def _block(title: str, data: object) -> list[str]:
    return [title, "", "```yaml", yaml.safe_dump(data, sort_keys=False).rstrip(), "```", ""] if data else []


def _origin(card: ModelCard) -> list[str]:
    lines = [MADE, ""]
    if card.command:
        lines += ["```sh", card.command, "```", ""]
    lines += _block("Budget:", card.budget)
    lines += _block("Configuration:", card.config)
    lines += _block("Fine-tuned after the cut with:", card.recovery)
    if card.record is not None and card.record.training:
        lines += [f"Its training: {_cell('; '.join(card.record.training))}.", ""]
    lines += [f"Seed {card.seed}. `plan.json` holds the kept units of every group.", ""]
    if card.versions:
        versions = ", ".join(f"{_cell(name)} {_cell(version)}" for name, version in sorted(card.versions.items()))
        lines += [f"Versions: {versions}.", ""]
    return lines


def _front_matter(card: ModelCard) -> list[str]:
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = ["adasearch", "structured-pruning"]
    if _HUB_ID.fullmatch(card.model):
        front["base_model"] = card.model
    if card.licence:
        front["license"] = card.licence
    return ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", ""]


VERDICT = "## Verdict"
SPEED = "## Speed and memory"


def verdict_lines(verdicts: Sequence[str]) -> list[str]:
    """Return the section of the card on how the model does beside others."""
    note = "Report items of all tasks, paired item by item; bootstrap over items within each task."
    return [VERDICT, "", *(f"- {_cell(line)}" for line in verdicts), "", note, ""]


def speed_lines(speed: Speed) -> list[str]:
    """Return the section of the card on what an export takes beside the dense model."""
    head = ["| | this model | dense | |", "|---|---:|---:|---:|"]
    rows = [_bytes_row("weight files", speed.file_bytes, speed.dense_file_bytes)]
    if speed.prefill is None or speed.decode is None:
        note = (
            f"Not timed, and not compared with the dense model in {speed.dtype or 'the same number format'}: llama.cpp "
            "was not installed (`pip install xllamacpp`); `llama-bench -m model.gguf` does it on your machine."
        )
        return [SPEED, "", *head, *rows, "", note, ""]
    rows.append(_bytes_row("peak memory", speed.peak_bytes, speed.dense_peak_bytes))
    for name, found in (("prefill", speed.prefill), ("decode", speed.decode)):
        gain = f"× {found.gain:.2f} ± {found.spread:.2f}"
        rows.append(f"| {name}, tokens/s | {found.own:.1f} | {found.dense:.1f} | {gain} |")
    bare = f", {speed.bare_bytes / 2**20:.0f} MiB of it before a model is opened" if speed.bare_bytes else ""
    runs = "llama.cpp, batch 1" if speed.gguf else "Batch 1"
    note = (
        f"{runs}, {speed.device}, {speed.threads} threads, {speed.dtype}; a prompt of {speed.prompt} tokens, then "
        f"{speed.written} written one by one. Medians; both models take turns in one process, on the machine of the "
        f"run. Peak memory is that of a process that opens the model, reads and writes{bare}."
    )
    return [SPEED, "", note, "", *head, *rows, ""]


def _bytes_row(name: str, own: int, dense: int) -> str:
    beside = [f"{dense / 2**20:.1f}", f"× {own / dense:.2f}"] if dense else ["", ""]
    return f"| {name}, MiB | {own / 2**20:.1f} | {' | '.join(beside)} |"


def with_section(text: str, section: Sequence[str]) -> str:
    """Return a card with a section (its lines, the heading first) in the place of an older one under the same heading.

    Where there is none it comes before the one on how the model was made.
    """
    lines = text.splitlines()
    if section[0] in lines:
        begin = lines.index(section[0])
        end = next(i for i, line in enumerate(lines) if i > begin and line.startswith("## "))
    else:
        begin = end = lines.index(MADE)
    return "\n".join([*lines[:begin], *section, *lines[end:], ""])


def model_card(card: ModelCard, *, title: str, layout: str, plan: PruningPlan, notes: tuple[str, ...] = ()) -> str:
    """Return the text of the model card.

    Args:
        card: where the model came from and how it scored.
        title: heading.
        layout: see `ExportReport`.
        plan: what was cut.
        notes: what to know of this format.
    """
    origin = f"the published recipe `{_cell(card.recipe)}`" if card.recipe else "a configuration found by search"
    study = f" in study `{_cell(card.study)}`" if card.study else ""
    trial = f", trial {card.trial}" if card.trial is not None and card.trial >= 0 else ""
    licence = card.licence or _UNKNOWN_LICENCE
    lines = [
        *_front_matter(card),
        f"# {_cell(title)}",
        "",
        f"Structured pruning of `{_cell(card.model)}` by adasearch: {origin}{study}{trial}.",
        "",
        "| | parameters |",
        "|---|---:|",
        f"| dense | {plan.dense_parameters:,} |",
        f"| this model | {plan.parameters:,} |",
        f"| removed | {100 * plan.removed:.2f} % |",
        "",
        f"Licence: {_cell(licence)}.",
        "",
        *(part for note in notes for part in (note, "")),
        *_loading(layout),
        *itertools.chain.from_iterable(score_sections(card.record, card.dense)),
        *_origin(card),
        "Check the files with `sha256sum -c SHA256SUMS`, and the model with `adasearch verify` on this folder.",
        "",
    ]
    return "\n".join(lines)
