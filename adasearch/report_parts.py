"""What the pages of a run are made of: figures as text, tables, sections, and the document around them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from adasearch.report_style import STYLE
from adasearch.sections import BudgetConfig


def percent(number: float, digits: int = 1) -> str:
    """Return a fraction as percent."""
    return "–" if math.isnan(number) else f"{100 * number:.{digits}f} %"


def points(mean: float | None, stderr: float | None = None) -> str:
    """Return a fraction as percent without the sign, with its standard error."""
    if mean is None or math.isnan(mean):
        return "–"
    return f"{100 * mean:.1f}" + (f" ± {100 * stderr:.1f}" if stderr is not None else "")


def signed_points(number: float) -> str:
    """Return a difference of fractions in percentage points, with its sign."""
    return f"{100 * number:+.1f}".replace("-", "−")


def short_count(number: float | None) -> str:
    """Return a number in thousands, millions or billions."""
    if number is None or math.isnan(number):
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours."""
    if math.isnan(seconds):
        return "–"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_LONG = 20


def html_table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Return a table; rows have a class and cells of HTML; columns named ``<...`` range left, ``<<...`` also wrap."""
    css = ["left" if name.startswith("<") or i == 0 else "" for i, name in enumerate(head)]
    css = [f"{c} text" if name.startswith("<<") else c for c, name in zip(css, head, strict=True)]
    # Some names of corpora are long, and may break at their own marks.
    names = [escape(name.lstrip("<")) for name in head]
    names = [re.sub("([/:@])", r"\1&#8203;", name) if len(name) > _LONG else name for name in names]
    heads = "".join(f'<th class="{c}">{name}</th>' for c, name in zip(css, names, strict=True))
    body = ""
    for kind, row in rows:
        cells = "".join(f'<td class="{c}">{cell}</td>' for c, cell in zip(css, row, strict=True))
        body += f'<tr class="{kind}">{cells}</tr>'
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def section(key: str, title: str, *parts: str) -> str:
    """Return a section of a page; `key` is its anchor."""
    return f'<section id="{key}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def figure(svg: str, caption: str) -> str:
    """Return a picture over its caption."""
    return f'<figure><div class="figure">{svg}</div><figcaption>{caption}</figcaption></figure>'


def card(number: str, text: str) -> str:
    """Return a figure in large over what it is."""
    return f'<div class="card"><b>{number}</b><span>{text}</span></div>'


def budget_words(budget: BudgetConfig, searched: tuple[float, float] | None = None) -> str:
    """Return what a budget asks for; `searched` is the least and the greatest fraction that trials remove."""
    if searched is None and budget.goal is not None:
        name, target = budget.goal
        return f"{name} at most {100 * target:g} % of the dense model's"
    of = "all" if budget.of == "all" else "non-embedding"
    low, high = searched or (budget.fraction, budget.fraction)
    span = f"{100 * low:g}" if low == high else f"{100 * low:g} to {100 * high:g}"
    return f"remove {span} % of {of} parameters"


def document(title: str, line: str, top: str, sections: Sequence[str], links: Mapping[str, str]) -> str:
    """Return a whole page: one file that asks for nothing else.

    Args:
        title: heading.
        line: what is under it.
        top: HTML before the sections.
        sections: of HTML; empty ones are left out of the links.
        links: what the link to each section is called, by the section's key.
    """
    there = [(key, name) for key, name in links.items() if any(f'<section id="{key}">' in s for s in sections)]
    nav = "".join(f'<a href="#{key}">{name}</a>' for key, name in there)
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}: adasearch report</title><style>{STYLE}</style></head>"
    )
    header = f'<header><h1>{escape(title)}</h1><p class="soft">{escape(line)}</p><nav>{nav}</nav></header>'
    return f"{head}<body><main>{header}{top}{''.join(sections)}</main></body></html>\n"
