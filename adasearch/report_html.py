"""``report.html``: what a run found, on one page that needs no network, reads on a phone and prints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from adasearch import pictures
from adasearch.config import COMPONENTS, TaskScore, TrialResult, mean_of
from adasearch.records import Evidence, FinalRecord, Record
from adasearch.report import Difference, Findings, dense_parameters_of, kept_widths, mean_score, ranked, state_of
from adasearch.report_front import front_section
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
)
from adasearch.report_rungs import FEW_TRIALS, control_group, rung_rows
from adasearch.report_speed import speed_section

TOP_TRIALS = 10
TABLE_TRIALS = 20


def _name(final: FinalRecord) -> str:
    """Return what a scored model is called on the page."""
    return escape(f"{final.recipe} (trial {final.trial})" if final.recipe else f"trial {final.trial}")


def verdict(difference: Difference | None, other: str) -> str:
    """Return a sentence on a paired difference; without a difference that is shown it claims none."""
    if difference is None:
        return ""
    css = "" if not difference.shown else ' class="good"' if difference.mean > 0 else ' class="bad"'
    return f"<p>Against {other}: <b{css}>{difference.outcome}</b> ({difference.span}).</p>"


def _headline(f: Findings) -> str:
    if f.best is None:
        return _early_headline(f)
    score, stderr = mean_score(f.best.report)
    cards = [card(points(score, stderr), f"report score of the best model, {_name(f.best)}")]
    if f.dense is not None:
        whole, error = mean_score(f.dense.report)
        cards.append(card(points(whole, error), "report score of the dense model"))
        cards.append(card(percent(score / whole if whole else math.nan), "of the dense score retained"))
    left = f"{short_count(f.best.parameters)} left of {short_count(dense_parameters_of(f))}"
    cards.append(card(percent(f.best.removed), f"of all parameters removed, {left}"))
    words = verdict(f.versus_dense, "the dense model")
    if f.recipe is not None and f.recipe.name == f.best.name:
        words += "<p>The best model is a published recipe: the search found nothing better by the finalists' merit.</p>"
    elif f.recipe is not None:
        words += verdict(f.versus_recipe, f"the best published recipe, {_name(f.recipe)}")
    note = "Paired over the same report items, bootstrap within tasks; they were scored once, after the search."
    box = f'<div class="verdict">{words}<p class="soft">{note}</p></div>' if words else ""
    return f'<div class="cards">{"".join(cards)}</div>{box}'


def _early_headline(f: Findings) -> str:
    """Return what can be said before any finalist is scored: no promise."""
    scored = [r for r in f.records if state_of(r) == "complete"]
    cards = [card(f"{len(f.records)}", f"of {f.study.trials} trials on record, {len(scored)} scored in full")]
    kept = [r for r in scored if r.result and f.study.objective.admits(r.result.shares)]
    best = max(kept, key=lambda r: r.result.score if r.result else 0.0, default=None)
    if best is not None and best.result is not None:
        text = f"best search score, trial {best.number}; an optimistic estimate"
        cards.append(card(f"{best.result.score:.3f} ± {best.result.stderr:.3f}", text))
    return f'<div class="cards">{"".join(cards)}</div><p>No finalist has been scored on the report items yet.</p>'


def _task_rows(columns: Sequence[FinalRecord]) -> list[tuple[str, list[str]]]:
    tasks = list(dict.fromkeys(s.task for c in columns for s in c.report))
    by_task: list[dict[str, TaskScore]] = [{s.task: s for s in c.report} for c in columns]
    rows: list[tuple[str, list[str]]] = []
    for task in tasks:
        block: list[list[str]] = []
        for metric in ("acc", "acc_norm", "margin", "log_score"):
            cells = []
            for scores in by_task:
                s = scores.get(task)
                cells.append(points(getattr(s, metric), getattr(s, f"{metric}_stderr")) if s else "–")
            if any(cell != "–" for cell in cells):
                number = next(s[task].n for s in by_task if task in s)
                first = f'{escape(task)} <span class="soft">({number:,} items)</span>' if metric == "acc" else ""
                block.append([first, metric, *cells])
        rows += [("more" if i < len(block) - 1 else "", cells) for i, cells in enumerate(block)]
    rows.append(("total", ["mean", "acc_norm, else acc", *(points(*mean_score(c.report)) for c in columns)]))
    return rows


def _scored(f: Findings) -> list[FinalRecord]:
    """Return the models of the score tables: dense, best, best recipe."""
    found = [x for x in (f.dense, f.best, f.recipe) if x is not None]
    return list({x.name: x for x in found}.values())


def _heads(f: Findings) -> list[str]:
    titles = {f.dense.name: "dense"} if f.dense else {}
    if f.recipe:
        titles[f.recipe.name] = f"best recipe: {f.recipe.recipe}"
    if f.best:
        best = f"best: trial {f.best.trial}" + (f", recipe {f.best.recipe}" if f.best.recipe else "")
        titles[f.best.name] = best
    return [titles[c.name] for c in _scored(f)]


def _scores(f: Findings) -> str:
    columns = _scored(f)
    if not columns:
        return ""
    rule = (
        "<p>Zero-shot, percent ± standard error over items. The report score is the mean over tasks of "
        "<code>acc_norm</code> where a task has it, else of <code>acc</code>; every task weighs the same.</p>"
    )
    parts = [rule, html_table(["task", "<metric", *_heads(f)], _task_rows(columns))]
    corpora = sorted({name for c in columns for name in c.perplexity})
    if corpora:
        rows = []
        for name in corpora:
            found = [f"{c.perplexity[name]:.2f}" if name in c.perplexity else "–" for c in columns]
            rows.append(("", [escape(name), *found]))
        parts.append("<h3>Perplexity</h3>")
        parts.append(html_table(["corpus@window in tokens", *_heads(f)], rows))
    return section("scores", "Scores on report items", *parts)


def _finalists(f: Findings) -> str:
    if not f.finals:
        return ""
    extra = [f.recipe] if f.recipe and f.recipe.name not in {x.name for x in f.finals} else []
    whole = mean_score(f.dense.report)[0] if f.dense else math.nan
    metric = f.study.objective.metric
    rows = []
    for rank, final in enumerate((*f.finals, *extra), start=1):
        score, stderr = mean_score(final.report)
        select, fresh = (mean_of(scores, metric)[0] for scores in (final.selected, final.report))
        rank_cell = str(rank) if final.role == "finalist" else "–"
        cells = [rank_cell, _name(final), *_evidence(final.search), _three(select), _three(final.merit)]
        cells += [_three(fresh), points(score, stderr)]
        cells += [percent(score / whole if whole else math.nan), short_count(final.parameters)]
        lacking = (f"no {label}: {reason}" for label, reason in final.unwritten.items())
        export = "; ".join([final.export or "–", *lacking])
        cells += [percent(final.removed), duration(sum(final.seconds.values())), escape(export)]
        rows.append(("strong" if rank == 1 else "", cells))
    head = ["rank", "<model", "search score", "posterior mean", f"select {metric}", "merit"]
    head += [f"report {metric}", "report score", "retained", "parameters", "removed", "time", "<export"]
    note = (
        "<p>Chosen by the posterior mean of their search score, fine-tuned in full, ranked by merit: that mean and the "
        f"{metric} on the select items, each weighed by the inverse of its variance. Report items had no say in the "
        "order.</p>"
    )
    if f.study.objective.several:
        note += (
            "<p>They are of different size, spread along <a href='#front'>the front</a>: the first is no winner.</p>"
        )
    said = (f"<li>{_name(x)}: {escape('; '.join(x.training))}</li>" for x in (*f.finals, *extra) if x.training)
    trained = f"<p>Their training, losses in nats per token:</p><ul>{''.join(said)}</ul>"
    return section("finalists", "Finalists", note, _curse(f), html_table(head, rows), trained)


def _three(number: float | None) -> str:
    return "–" if number is None or math.isnan(number) else f"{number:.3f}"


def _evidence(known: Evidence | None) -> tuple[str, str]:
    """Return the observed score and the posterior mean of a trial, each with its error."""
    if known is None:
        return "–", "–"
    believed = "–" if known.mean is None or known.sd is None else f"{known.mean:.3f} ± {known.sd:.3f}"
    return f"{known.score:.3f} ± {known.stderr:.3f}", believed


def _curse(f: Findings) -> str:
    """Return what is left of the winner's observed score once its luck is taken off."""
    known = f.best.search if f.best else None
    if known is None or known.mean is None:
        return ""
    gap = known.score - known.mean
    word = "below" if gap >= 0 else "above"
    return (
        f"<p>The winner scored {known.score:.3f} in the search; all trials together say {known.mean:.3f}, "
        f"{abs(gap):.3f} {word} that. The best of many noisy scores is too high on average (the winner's curse).</p>"
    )


