"""Shapes written in signatures are checked at run time, here and only here."""

import os
import tempfile

# Test processes run side by side, so each keeps to one thread. Set before torch is imported, and inherited by commands.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from jaxtyping import install_import_hook

install_import_hook("bagcert", "beartype.beartype")

# Measurements of locality are kept for this run alone; commands started by tests inherit them.
_cache = tempfile.TemporaryDirectory(prefix="bagcert-cache-")
os.environ["BAGCERT_CACHE"] = _cache.name


@pytest.fixture(autouse=True)
def _width_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Libraries under test set COLUMNS for the whole process; tables would be narrower in the tests that follow."""
    monkeypatch.delenv("COLUMNS", raising=False)
