"""Matplotlib, asked for only where a picture is drawn; it draws into memory, so no screen is needed."""

import io
from typing import TYPE_CHECKING, Any

from bagcert.io.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def figure(width: float, height: float) -> "Figure":
    """An empty figure, sizes in inches.

    Raises:
        UsageError: matplotlib is not installed; names the extra that installs it.
    """
    require("matplotlib", "report", "drawing")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def drawn(picture: Any, kind: str) -> bytes:
    """A figure as the bytes of a PNG or PDF, the same each time."""
    buffer = io.BytesIO()
    metadata = {"CreationDate": None} if kind == "pdf" else {"Software": None}
    picture.savefig(buffer, format=kind, dpi=200, metadata=metadata)
    return buffer.getvalue()
