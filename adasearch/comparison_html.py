"""``report.html`` of a comparison: the leaderboard of the recipes on one page, as `report_html` is that of a search."""

from __future__ import annotations

import math
from html import escape

from adasearch import pictures
from adasearch.comparison import PRUNING, Comparison, Row
from adasearch.config import TaskScore, TrialConfig
from adasearch.report import report_score
from adasearch.report_parts import (
    budget_words,
    card,
    document,
    duration,
    figure,
    html_table,
    percent,
    points,
    section,
    short_count,
    signed_points,
)

LINKS = {
    "leaderboard": "Leaderboard", "tasks": "Tasks", "cost": "Cost", "failures": "Failures", "meaning": "Meaning",
    "next": "Next",
}  # fmt: skip


def _all(found: Comparison) -> tuple[Row, ...]:
    return (found.dense, *found.rows)


def _name(row: Row) -> str:
    mark = "".join(f' <span class="soft">own {escape(key)}</span>' for key in row.own)
    return f"{escape(row.name)}{mark}"


def _headline(found: Comparison) -> str:
    scored = [row for row in found.rows if row.final]
    cards = [card(f"{len(scored)}", f"of {len(found.rows)} recipes scored")]
    if found.dense.final is not None:
        cards.append(card(points(*found.dense.score), "report score of the dense model"))
    if found.best is not None and found.best.final is not None:
        cards.append(card(points(*found.best.score), f"highest report score of a recipe, {escape(found.best.name)}"))
        cards.append(card(percent(found.best.final.removed), "of all parameters removed"))
    equal = [row for row in scored if row.versus_best is not None and not row.versus_best.shown]
    words = (
        f"<p>Of {len(scored) - 1} other recipes, {len(equal)} show <b>no difference</b> to the highest on these items; "
        f"{len(scored) - 1 - len(equal)} differ from it.</p>"
        if len(scored) > 1
        else ""
    )
    selection = (
        "<p><b>Nothing was chosen by these items:</b> every recipe is reported. Whoever picks the top row by these "
        "figures selects by them, and its score is then too high on average: the more rows and the fewer items, the "
        "more so. To choose, score on other items first, as <code>adasearch run</code> does.</p>"
    )
    return f'<div class="cards">{"".join(cards)}</div><div class="verdict">{words}{selection}</div>'


def _difference(row: Row) -> str:
    """Return the paired difference to the best, in bold where it is shown."""
    versus = row.versus_best
    if versus is None:
        return "–"
    mean, low, high = map(signed_points, (versus.mean, versus.low, versus.high))
    mean = f"<b>{mean}</b>" if versus.shown else mean
    return f"{mean} [{low}, {high}]"


def _leaderboard(found: Comparison) -> str:
    whole = found.dense.score[0]
    head = ["rank", "<recipe", "score", "retained", "to the best", *found.corpora, "parameters", "removed"]
    rows = []
    for rank, row in enumerate(_all(found)):
        if row.final is None:
            cells = ["–", _name(row), row.state, *["–"] * (len(head) - 3)]
            rows.append(("", cells))
            continue
        score, stderr = row.score
        cells = [str(rank or "–"), _name(row), points(score, stderr), percent(score / whole if whole else math.nan)]
        perplexity = row.final.perplexity
        cells += [_difference(row), *(f"{perplexity[n]:.2f}" if n in perplexity else "–" for n in found.corpora)]
        rows.append(("" if rank else "total", [*cells, short_count(row.final.parameters), percent(row.final.removed)]))
    notes = (
        "<p>The score is the mean over the report tasks of <code>acc_norm</code> where a task has it, else of "
        "<code>acc</code>, in percent ± standard error. Differences are paired over the items, every task weighing the "
        "same, with their 95 % bootstrap interval; bold ones leave out 0. Each interval stands for its pair alone: "
        "among twenty equal recipes about one would look different. Perplexity is named "
        "<code>corpus@window</code>, the window in tokens; different windows cannot be compared.</p>"
    )
    return section("leaderboard", "Leaderboard", _picture(found), html_table(head, rows), notes)


def _picture(found: Comparison) -> str:
    marks = []
    for row in found.rows:
        score, stderr = row.score
        if row.final is not None and not math.isnan(score):
            hint = f"{row.name}: {points(score, stderr)}"
            marks.append((row.name, pictures.Point(x=0, y=100 * score, stderr=100 * stderr, kind="recipe", hint=hint)))
    if not marks:
        return ""
    dense = 100 * found.dense.score[0] if found.dense.final else None
    svg = pictures.ranking(marks, name="report score, percent", dense=dense)
    return figure(svg, "Bars are one standard error over items; the dashed line is the dense model. Paired differences "
                       "are more precise than these bars suggest.")  # fmt: skip


