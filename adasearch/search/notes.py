"""What a reader finds beside a trial and a study in the dashboard: Markdown, made from records. Pure."""

from __future__ import annotations

from adasearch.config import StudyConfig, TaskScore, TrialResult
from adasearch.racing import Rung
from adasearch.records import Record

_ESCAPED = str.maketrans({c: f"\\{c}" for c in "\\`*_{}[]<>|#$"})


def escaped(text: str) -> str:
    """Return `text` so that Markdown and HTML show it as it is."""
    return text.translate(_ESCAPED)


def _cell(score: float | None, stderr: float | None) -> str:
    return "" if score is None else f"{score:.4f} ± {stderr or 0.0:.4f}"


def _task_rows(tasks: tuple[TaskScore, ...], dense: TrialResult | None) -> list[str]:
    known = {task.task: task for task in dense.tasks} if dense else {}
    rows = ["| task | items | acc | acc_norm | margin | log_score | acc, dense |", "|---|---|---|---|---|---|---|"]
    for task in tasks:
        other = known.get(task.task)
        cells = (
            escaped(task.task),
            str(task.n),
            _cell(task.acc, task.acc_stderr),
            _cell(task.acc_norm, task.acc_norm_stderr),
            _cell(task.margin, task.margin_stderr),
            _cell(task.log_score, task.log_score_stderr),
            _cell(other.acc, other.acc_stderr) if other else "",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _pairs(title: str, pairs: dict[str, str]) -> list[str]:
    rows = [f"| {escaped(key)} | {escaped(item)} |" for key, item in pairs.items()]
    return ["", f"| {title} | |", "|---|---|", *rows]


def _rung(rung: Rung) -> str:
    """Return what was known at a rung, and where the trial stood against its rival or what was asked of it."""
    race = "" if rung.bound is None else f"; {rung.gap:+.4f} to the rival, at most {rung.bound:+.4f} with confidence"
    if rung.least is not None:
        asked = f"at least {rung.least:.4f}" if rung.kind == "unrecovered" else f"at most {-rung.least:.4f}"
        race = f"; {asked} was asked to go on"
    return _cell(rung.value, rung.stderr) + race


def _basis(result: TrialResult) -> str:
    """Return what a score rests on."""
    if not result.measured:
        return f"predicted from its {escaped(result.rungs[-1].label)}: it stopped there"
    return f"on {result.items} items" + (", stopped early" if result.stopped else "")


def trial_note(record: Record, dense: TrialResult | None) -> str:
    """Return what a trial is and what came of it, beside the dense model where that is known."""
    lines = [f"Recipe **{escaped(record.recipe)}**" if record.recipe else "Proposed by the sampler", ""]
    if record.failure:
        phase = f" while in phase {escaped(record.failure.phase)}" if record.failure.phase else ""
        lines.append(f"**Failed** ({record.failure.kind}){phase}: {escaped(record.failure.message)}")
    result = record.result
    if result is not None:
        lines.append(f"Score **{_cell(result.score, result.stderr)}** {_basis(result)}")
        lines += ["", *_task_rows(result.tasks, dense)] if result.tasks else [""]
        facts = {"parameters": f"{result.parameters:,}", "peak memory, MiB": f"{result.peak_bytes / 2**20:.0f}"}
        facts |= {f"{cost}, fraction of dense": f"{share:.4f}" for cost, share in result.shares.items()}
        facts |= {key: str(item) for key, item in result.notes.items()}
        lines += _pairs("fact", facts)
        if result.rungs:
            lines += _pairs("rung", {rung.label: _rung(rung) for rung in result.rungs})
        lines += _pairs("seconds", {key: f"{item:.1f}" for key, item in result.seconds.items()})
    return "\n".join(lines)


def study_note(config: StudyConfig, dense: TrialResult | None, best: Record | None) -> str:
    """Return what a study is after, where it stands and how to go on from it."""
    low, high = config.removes
    removes = f"{low:.0%}" if low == high else f"{low:.0%} to {high:.0%}"
    lines = [
        f"Search for the best way to remove {removes} of the parameters of "
        f"`{config.model.name.replace('`', '')}`: {config.trials} trials, seed {config.seed}.",
        "",
        f"Objective: mean {config.objective.metric} over {', '.join(map(escaped, config.objective.search))}; "
        f"{config.objective.items} items of each, higher is better.",
        "",
    ]
    if config.objective.several:
        lines += [f"Minimised beside it, as fractions of the dense model: {', '.join(config.objective.also)}.", ""]
    if config.objective.at_most:
        limits = ", ".join(f"{cost} {limit:g}" for cost, limit in config.objective.at_most.items())
        lines += [f"Hard limits, as fractions of the dense model: {limits}.", ""]
    if dense is not None:
        lines.append(f"- dense model: {_cell(dense.score, dense.stderr)}")
    if best is not None and best.result is not None:
        score, half = best.result.score, 1.96 * best.result.stderr
        name = f" (recipe {escaped(best.recipe)})" if best.recipe else ""
        interval = f"95 % interval {score - half:.4f} to {score + half:.4f}"
        lines.append(f"- best trial: {best.number}{name}, {score:.4f}, {interval}")
    lines += [
        "",
        "The best of many noisy scores is too high; the report has scores on items that the search never saw.",
        "",
        "Make a trial again and compare: `adasearch replay RUN --trial N`",
    ]
    return "\n".join(lines)
