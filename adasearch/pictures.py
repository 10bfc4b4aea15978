"""Charts of the report as inline SVG: plain functions from numbers to text, coloured by the page's style sheet.

All lengths are in units of the drawing, which the page scales to the width of its column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 720.0
TITLES = {"mlp": "MLP", "attention": "Attention"}
LEFT, RIGHT, TOP, BOTTOM = 56.0, 14.0, 12.0, 40.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A mark: `kind` is a class of the style sheet (``proposal``, ``recipe``, ``stopped``); `hint` shows on hover."""

    x: float
    y: float
    stderr: float
    kind: str
    hint: str


@dataclass(frozen=True, slots=True)
class _Axis:
    """A linear scale from values to positions."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, number: float) -> float:
        return self.start + (number - self.low) / (self.high - self.low) * (self.end - self.start)


def ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, about `target` of them."""
    span = max(high - low, 1e-12)
    step = 10 ** math.floor(math.log10(span / target))
    step *= next((m for m in (1, 2, 5, 10) if span / (step * m) <= target), 10)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(number: float) -> str:
    return f"{number:.4g}"


def _svg(height: float, title: str, body: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" aria-label="{escape(title, quote=True)}">'
    return "".join([head, *body, "</svg>"])


def _text(x: float, y: float, text: str, css: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def _frame(x: _Axis, y: _Axis, height: float, names: tuple[str, str]) -> list[str]:
    """Return grid, tick labels and axis names."""
    body = []
    for tick in ticks(y.low, y.high):
        body.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"))
        body.append(_text(LEFT - 6, y(tick) + 4, _number(tick), "tick end"))
    for tick in ticks(x.low, x.high, 8):
        body.append(_text(x(tick), height - BOTTOM + 16, _number(tick), "tick middle"))
    body.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 6, names[0], "axis middle"))
    body.append(
        f'<text transform="translate(13 {(TOP + height - BOTTOM) / 2:.1f}) rotate(-90)" class="axis middle">'
        f"{escape(names[1])}</text>"
    )
    return body


def _mark(x: float, y: float, point: Point) -> str:
    hint = f"<title>{escape(point.hint)}</title>"
    if point.kind == "recipe":
        corners = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y:.1f} {x:.1f},{y + 6:.1f} {x - 6:.1f},{y:.1f}"
        return f'<polygon points="{corners}" class="recipe">{hint}</polygon>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" class="{escape(point.kind, quote=True)}">{hint}</circle>'


def _extent(values: Sequence[float], room: float = 0.06) -> tuple[float, float]:
    low, high = min(values), max(values)
    pad = (high - low) * room or max(abs(high) * 0.05, 0.01)
    return low - pad, high + pad


def scatter(
    points: Sequence[Point], *, names: tuple[str, str], dense: float | None = None, staircase: bool = False
) -> str:
    """Return marks with error bars of one standard error.

    Args:
        points: at least one.
        names: of the horizontal and the vertical axis.
        dense: value of the dense model, a dashed line.
        staircase: draw the best so far, over `points` in their order; stopped ones do not count.
    """
    height = 320.0
    ends = [p.y + sign * p.stderr for p in points for sign in (-1, 1)] + ([] if dense is None else [dense])
    x = _Axis(*_extent([p.x for p in points], 0.03), LEFT, WIDTH - RIGHT)
    y = _Axis(*_extent(ends), height - BOTTOM, TOP)
    body = _frame(x, y, height, names)
    if dense is not None:
        body.append(_line(LEFT, y(dense), WIDTH - RIGHT, y(dense), "dense"))
        body.append(_text(WIDTH - RIGHT, y(dense) + (14 if y(dense) < TOP + 20 else -5), "dense", "tick end"))
    if staircase:
        body.append(_staircase(points, x, y))
    for point in points:
        bar = (y(point.y - point.stderr), y(point.y + point.stderr))
        body.append(_line(x(point.x), bar[0], x(point.x), bar[1], f"bar {escape(point.kind, quote=True)}"))
    body += [_mark(x(p.x), y(p.y), p) for p in points]
    return _svg(height, f"{names[1]} by {names[0]}", body)


def _staircase(points: Sequence[Point], x: _Axis, y: _Axis) -> str:
    best = -math.inf
    path: list[str] = []
    for point in points:
        if point.kind != "stopped" and point.y > best:
            path.append(f"{'H' if path else 'M'}{x(point.x):.1f}{' ' if not path else 'V'}{y(point.y):.1f}")
            best = point.y
    return f'<path d="{"".join(path)}H{WIDTH - RIGHT:.1f}" class="best"/>' if path else ""


def bars(shares: Mapping[str, float]) -> str:
    """Return one horizontal bar for each name, longest first."""
    row, room = 24.0, 250.0
    longest = max(shares.values(), default=0.0) or 1.0
    body = []
    for i, (name, share) in enumerate(sorted(shares.items(), key=lambda item: -item[1])):
        top, length = i * row + 4, max(share, 0.0) / longest * (WIDTH - room - 60)
        body.append(_text(room - 8, top + 13, name if len(name) < 36 else name[:34] + "…", "label end"))
        body.append(f'<rect x="{room}" y="{top:.1f}" width="{length:.1f}" height="16" class="share"/>')
        body.append(_text(room + length + 6, top + 13, f"{100 * share:.0f} %", "tick"))
    return _svg(len(shares) * row + 6, "parameter importance", body)


