"""The gallery of a report: images next to the votes of their regions, with patches drawn to scale."""

import base64
import io
from html import escape

import numpy as np
from PIL import Image

from bagcert.evaluation.gallery_file import Picture
from bagcert.records import ImageRecord, in_unit
from bagcert.report.summary import KINDS, Run, kind_of


def gallery(run: Run) -> str:
    """Renders the pictures of a run as HTML, grouped by kind; empty if there are none."""
    if run.gallery is None or not run.gallery.pictures:
        return ""
    records = {record.index: record for record in run.records or ()}
    parts = []
    for kind in KINDS:
        some = [picture for picture in run.gallery.pictures if kind_of(records[picture.index], run.headline) == kind]
        if some:
            cards = "".join(_card(run, picture, records[picture.index]) for picture in some)
            parts.append(f'<h4>{escape(kind.capitalize())}</h4><div class="cards">{cards}</div>')
    return "".join(parts)


def _card(run: Run, picture: Picture, record: ImageRecord) -> str:
    first = record.results[run.headline]
    answer, rival = run.class_name(picture.prediction), run.class_name(picture.runner_up)
    truth = "" if first.prediction == record.label else f" (is {escape(run.class_name(record.label))})"
    missing = f"margin {first.margin:,}" if first.certified else f"{-first.margin:,} short of a certificate"
    unit = f"px {run.info.pixels}".strip()
    proved = picture.largest_certified_px
    largest = f"certified up to {proved} {unit} as deployed" if proved else "not certified as deployed"
    name = escape(record.source or f"image {picture.index}")
    verdicts = "".join(
        f"<li>{'&#10003;' if row.certified else '&#10007;'} {escape(in_unit(row.threat, run.info.pixels))}, "
        f"{escape(row.rule)}</li>"
        for row in record.results[:12]
    )
    return (
        f'<figure class="card"><div class="pair">{_image(picture)}{_votes(picture, answer, rival)}</div><figcaption>'
        f"<b>{escape(answer)}</b>{truth}, not {escape(rival)} <small>{name}</small><br>{missing}; "
        f"{largest}; a defense built for its largest patch: up to {picture.largest_certifiable_px} {unit}"
        f'<ul class="verdicts">{verdicts}</ul></figcaption></figure>'
    )


def _image(picture: Picture) -> str:
    """Renders the image with the worst placement outlined and the largest certified square at the lower left."""
    height, width = picture.size_px
    side = picture.largest_certified_px
    square = f'<rect class="largest" x="0" y="{height - side}" width="{side}" height="{side}"/>' if side else ""
    return (
        f'<svg class="picture" viewBox="0 0 {width} {height}" role="img" aria-label="image {picture.index}">'
        f'<image href="data:image/png;base64,{_png(picture.pixels)}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none"/>{square}{_boxes(picture)}</svg>'
    )


def _votes(picture: Picture, answer: str, rival: str) -> str:
    """Renders the votes for the prediction minus those for the runner-up, at the positions of the regions."""
    height, width = picture.size_px
    net = picture.votes[0].astype(int) - picture.votes[1]
    peak = max(1, int(np.abs(net).max()))
    cells = "".join(
        f'<rect class="{"for" if net[row, col] > 0 else "against"}" fill-opacity="{abs(net[row, col]) / peak:.2g}" '
        f'x="{left:.4g}" y="{top:.4g}" width="{right - left:.4g}" height="{bottom - top:.4g}"/>'
        for row, (top, bottom) in enumerate(zip(picture.row_edges, picture.row_edges[1:], strict=False))
        for col, (left, right) in enumerate(zip(picture.col_edges, picture.col_edges[1:], strict=False))
        if net[row, col]
    )
    label = escape(f"votes for {answer} minus votes for {rival}")
    return (
        f'<svg class="picture votes" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{cells}'
        f"{_boxes(picture)}</svg>"
    )


def _boxes(picture: Picture) -> str:
    return "".join(
        f'<rect class="{style}" x="{left}" y="{top}" width="{width}" height="{height}"/>'
        for top, left, height, width in picture.worst_placements
        for style in ("halo", "worst")  # visible on dark and light backgrounds
    )


def _png(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
