"""Sphinx configuration: `make docs` builds the site into build/docs, warnings as errors."""

from importlib.metadata import version as installed_version
from typing import Any

import latex2mathml.converter
from docutils import nodes

project = "offtower"
author = "The offtower authors"
version = release = installed_version("offtower")
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["results/data"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # The notebooks are stored with their outputs; tests/docs runs them.
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
suppress_warnings = ["myst.header"]
html_theme = "furo"
html_title = "offtower"
html_show_copyright = False
html_math_renderer = "mathml"


def _render_math(display: str) -> Any:
    """Write a formula as MathML, which browsers show without a script or a network."""

    def visit(self: Any, node: nodes.Element) -> None:
        self.body.append(latex2mathml.converter.convert(node.astext(), display=display))
        raise nodes.SkipNode

    return visit, None


def setup(app: Any) -> None:
    app.add_html_math_renderer("mathml", _render_math("inline"), _render_math("block"))
