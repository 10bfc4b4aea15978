"""The report's section on several objectives: the front as a picture and a table, its knees, and what breaks limits."""

from __future__ import annotations

from html import escape

from adasearch import pictures, tradeoff
from adasearch.config import TrialResult
from adasearch.pareto import Z
from adasearch.records import Record
from adasearch.report import Findings
from adasearch.report_parts import duration, figure, html_table, percent, section, short_count, signed_points
from adasearch.tradeoff import Tradeoff, result_of

_KEY = (
    '<div class="key"><span><i class="front"></i>on the front</span><span><i class="knee"></i>knee</span>'
    '<span><i></i>other trials</span><span><i class="stopped"></i>beyond a hard limit</span>'
    '<span><i class="line"></i>best score at no more cost</span>'
)


def figure_of(cost: str, amount: float) -> str:
    """Return a cost as text: a count, milliseconds or MiB."""
    if cost == "parameters":
        return short_count(amount)
    if cost == "latency":
        return f"{1000 * amount:.1f} ms" if amount < 1 else duration(amount)
    return f"{amount / 2**20:,.1f} MiB"


def found_by(f: Findings) -> Tradeoff | None:
    """Return what a run with several objectives found, None for one objective."""
    dense = f.dense_record.result if f.dense_record else None
    return tradeoff.tradeoff(f.study.objective, f.records, dense)


def front_section(f: Findings) -> str:
    """Return the section, empty for a study with one objective and no hard limit."""
    objective = f.study.objective
    if not objective.several:
        return ""
    found = found_by(f)
    if found is None:
        text = "<p>No trial has been scored in full and keeps the hard limits yet.</p>"
        return section("front", "Score against cost", text)
    parts = [_introduction(f, found)]
    parts += [_picture(f, found, cost) for cost in found.costs]
    parts += [_table(found), _knees(found), _bargains(found), _noise(f)]
    return section("front", "Score against cost", *parts)


def _introduction(f: Findings, found: Tradeoff) -> str:
    text = (
        "<p>These trials are the <b>front</b>: no other trial that was scored in full has a score at least as high at "
        f"no more {escape(' or '.join(found.costs))}. Which of them is best depends on what a point of the score is "
        "worth to you. Costs are fractions of the dense model's.</p>"
    )
    if f.study.objective.at_most:
        limits = ", ".join(f"{cost} {percent(limit)}" for cost, limit in f.study.objective.at_most.items())
        broken = ", ".join(map(str, found.beyond)) or "none"
        text += f"<p>Hard limits: {escape(limits)} of the dense model's. Trials beyond: {broken}.</p>"
    return text


def _mark(record: Record, result: TrialResult, found: Tradeoff, cost: str) -> pictures.Point:
    kind = "proposal"
    if record.number in found.beyond or result.stopped:
        kind = "stopped"
    elif cost in found.knees and found.knees[cost][0] == record.number:
        kind = "knee"
    elif record.number in found.numbers:
        kind = "front"
    name = f" ({record.recipe})" if record.recipe else ""
    hint = f"trial {record.number}{name}: {result.score:.4f} ± {result.stderr:.4f}, {cost} {result.shares[cost]:.3f}"
    return pictures.Point(x=100 * result.shares[cost], y=result.score, stderr=result.stderr, kind=kind, hint=hint)


def _picture(f: Findings, found: Tradeoff, cost: str) -> str:
    scored = [(r, r.result) for r in f.records if r.result is not None and cost in r.result.shares]
    marks = sorted((_mark(r, result, found, cost) for r, result in scored), key=lambda mark: (mark.x, -mark.y))
    dense = f.dense_record.result.score if f.dense_record and f.dense_record.result else None
    names = (f"{cost}, percent of the dense model's", f"search score ({f.study.objective.metric})")
    svg = pictures.scatter(marks, names=names, dense=dense, staircase=True)
    caption = f"Score against {escape(cost)}; bars are one standard error over items."
    return f"{_KEY}</div>{figure(svg, caption)}"


def _table(found: Tradeoff) -> str:
    rows = []
    for record in found.records:
        result, roles = result_of(record), found.roles(record.number)
        name = f"{record.number}" + (f" ({record.recipe})" if record.recipe else "")
        cells = [escape(name), f"{result.score:.4f} ± {result.stderr:.4f}"]
        for cost in found.costs:
            spread = f" ± {100 * result.spreads[cost]:.1f}" if cost in result.spreads else ""
            cells.append(f"{100 * result.shares[cost]:.1f}{spread} % ({figure_of(cost, result.costs[cost])})")
        rows.append(("strong" if any("knee" in role for role in roles) else "", [*cells, escape("; ".join(roles))]))
    return html_table(["trial", "search score", *found.costs, "<<what it is"], rows)


def _knees(found: Tradeoff) -> str:
    lines = []
    for cost in found.costs:
        if cost not in found.knees:
            why = "the front is straight, bends inwards or has no middle"
            lines.append(f"<p><b>No knee in {escape(cost)}</b>: {why}.</p>")
            continue
        number, bend = found.knees[cost]
        width = f"{signed_points(bend.gain)} points, 95 % interval ± {100 * Z * bend.stderr:.1f}"
        known = "" if bend.clear else " This is <b>within the noise</b> of the scores: more items would tell."
        lines.append(
            f"<p><b>Knee in {escape(cost)}: trial {number}.</b> Its score lies {width}, above the straight line "
            f"between the ends of the front: beyond it each further point costs more than before.{known}</p>"
        )
    return "<h3>Knees</h3>" + "".join(lines)


def _bargains(found: Tradeoff) -> str:
    rows = []
    for cost, deals in found.bargains.items():
        for number, deal in deals:
            loss = f"{100 * deal.loss:.1f} ± {100 * deal.stderr:.1f}"
            record = next((r for r in found.records if r.number == number), None)
            share = percent(result_of(record).shares[cost]) if record else "–"
            known = "yes" if deal.sure else "within noise"
            rows.append(("", [f"{100 * deal.allowed:g} points", escape(cost), str(number), share, loss, known]))
    than = "the dense model" if found.against == "dense" else "the best trial"
    if not rows:
        return f"<p>No trial scores within 5 points of {than}.</p>"
    head = ["lose at most", "<of", "trial", "cost", "loss, points", "<sure"]
    note = f'<p class="soft">Against {than}, on search items; sure where all of the 95 % interval is allowed.</p>'
    return f"<h3>The cheapest model for a loss</h3>{html_table(head, rows)}{note}"


def _noise(f: Findings) -> str:
    words = "Parameters and memory are counted and exact."
    if "latency" in f.study.objective.costs:
        words += (
            f" Latency is the median of forward passes over {f.study.objective.latency_tokens:,} tokens, by turns with "
            "the dense model in the same process; other work on the machine still makes it noisier."
        )
    return f'<p class="soft">{words} Scores of neighbours on the front overlap more often than not: see the bars.</p>'
