"""Charts as inline SVG, with colors from the style of the page.

All functions return well-formed, self-contained SVG with escaped text.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape

import numpy as np

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 72, 12, 12, 42  # left margin: room for numbers of six characters and the axis label
CHARACTER = 7.5  # maximum width of a character of the page's text, in units of the picture
SERIES = 8  # number of series colors in the page's style

Points = Sequence[tuple[float, float]]


def lines(
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    y_high: float | None = None,
    x_names: Sequence[str] | None = None,
    intervals: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> str:
    """Draws lines with points; with `x_names`, the x of each point is an index into that list.

    Args:
        intervals: name -> (low, high) of each point, drawn as bars.
    """
    every = [point for points in series.values() for point in points]
    xs = [*map(float, range(len(x_names)))] if x_names is not None else [x for x, _ in every] or [0.0]
    low, high = min(xs), max(xs)
    if low == high:
        low, high = low - 0.5, high + 0.5
    top = y_high if y_high is not None else _round_up(max((y for _, y in every), default=1.0))

    def at(x: float, y: float) -> tuple[float, float]:
        return LEFT + 16 + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT - 32), _y(y, top)

    x_ticks = (
        list(zip(xs, x_names, strict=True))
        if x_names is not None
        else [(tick, f"{tick:g}") for tick in _ticks(low, high)]
    )
    body = [_frame(top, [(at(x, 0.0)[0], name) for x, name in x_ticks], x_label, y_label)]
    for number, (name, points) in enumerate(series.items()):
        color = f"s{number % SERIES}"
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
        body.append(f'<polyline class="line {color}" points="{path}"/>')
        bars = (intervals or {}).get(name, ())
        for (x, _), (lower, upper) in zip(points, bars, strict=False):
            (place, bottom), (_, end) = at(x, lower), at(x, upper)
            body.append(f'<path class="line {color}" d="M{place:.1f} {bottom:.1f}V{end:.1f}"/>')
        for x, y in points:
            cx, cy = at(x, y)
            where = x_names[int(x)] if x_names is not None else f"{x:g}"
            title = f"<title>{escape(name)}, {escape(where)}: {y:.4g}</title>"
            body.append(f'<circle class="dot {color}" cx="{cx:.1f}" cy="{cy:.1f}" r="4">{title}</circle>')
    return _svg(body, f"{y_label} against {x_label}")


def histogram(edges: Sequence[float], groups: Mapping[str, Sequence[int]], classes: Sequence[str], x_label: str) -> str:
    """Draws a stacked histogram; `classes` are the style classes of the groups."""
    totals = np.sum([list(counts) for counts in groups.values()], 0)
    top = _round_up(float(totals.max()))
    low, high = edges[0], edges[-1]

    def at(x: float) -> float:
        return LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    body = [_frame(top, [(at(tick), f"{tick:g}") for tick in _ticks(low, high)], x_label, "images")]
    for place in range(len(edges) - 1):
        base = 0.0
        for style, counts in zip(classes, groups.values(), strict=True):
            if counts[place]:
                upper, lower = _y(base + counts[place], top), _y(base, top)
                left, right = at(edges[place]), at(edges[place + 1])
                body.append(
                    f'<rect class="{style}" x="{left:.1f}" y="{upper:.1f}" width="{max(right - left - 1, 1):.1f}" '
                    f'height="{lower - upper:.1f}"/>'
                )
                base += counts[place]
    body.append(f'<path class="zero" d="M{at(0.0):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
    return _svg(body, f"images by {x_label}")


def legend(names: Sequence[str], classes: Sequence[str] | None = None) -> str:
    """Renders a legend as HTML, which wraps on narrow screens."""
    styles = classes or [f"s{number % SERIES}" for number in range(len(names))]
    items = "".join(
        f'<li><i class="{style}"></i>{escape(name)}</li>' for name, style in zip(names, styles, strict=True)
    )
    return f'<ul class="legend">{items}</ul>'


def _svg(body: Sequence[str], label: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(body)}</svg>"
    )


def _frame(top: float, x_ticks: Sequence[tuple[float, str]], x_label: str, y_label: str) -> str:
    parts = []
    for tick in _ticks(0.0, top):
        y = _y(tick, top)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    free = -math.inf
    for x, name in x_ticks:
        half = CHARACTER * len(name) / 2
        if x - half < free:  # it would overlap the previous label; points also show their names on hover
            continue
        free = x + half + CHARACTER
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{escape(name)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>')
    height = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(
        f'<text transform="translate(12 {height:.0f}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )
    return "".join(parts)


def _y(value: float, top: float) -> float:
    return HEIGHT - BOTTOM - value / top * (HEIGHT - TOP - BOTTOM)


def _round_up(value: float) -> float:
    """Rounds up to a round number, in steps of a tenth of its power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return math.ceil(value / power * 5) / 5 * power


def _ticks(low: float, high: float) -> list[float]:
    """Returns about five round numbers within [low, high]."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