def _kind(record: Record) -> str:
    if state_of(record) == "stopped":
        return "stopped"
    return "recipe" if record.recipe else "proposal"


def _hint(record: Record) -> str:
    assert record.result is not None
    name = f" ({record.recipe})" if record.recipe else ""
    stopped = ", stopped early" if record.result.stopped else ""
    return f"trial {record.number}{name}: {record.result.score:.4f} ± {record.result.stderr:.4f}{stopped}"


def _marks(records: Iterable[Record], across: Callable[[Record, TrialResult], float | None]) -> list[pictures.Point]:
    """Return the search score of every trial, over what `across` says of it; None leaves a trial out."""
    placed = ((across(r, r.result), r, r.result) for r in records if r.result is not None)
    return [
        pictures.Point(x=x, y=result.score, stderr=result.stderr, kind=_kind(r), hint=_hint(r))
        for x, r, result in placed
        if x is not None
    ]


def _seconds(_: Record, result: TrialResult) -> float:
    return sum(result.seconds.values())


def _divergence(_: Record, result: TrialResult) -> float | None:
    return next((rung.value for rung in result.rungs if rung.kind == "divergence"), None)


_KEY = (
    '<div class="key"><span><i></i>proposal</span><span><i class="recipe"></i>published recipe</span>'
    '<span><i class="stopped"></i>stopped early</span>'
)


