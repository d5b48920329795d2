"""The figures of a report as PNG and PDF for a paper."""

from pathlib import Path
from typing import Any

from bagcert.io.files import write_atomically
from bagcert.records import in_unit
from bagcert.report.drawing import drawn, figure
from bagcert.report.summary import KINDS, Inputs, Run, Training, margins, patch_curves, patch_title

COLORS = ("#25804a", "#d99a1c", "#c23b4a")


def write_plots(inputs: Inputs, folder: Path) -> list[Path]:
    """Writes `certified-patch`, `margins-N` and `training-N`, each as .png and .pdf; returns their paths.

    N is the number of the run, from 1.
    """
    figures: dict[str, Any] = {}
    if inputs.runs:
        figures["certified-patch"] = _against_patch(inputs.runs)
    for number, run in enumerate(inputs.runs, 1):
        if run.records is not None:
            figures[f"margins-{number}"] = _margins(run)
    for number, training in enumerate(inputs.trainings, 1):
        figures[f"training-{number}"] = _training(training)
    written = []
    for name, one in figures.items():
        for kind in ("png", "pdf"):
            written.append(folder / f"{name}.{kind}")
            write_atomically(written[-1], drawn(one, kind))
    return written


def _plain(text: str) -> str:
    return text.replace("$", r"\$")  # $ would start a formula


def _against_patch(runs: list[Run]) -> Any:
    patches, curves = patch_curves(runs)
    drawing = figure(5.0, 3.2)
    axes = drawing.subplots()
    for name, points in curves.items():
        ordered = sorted(points.items(), key=lambda item: patches.index(item[0]))
        values = [value for _, (value, _, _) in ordered]
        bars = [
            [max(0.0, value - low) for _, (value, low, _) in ordered],
            [max(0.0, high - value) for _, (value, _, high) in ordered],
        ]
        places = [patches.index(patch) for patch, _ in ordered]
        axes.errorbar(places, values, yerr=bars, marker="o", capsize=3, label=_plain(name))
    axes.set_xticks(range(len(patches)), [_plain(patch) for patch in patches])
    axes.set(xlabel=patch_title(patches), ylabel="certified accuracy, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize="small")
    return drawing


def _margins(run: Run) -> Any:
    edges, groups = margins(run, run.headline)
    drawing = figure(5.0, 3.2)
    axes = drawing.subplots()
    base = [0] * (len(edges) - 1)
    for kind, color in zip(KINDS, COLORS, strict=True):
        axes.bar(edges[:-1], groups[kind], edges[1] - edges[0], base, align="edge", color=color, label=kind)
        base = [below + count for below, count in zip(base, groups[kind], strict=True)]
    axes.axvline(0, color="black", linestyle="--", linewidth=1)
    row = run.info.results[run.headline]
    axes.set(xlabel=_plain(f"margin ({row.rule}, patch of {in_unit(row.threat, run.info.pixels)})"), ylabel="images")
    axes.legend(frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
    return drawing


def _training(training: Training) -> Any:
    drawing = figure(5.0, 3.2)
    axes = drawing.subplots()
    for name in ("clean", "certified"):
        if points := training.curve(f"{name}_accuracy", True):
            axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xlabel="epoch", ylabel="validation accuracy, %", ylim=(0, 100), title=_plain(training.name))
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False, fontsize="small")
    return drawing
