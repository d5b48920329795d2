"""Figures with matplotlib, which is imported on first use. Draws in memory, without a display."""

import io
from typing import TYPE_CHECKING, Any

from bagcert.io.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> "Figure":
    """Creates an empty figure; sizes in inches."""
    require("matplotlib", "report", "drawing")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def drawn(picture: Any, kind: str) -> bytes:
    """Renders a figure as PNG or PDF. The bytes are deterministic."""
    buffer = io.BytesIO()
    metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
    picture.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()