def _history(f: Findings) -> str:
    marks = _marks(f.records, lambda record, _: record.number)
    if not marks:
        return ""
    dense = f.dense_record.result.score if f.dense_record and f.dense_record.result else None
    svg = pictures.scatter(
        marks, names=("trial", f"search score ({f.study.objective.metric})"), dense=dense, staircase=True
    )
    lines = '<span><i class="line"></i>best so far</span><span><i class="line dense"></i>dense</span></div>'
    caption = (
        "Bars are one standard error over items. These scores are optimistic: <a href='#meaning'>what they mean</a>."
    )
    said = f"<p>{escape(f.ending[0].upper() + f.ending[1:])}.</p>" if f.ending else ""
    best = [_trial_row(i, r) for i, r in enumerate(ranked(f)[:TABLE_TRIALS], start=1) if r.result is not None]
    table = html_table(["#", "<trial", "search score", "parameters", "time", "<state", "<<configuration"], best)
    title = f"<h3>The {len(best)} best trials</h3>" if len(best) < len(marks) else "<h3>All scored trials</h3>"
    if f.finals:
        title += '<p class="soft">Finalists first, in their final order; the others by search score.</p>'
    return section("history", "Search", said, _KEY, lines, figure(svg, caption), title, table)


_PLAIN = {"none", "top", "one_shot"}


def _brief(record: Record) -> str:
    """Return the parts of a configuration in one line; what is left out takes nothing away, or is the plain way."""
    config = record.config or {}
    parts = [str(config[key].get("type", "")) for key in COMPONENTS if key in config]
    parts = [part for part in parts if part not in _PLAIN]
    corpus = config.get("calibration", {}).get("corpus", "")
    return escape(" · ".join([*parts, *([f"calibrated on {corpus}"] if corpus else [])]))