def ranking(rows: Sequence[tuple[str, Point]], *, name: str, dense: float | None = None) -> str:
    """Return one line for each model, in the order given: a mark at its score, and a bar of one standard error.

    Args:
        rows: name of each model, and its score as the `y` of a point; at least one.
        name: of the horizontal axis.
        dense: value of the dense model, a dashed line.
    """
    row, room = 24.0, 190.0
    bottom = TOP + len(rows) * row
    ends = [p.y + sign * p.stderr for _, p in rows for sign in (-1, 1)] + ([] if dense is None else [dense])
    x = _Axis(*_extent(ends), room, WIDTH - RIGHT)
    body = []
    for tick in ticks(x.low, x.high, 8):
        body.append(_line(x(tick), TOP, x(tick), bottom, "grid"))
        body.append(_text(x(tick), bottom + 16, _number(tick), "tick middle"))
    body.append(_text((room + WIDTH - RIGHT) / 2, bottom + 34, name, "axis middle"))
    if dense is not None:
        body.append(_line(x(dense), TOP, x(dense), bottom, "dense"))
    for i, (label, point) in enumerate(rows):
        y = TOP + (i + 0.5) * row
        body.append(_text(room - 8, y + 4, label if len(label) < 28 else label[:26] + "…", "label end"))
        css = f"bar {escape(point.kind, quote=True)}"
        body.append(_line(x(point.y - point.stderr), y, x(point.y + point.stderr), y, css))
        body.append(_mark(x(point.y), y, point))
    return _svg(bottom + BOTTOM, f"{name} by model", body)


def layer_bars(kept: Mapping[str, Sequence[float]]) -> str:
    """Return the kept fraction of each layer as bars, one panel for each kind, full height = everything kept."""
    panel, gap = 110.0, 46.0
    layers = max((len(values) for values in kept.values()), default=0)
    step = (WIDTH - LEFT - RIGHT) / max(layers, 1)
    body = []
    for i, (kind, values) in enumerate(sorted(kept.items())):
        top = i * (panel + gap) + 18
        y = _Axis(0.0, 1.0, top + panel, top)
        body.append(_text(LEFT, top - 6, f"{TITLES.get(kind, kind)}: kept fraction by layer", "axis"))
        for tick in (0.0, 0.5, 1.0):
            body.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"))
            body.append(_text(LEFT - 6, y(tick) + 4, f"{100 * tick:.0f} %", "tick end"))
        for layer, value in enumerate(values):
            if not math.isnan(value):
                box = (LEFT + layer * step + step * 0.12, y(value), step * 0.76, y(0.0) - y(value))
                hint = f"layer {layer}: {100 * value:.0f} % of {kind} kept"
                body.append(_box(box, f"kept {kind}", hint))
        every = max(1, math.ceil(layers / 24))
        for layer in range(0, layers, every):
            body.append(_text(LEFT + (layer + 0.5) * step, top + panel + 13, str(layer), "tick middle"))
    return _svg(len(kept) * (panel + gap), "kept fraction by layer", body)


def _box(box: tuple[float, float, float, float], css: str, hint: str, opacity: float = 1.0) -> str:
    x, y, width, height = box
    shade = f' fill-opacity="{opacity:.2f}"' if opacity < 1 else ""
    place = f'x="{x:.2f}" y="{y:.2f}" width="{width:.2f}" height="{height:.2f}"'
    return f'<rect {place} class="{escape(css, quote=True)}"{shade}><title>{escape(hint)}</title></rect>'


def heatmap(rows: Sequence[tuple[str, Sequence[float]]], kind: str) -> str:
    """Return one strip of cells for each row, darker = more kept; a cell shows its figure on hover."""
    row, room, top = 22.0, 190.0, 6.0
    layers = max((len(values) for _, values in rows), default=0)
    step = (WIDTH - room - RIGHT) / max(layers, 1)
    body = []
    for i, (name, values) in enumerate(rows):
        y = top + i * row
        body.append(_text(room - 8, y + 14, name if len(name) < 28 else name[:26] + "…", "label end"))
        for layer, value in enumerate(values):
            if not math.isnan(value):
                box = (room + layer * step, y, max(step - 1, 0.5), row - 2)
                body.append(
                    _box(box, f"kept {kind}", f"{name}, layer {layer}: {100 * value:.0f} %", 0.06 + 0.94 * value**2)
                )
    every = max(1, math.ceil(layers / 24))
    for layer in range(0, layers, every):
        body.append(_text(room + (layer + 0.5) * step, top + len(rows) * row + 14, str(layer), "tick middle"))
    return _svg(top + len(rows) * row + 22, f"kept fraction of {kind} by trial and layer", body)
