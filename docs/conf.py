"""How the documentation is built: `sphinx-build -W docs build/docs`, without a network."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import bagcert

project = "bagcert"
author = copyright = "bagcert contributors"
version = release = bagcert.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "mathml", "plain_docstrings"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["misc.highlighting_failure", "ref.python"]  # `device` names an attribute of several classes

html_theme = "furo"
html_title = f"bagcert {version}"
html_copy_source = False
html_show_sphinx = False
html_math_renderer = "mathml"

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the annotations stand beside the attributes, and are not markup
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