def _trial_row(place: int, record: Record) -> tuple[str, list[str]]:
    assert record.result is not None
    name = f"{record.number}" + (f" ({record.recipe})" if record.recipe else "")
    score = f"{record.result.score:.4f} ± {record.result.stderr:.4f}"
    cells = [str(place), escape(name), score, short_count(record.result.parameters)]
    seconds = sum(record.result.seconds.values())
    return "", [*cells, duration(seconds), state_of(record), _brief(record)]


def _time(f: Findings) -> str:
    marks = _marks(f.records, _seconds)
    if len(marks) < 2:
        return ""
    svg = pictures.scatter(marks, names=("seconds of the trial", "search score"))
    phases: dict[str, float] = {}
    for record in f.records:
        for phase, seconds in (record.result.seconds if record.result else {}).items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    total = sum(phases.values()) or 1.0
    rows = [("", [escape(p), duration(s), percent(s / total)]) for p, s in sorted(phases.items(), key=lambda x: -x[1])]
    caption = "Does a longer recovery pay? Points to the right cost more."
    table = html_table(["phase", "all trials together", "share"], rows)
    return section("time", "Score and time", _KEY, "</div>", figure(svg, caption), table)


def _rungs(f: Findings) -> str:
    """Return what was known of trials before they were scored in full, and whether it could be trusted."""
    results = [r.result for r in f.records if r.result is not None]
    found = rung_rows(results)
    if not found:
        return ""
    marks, picture = _marks(f.records, _divergence), ""
    if len(marks) > 1:
        svg = pictures.scatter(marks, names=("divergence from the dense model, nats per token", "search score"))
        picture = _KEY + "</div>" + figure(svg, "Measured right after the cut, before the recovery.")
    rows = []
    for row in found:
        known = f"needs {FEW_TRIALS} trials" if row.correlation is None else f"{row.correlation:+.2f}"
        saved = duration(row.saved) if row.stopped else "–"
        cells = [row.label, str(row.trials), duration(row.seconds), percent(row.share), known, str(row.stopped), saved]
        rows.append(("", cells))
    note = (
        "<p>Rank correlation is Spearman's with the final search score; +1 means that the rung ranks the trials as "
        "that score does. A rung after the recovery shares its items with the final score, which flatters it. "
        "Time saved is what a trial scored in full takes on average, less what the trials that stopped there took.</p>"
    )
    spared, ahead = control_group(results)
    control = (
        f"<p>{spared} trials that were behind went on as a control; {ahead} of them ended ahead of the best trial that "
        "was known then: so many of those that stopped may have been stopped wrongly.</p>"
    )
    head = ["rung", "trials", "time", "share of a trial", "rank correlation", "stopped there", "time saved"]
    return section("rungs", "What is known early", picture, html_table(head, rows), note, control if spared else "")


def _importance(f: Findings) -> str:
    picture = figure(pictures.bars(f.importance), escape(f.importance_note)) if f.importance else ""
    note = "" if f.importance else f'<p class="soft">{escape(f.importance_note)}</p>'
    return section("importance", "Which parameters matter", picture, note)


def _widths(f: Findings) -> str:
    rows = kept_widths(f, TOP_TRIALS)
    if not rows:
        return ""
    best = rows[0]
    parts = [figure(pictures.layer_bars(best.kept), f"Kept by the best, {escape(best.label)}. Hover for figures.")]
    for kind in sorted(best.kept):
        strips = [(row.label, row.kept.get(kind, ())) for row in rows]
        title = escape(pictures.TITLES.get(kind, kind))
        caption = f"{title} units kept by the {len(rows)} best trials, best first: the stronger, the more is kept."
        parts.append(figure(pictures.heatmap(strips, kind), caption))
    return section("widths", "What was kept, layer by layer", *parts)


def _failures(f: Findings) -> str:
    failed = [r for r in f.records if r.failure is not None and r.result is None]
    if not failed:
        return section("failures", "Failures", "<p>No trial failed.</p>")
    rows = []
    for r in failed:
        assert r.failure is not None
        message = f'<span title="{escape(r.failure.message, quote=True)}">{escape(r.failure.message[:300])}</span>'
        name = f"{r.number}" + (f" ({r.recipe})" if r.recipe else "")
        cells = [escape(name), escape(r.failure.kind), escape(r.failure.phase or "–"), str(r.attempt + 1), message]
        rows.append(("", cells))
    table = html_table(["trial", "<kind", "<phase", "attempts", "<<reason"], rows)
    return section("failures", "Failures", f"<p>{len(failed)} of {len(f.records)} trials gave no score.</p>", table)


