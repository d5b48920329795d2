"""The plot of `results/benchmark`: certified accuracy against speed, as SVG. The output is deterministic."""

import json
import math
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 36, 40, 56
LABEL_HEIGHT, LETTER_WIDTH = 15, 7.2
COLORS = {"recovery": "#1668b8", "detection": "#c2510c"}
OWN = "bagcert"


def benchmark_plot(results: Path, patch: str) -> str:
    """One point per defense with a guarantee, with its 95 % interval; detectors are hollow."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((results / "benchmark").glob("*.json"))]
    rows = [row for row in rows if row["patch"] == patch and row["guarantee"] in COLORS]
    rows.sort(key=lambda row: (-row["certified_accuracy"], row["defense"]))
    speeds = [math.log10(row["images_per_second"]["certify"]) for row in rows]
    low, high = math.floor(min(speeds)), math.ceil(max(speeds))
    top = 10 * math.ceil(10 * max(row["interval95"]["certified_accuracy"][1] for row in rows))

    def x(log: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (log - low) / (high - low)

    def y(percent: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * percent / top

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#1d2430">',
        f"<title>Certified accuracy against {patch}x{patch} px patches and images certified per second</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        _text(
            LEFT,
            22,
            f"Certified accuracy against {patch}x{patch} px patches, {rows[0]['epochs']} epochs each",
            weight=600,
        ),
    ]
    for power in range(low, high + 1):
        parts.append(_line(x(power), y(0), x(power), y(top), "#e3e7ec"))
        parts.append(_text(x(power), y(0) + 18, f"{10**power:,}", "middle"))
    for percent in range(0, top + 1, 10):
        parts.append(_line(LEFT, y(percent), WIDTH - RIGHT, y(percent), "#e3e7ec"))
        parts.append(_text(LEFT - 8, y(percent) + 4, f"{percent}%", "end"))
    parts.append(
        _text(
            (LEFT + WIDTH - RIGHT) / 2,
            HEIGHT - 12,
            f"images certified per second ({rows[0]['threads']} CPU cores)",
            "middle",
        )
    )
    taken: list[tuple[float, float, float]] = []
    for row, log in zip(rows, speeds, strict=True):
        parts += _point(row, x(log), y, taken)
    return "\n".join([*parts, "</svg>", ""])


def _point(row: dict[str, Any], x: float, y: Any, taken: list[tuple[float, float, float]]) -> list[str]:
    """Draws an interval, a point, and a label that does not overlap others."""
    color, middle = COLORS[row["guarantee"]], y(100 * row["certified_accuracy"])
    low, high = (y(100 * value) for value in row["interval95"]["certified_accuracy"])
    fill = "#fff" if row["guarantee"] == "detection" else color
    label = row["defense"] + (" (detection)" if row["guarantee"] == "detection" else "")
    width = LETTER_WIDTH * len(label)
    start = x + 10 if x + 10 + width < WIDTH - RIGHT else x - 10 - width
    base = middle + 5
    while any(
        start < right and left < start + width and abs(base - other) < LABEL_HEIGHT for left, right, other in taken
    ):
        base += 1
    taken.append((start, start + width, base))
    anchor, at = ("start", start) if start > x else ("end", x - 10)
    return [
        _line(x, low, x, high, color),
        f'<circle cx="{x:.1f}" cy="{middle:.1f}" r="5" fill="{fill}" stroke="{color}" stroke-width="2"/>',
        _text(at, base, label, anchor, 700 if row["defense"].startswith(OWN) else 400),
    ]


def _line(x1: float, y1: float, x2: float, y2: float, color: str) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", weight: int = 400) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
