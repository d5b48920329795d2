"""Explanation of one photo: the votes of its regions, the worst-case patch placement, and the margin."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bagcert.errors import sanitize
from bagcert.io.files import write_atomically
from bagcert.records import in_unit
from bagcert.report.drawing import drawn, figure

if TYPE_CHECKING:
    from bagcert.evaluation.gallery_file import Picture
    from bagcert.records import Record

YELLOW = "#ffd23f"
MOST_SIDE = 1024


def write_explanation(
    picture: "Picture", class_names: Sequence[str], verdict: "Record", source: str, path: Path
) -> None:
    """Draws a photo and its region map side by side and writes them as PNG."""
    drawing = figure(9.0, 4.6)
    _draw(drawing, picture, class_names, verdict, source)
    write_atomically(path, drawn(drawing, "png"))


def _draw(drawing: Any, found: "Picture", names: Sequence[str], verdict: "Record", source: str) -> None:
    from matplotlib.patches import Rectangle

    height, width = found.size_px
    net = found.votes[0].astype(int) - found.votes[1]
    peak = max(1, int(np.abs(net).max()))
    left, right = drawing.subplots(1, 2)
    left.imshow(found.pixels, extent=(0, width, height, 0), interpolation="nearest")
    mesh = right.pcolormesh(found.col_edges, found.row_edges, net, cmap="RdBu", vmin=-peak, vmax=peak)
    bar = drawing.colorbar(mesh, ax=right, shrink=0.8)
    answer, rival = (_plain(names[index]) for index in (found.prediction, found.runner_up))
    bar.set_label(f"votes for {answer} minus votes for {rival}")
    for axes in (left, right):
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xlabel="px")
        for top, start, tall, wide in found.worst_placements:
            for color, thickness in (("black", 4), (YELLOW, 2)):  # visible on dark and light backgrounds
                axes.add_patch(Rectangle((start, top), wide, tall, fill=False, edgecolor=color, linewidth=thickness))
    left.set_title("outlined: worst-case patch placement", fontsize="medium")
    right.set_title("votes of the regions", fontsize="medium")
    drawing.suptitle(f"{_plain(Path(source).name)}: {answer}, {sentence(verdict)}")


def sentence(verdict: "Record") -> str:
    """Describes a verdict and its margin in words."""
    against = f"a patch of {in_unit(verdict.threat, 'of the photo')} ({verdict.rule})"
    if verdict.certified:
        return f"certified against {against}\nworst-case lead of the prediction: {verdict.margin:,} score units"
    return f"not certified against {against}\n{-verdict.margin:,} score units short of a certificate in the worst case"


def _plain(text: str) -> str:
    return sanitize(text, 60).replace("$", r"\$")  # $ would start a formula
