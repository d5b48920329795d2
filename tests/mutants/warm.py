"""What every trial imports and no mutant changes: loaded once, before the processes part. Nothing of the package."""

import pdb  # noqa: F401
from importlib import import_module

import beartype.claw  # noqa: F401
import hypothesis.strategies  # noqa: F401
import jaxtyping  # noqa: F401
import numpy.testing  # noqa: F401
import PIL.PngImagePlugin  # noqa: F401
import pytest_timeout  # noqa: F401
import torch  # noqa: F401
from _pytest.config import default_plugins

for plugin in default_plugins:
    import_module(f"_pytest.{plugin}")
