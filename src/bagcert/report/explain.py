"""One photo explained: its region map, where a patch comes closest to changing the answer, and by how much it fails."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bagcert.errors import shown
from bagcert.io.files import write_atomically
from bagcert.records import in_unit
from bagcert.report.drawing import drawn, figure

if TYPE_CHECKING:
    from bagcert.data.photo import Photo
    from bagcert.defenses.bagcert import BagCert
    from bagcert.evaluation.gallery_file import Picture
    from bagcert.records import Record

YELLOW = "#ffd23f"
MOST_SIDE = 1024


def write_explanation(
    model: "BagCert",
    photo: "Photo",
    verdict: "Record",
    path: Path,
    fit: str = "squash",
    placements: str | Path | None = None,
) -> None:
    """Draws the photo and its region map side by side, and writes them as PNG.

    Args:
        model, fit, placements: as the photo was certified.
        photo: as stored; it is drawn upright.
        verdict: of one rule and patch on it.

    Raises:
        UsageError: matplotlib is not installed.
        BagcertError: the file cannot be written.
    """
    from bagcert.data.preprocess import Preprocessing
    from bagcert.evaluation.gallery import picture, thumbnail

    drawing = figure(9.0, 4.6)
    preprocessing = Preprocessing(model.image_size, fit)
    net_map = model.score_map(preprocessing.apply(photo)[None])
    small = thumbnail(photo.upright(), MOST_SIDE)
    found = picture(net_map, preprocessing, small, photo.stored_size, photo.orientation, 0, verdict, placements)
    _draw(drawing, found, model.class_names, verdict, photo.source)
    write_atomically(path, drawn(drawing, "png"))


def _draw(drawing: Any, found: "Picture", names: tuple[str, ...], verdict: "Record", source: str) -> None:
    from matplotlib.patches import Rectangle

    height, width = found.size_px
    net = found.votes[0].astype(int) - found.votes[1]
    peak = max(1, int(np.abs(net).max()))
    left, right = drawing.subplots(1, 2)
    left.imshow(found.pixels, extent=(0, width, height, 0), interpolation="nearest")
    mesh = right.pcolormesh(found.col_edges, found.row_edges, net, cmap="RdBu", vmin=-peak, vmax=peak)
    bar = drawing.colorbar(mesh, ax=right, shrink=0.8)
    answer, rival = (_plain(names[index]) for index in (found.prediction, found.runner_up))
    bar.set_label(f"votes for {answer} less votes for {rival}")
    for axes in (left, right):
        axes.set(xlim=(0, width), ylim=(height, 0), aspect="equal", xlabel="px")
        for top, start, tall, wide in found.worst_placements:
            for color, thickness in (("black", 4), (YELLOW, 2)):  # seen on dark and on light
                axes.add_patch(Rectangle((start, top), wide, tall, fill=False, edgecolor=color, linewidth=thickness))
    left.set_title("outlined: where a patch comes closest", fontsize="medium")
    right.set_title("what each region votes for", fontsize="medium")
    drawing.suptitle(f"{_plain(Path(source).name)}: {answer}, {sentence(verdict)}")


def sentence(verdict: "Record") -> str:
    """What a verdict says, with the margin, in words."""
    against = f"a patch of {in_unit(verdict.threat, 'of the photo')} ({verdict.rule})"
    if verdict.certified:
        return f"certified against {against}\nthe answer holds by {verdict.margin:,} units of score in the worst case"
    return f"not certified against {against}\n{-verdict.margin:,} units of score are missing in the worst case"


def _plain(text: str) -> str:
    return shown(text, 60).replace("$", r"\$")  # which would begin a formula