def _tasks(found: Comparison) -> str:
    names = found.study.report.tasks
    rows = []
    for row in _all(found):
        if row.final is not None:
            by_task: dict[str, TaskScore] = {score.task: score for score in row.final.report}
            cells = [points(*report_score(by_task[name])) if name in by_task else "–" for name in names]
            rows.append(("", [_name(row), *cells]))
    if not rows:
        return ""
    counts = {score.task: score.n for row in _all(found) if row.final for score in row.final.report}
    head = [f"{name} ({counts.get(name, 0):,})" for name in names]
    note = '<p class="soft">Percent ± standard error; the number of items in brackets.</p>'
    return section("tasks", "Scores by task", html_table(["recipe", *head], rows), note)


def _cost(found: Comparison) -> str:
    rows = []
    for row in _all(found):
        if row.final is None:
            continue
        seconds = row.final.seconds
        pruning = sum(seconds.get(phase, 0.0) for phase in PRUNING)
        scoring = sum(seconds.get(phase, 0.0) for phase in ("report", "perplexity"))
        cells = [pruning, seconds.get("recover", 0.0), scoring, sum(seconds.values())]
        rows.append(("", [_name(row), *map(duration, cells), f"{row.peak_bytes / 2**30:.2f} GiB"]))
    note = (
        '<p class="soft">Statistics that several recipes read are computed once, so the first to need them pays for '
        "the others. Memory is the greatest that the worker took for its tensors on a GPU, or without one the greatest "
        "resident memory, the mapped base weights included.</p>"
    )
    head = ["recipe", "pruning", "recovery", "scoring", "together", "peak memory"]
    return section("cost", "Time and memory", html_table(head, rows), note) if rows else ""


def _failures(found: Comparison) -> str:
    rows = [("", [escape(row.name), row.state, escape(row.reason or "–")]) for row in _all(found) if row.final is None]
    if not rows:
        return ""
    note = "<p>The same command tries them again; what has a score is not repeated.</p>"
    return section("failures", "Without a score", html_table(["recipe", "<state", "<<reason"], rows), note)


def _meaning(found: Comparison) -> str:
    trial = TrialConfig.from_dict(found.study.trial, "trial")
    sample = trial.calibration
    tokens = getattr(trial.recovery.options, "tokens", 0)
    tuned = f"{tokens:,} tokens of {trial.recovery.type} recovery" if tokens else "no recovery"
    if trial.recovery.type != "none" and not tokens:
        tuned = f"{trial.recovery.type} recovery"
    equal = (
        f"Every recipe got the same calibration sample ({sample.samples} × {sample.length} tokens of "
        f"<code>{escape(sample.corpus)}</code>), {escape(tuned)}, the same budget and the same items, unless it is "
        "marked with a section of its own. How close a recipe is to its paper stands in its file and in "
        "<code>search_spaces/recipes/README.md</code>; papers used samples and recoveries of their own, so orders may "
        "differ from theirs."
    )
    interval = (
        "<b>No difference</b> means that the 95 % interval of the paired difference holds 0. It is no proof that two "
        "recipes are equal: with more report items a difference may show. The highest is the highest of many by these "
        "very items, which favours it in every one of these pairs."
    )
    return section("meaning", "What the figures mean", f"<p>{equal}</p>", f"<p>{interval}</p>")


def _next(found: Comparison) -> str:
    best = found.best
    if best is None:
        return ""
    study = found.study
    own = best.final.removed if best.final else 0.0
    remove = own if study.budget.remove is None else study.budget.remove
    command = f"adasearch prune {study.model.name} --recipe {best.name} --remove {remove:.4g} --out DIR"
    note = "<p>One recipe as an exported model, and a search that starts from all of them:</p>"
    code = f"{command}\nadasearch run STUDY  # with these names under recipes:"
    return section("next", "What to do next", note, f"<pre><code>{escape(code)}</code></pre>")


def page(found: Comparison) -> str:
    """Return the report of a comparison as one HTML document."""
    study = found.study
    sections = [
        _leaderboard(found), _tasks(found), _cost(found), _failures(found), _meaning(found), _next(found),
    ]  # fmt: skip
    line = f"{study.model.name} · {budget_words(study.budget)} · {len(found.rows)} recipes · seed {study.seed}"
    return document(f"{study.name}: recipes compared", line, _headline(found), sections, LINKS)
