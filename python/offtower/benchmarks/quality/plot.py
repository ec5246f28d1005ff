"""Plot of the values of all methods in all worlds, with each world's baselines."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#222222")
_MARKS = {"logging": ":", "best_fixed": "-.", "supervised": "--", "optimum": "-"}
_STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "offtower",
}


def values(summary: Mapping[str, Any]) -> str:
    """Return an SVG with one panel per world and one row per method: mean and std over seeds."""
    worlds = summary["worlds"]
    columns = min(3, len(worlds))
    lines = -(-len(worlds) // columns)
    most = max(len(world["methods"]) for world in worlds.values())
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.2 * columns, lines * (0.9 + 0.2 * most)), layout="constrained")
        grid = figure.subplots(lines, columns, squeeze=False)
        for axes, (name, world) in zip(grid.flat, worlds.items(), strict=False):
            axes.set_title(name, fontsize=8, loc="left")
            for mark, found in world["baselines"].items():
                axes.axvline(found, color="#8a8a8a", lw=1, ls=_MARKS[mark])
                axes.annotate(
                    mark.replace("_", " "),
                    (found, 1.0),
                    xycoords=("data", "axes fraction"),
                    rotation=90,
                    va="top",
                    ha="right",
                    fontsize=6,
                    color="#666666",
                )
            methods = list(world["methods"].items())
            for row, (method, found) in enumerate(methods):
                color = COLORS[0] if method == "auto" else COLORS[1]
                axes.errorbar(
                    found["mean"], row, xerr=found["spread"], fmt="o", ms=4, color=color, lw=1.2
                )
                axes.plot(found["greedy"], row, "|", color=color, ms=8)
            axes.set_yticks(range(len(methods)), [method for method, _ in methods])
            axes.invert_yaxis()
        for axes in list(grid.flat)[len(worlds) :]:
            axes.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