def _meaning(f: Findings) -> str:
    objective = f.study.objective
    margin = (
        "<b>Margin</b> is the probability of the right choice, corrected for chance: 0 is guessing, 1 is certain. "
        "<b>log_score</b> puts the logarithm of that probability on the same scale; it has no lower end, so confident "
        "errors cost most. Both are less noisy than accuracy at the same number of items."
    )
    bias = (
        "<b>Search scores are optimistic.</b> The best of many noisy estimates is too high on average, so the winner's "
        "search score says little about the model itself. That is why the finalists were chosen on <i>select</i> items "
        "and scored on <i>report</i> items that no earlier step had seen."
    )
    stopped = (
        "A trial that stopped while it was scored was behind the best with confidence; its score is an estimate from "
        "its first items. One that stopped before that promised too little for the rest of its cost; its score is no "
        "measurement but what is to be expected of it from its last rung. Neither can win."
    )
    tasks = ", ".join(f"<code>{escape(t)}</code>" for t in objective.search)
    used = f"The search maximised the mean {escape(objective.metric)} over {tasks}, {objective.items} items each."
    interval = (
        "<b>No difference shown</b> means that the 95 % interval of the paired difference holds 0. It is no proof that "
        "two models are equal: with more report items a difference may show."
    )
    texts = [used, margin, bias, stopped, interval]
    if f.earlier:
        believed = "; ".join(map(escape, f.earlier))
        texts.append(f"<b>Warm start.</b> How far each earlier run was believed in the end, 0 to 1: {believed}.")
    return section("meaning", "What the scores mean", *(f"<p>{text}</p>" for text in texts))


def _next(f: Findings, run: Path) -> str:
    """Return commands to go on with; the run folder is named as the user sees it from beside it."""
    name = run.name
    lines = [f"adasearch dashboard {name}", f"adasearch report {name}"]
    python = ""
    if f.best is not None and f.best.export:
        folder = f"{name}/{f.best.export}"
        lines.insert(0, f"adasearch verify {folder}")
        code = f'import adasearch\n\nmodel = adasearch.load("{folder}")'
        python = f"<p>Use the best model:</p><pre><code>{escape(code)}</code></pre>"
    more = (
        f"<p>For a longer search raise <code>trials</code> (now {f.study.trials}) in the study file and run it again "
        "with <code>adasearch run</code>: it goes on where it was. Close results deserve more <code>items</code> under "
        "<code>report</code> before one is called better.</p>"
    )
    where = '<p class="soft">From the folder that holds the run:</p>'
    shell = f"<pre><code>{escape(chr(10).join(lines))}</code></pre>"
    return section("next", "What to do next", python, where, shell, more)


def page(findings: Findings, run: Path) -> str:
    """Return the report of a run as one HTML document.

    Args:
        findings: what `adasearch.report.gather` returned.
        run: run folder; only its name is shown.
    """
    study = findings.study
    sections = [
        front_section(findings), _scores(findings), _finalists(findings), speed_section(findings), _history(findings),
        _widths(findings), _importance(findings),
        _time(findings), _rungs(findings), _failures(findings), _meaning(findings), _next(findings, run),
    ]  # fmt: skip
    titles = {
        "front": "Front",
        "scores": "Scores",
        "finalists": "Finalists",
        "speed": "Speed",
        "history": "Search",
        "widths": "Kept widths",
    }
    titles |= {
        "importance": "Parameters",
        "time": "Time",
        "rungs": "Rungs",
        "failures": "Failures",
        "meaning": "Meaning",
        "next": "Next",
    }
    trials = len(findings.records) if findings.ending else study.trials
    line = f"{study.model.name} · {budget_words(study.budget, study.removes)} · {trials} trials · seed {study.seed}"
    return document(study.name, line, _headline(findings), sections, titles)
