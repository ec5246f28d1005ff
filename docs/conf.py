"""Sphinx configuration: `make docs` builds the site into build/docs, warnings as errors."""

from importlib.metadata import version as installed_version

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
html_theme_options = {"source_directory": "docs/"}
