"""Plots of a benchmark: certified accuracy against clean accuracy, speed, and patch size."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagcert.io.files import write_atomically
from bagcert.records import in_unit
from bagcert.report.drawing import drawn, figure

if TYPE_CHECKING:
    from bagcert.evaluation.benchmark import BenchmarkRow


def draw(rows: "Sequence[BenchmarkRow]", out: Path) -> list[Path]:
    """Writes `certified-clean.png`, `certified-speed.png` and `certified-patch.png` to `out`. Needs matplotlib."""
    names = list(dict.fromkeys(row.defense for row in rows))
    patches = list(dict.fromkeys(row.patch for row in rows))
    written = []
    for name, panel in (("certified-clean", _against_clean), ("certified-speed", _against_speed)):
        drawing = figure(4.6 * len(patches), 4.4)
        for axes, patch in zip(drawing.subplots(1, len(patches), squeeze=False)[0], patches, strict=True):
            _points(axes, [row for row in rows if row.patch == patch], names, panel)
            axes.set_title(f"patch {in_unit(patch)}")
        written.append((out / f"{name}.png", drawing))
    drawing = figure(6.0, 4.4)
    _against_patch(drawing.subplots(), rows, names)
    written.append((out / "certified-patch.png", drawing))
    for path, drawing in written:
        handles, labels = drawing.axes[0].get_legend_handles_labels()
        drawing.legend(handles, labels, loc="outside right center", fontsize="small", frameon=False)
        write_atomically(path, drawn(drawing, "png"))
    return [path for path, _ in written]


def _points(
    axes: Any, rows: "Sequence[BenchmarkRow]", names: Sequence[str], panel: "Callable[[Any, BenchmarkRow], float]"
) -> None:
    """Draws one point per defense, with its 95 % interval; hollow if the defense only detects attacks."""
    for row in rows:
        low, high = row.interval95["certified_accuracy"]
        value = row.certified_accuracy
        color = f"C{names.index(row.defense) % 10}"
        axes.errorbar(
            panel(axes, row),
            100 * value,
            yerr=[[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]],
            marker="os^Dv"[names.index(row.defense) // 10 % 5],
            color=color,
            markerfacecolor="none" if row.guarantee == "detection" else color,
            linestyle="none",
            label=row.defense + (" (detects)" if row.guarantee == "detection" else ""),
        )
    axes.set_ylabel("certified accuracy, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)


def _against_clean(axes: Any, row: "BenchmarkRow") -> float:
    axes.set_xlabel("clean accuracy, %")
    return 100 * row.clean_accuracy


def _against_speed(axes: Any, row: "BenchmarkRow") -> float:
    axes.set_xscale("log")
    axes.set_xlabel("images certified per second")
    return row.images_per_second["certify"]


def _against_patch(axes: Any, rows: "Sequence[BenchmarkRow]", names: Sequence[str]) -> None:
    patches = list(dict.fromkeys(row.patch for row in rows))
    for number, name in enumerate(names):
        found = {row.patch: 100 * row.certified_accuracy for row in rows if row.defense == name}
        axes.plot(
            [patches.index(patch) for patch in found],
            list(found.values()),
            marker="o",
            linestyle="-" if number < 10 else "--",
            label=name,
        )
    axes.set_xticks(range(len(patches)), patches)
    axes.set_xlabel("patch, px")
    axes.set_ylabel("certified accuracy, %")
    axes.set_ylim(0, 100)
    axes.grid(alpha=0.3)
