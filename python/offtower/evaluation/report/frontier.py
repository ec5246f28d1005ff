"""The report of `offtower tune serving`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from markupsafe import Markup

from offtower.atomic import write_text
from offtower.evaluation.frontier import ServingFrontier
from offtower.evaluation.report import plots
from offtower.evaluation.report.render import render_page
from offtower.jsonable import finite


def write_frontier(path: Path, found: ServingFrontier, *, command: str) -> Path:
    """Write the frontier as HTML, and the same numbers as JSON beside it.

    Args:
        path: HTML file; replaced as a whole.
        command: that made it, shown so that it can be repeated.
    """
    by_size = partial(plots.frontier, found, "effective_sample_size")
    by_perplexity = partial(plots.frontier, found, "perplexity")
    html = render_page(
        "frontier.html.j2",
        title="How to serve the policy",
        command=command,
        found=found,
        # Made by matplotlib from escaped text: markup that is not escaped again.
        by_size=Markup(plots.both(by_size)),
        by_perplexity=Markup(plots.both(by_perplexity)),
    )
    write_text(path, html)
    write_text(path.with_suffix(".json"), json.dumps(finite(found.to_dict()), indent=2) + "\n")
    return path
