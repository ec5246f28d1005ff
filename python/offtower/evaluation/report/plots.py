"""Charts as inline SVG, readable in print and with a color-vision deficiency.

Colors are those of Okabe and Ito; every series also has its own marker or line style. The same
input gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable
from typing import Any, Literal

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from offtower.evaluation.frontier import ServingFrontier
from offtower.evaluation.report.answer import PER
from offtower.evaluation.report.over_time import draw_over_time
from offtower.evaluation.report.palette import BAND, COLORS, FAINT, INK, MARKERS
from offtower.evaluation.result import EstimatorResult
from offtower.evaluation.run import HISTOGRAM_EDGES, LogEvaluation
from offtower.evaluation.selection import SelectionComparison

_VARIABLES = {
    INK: "var(--ink)",
    FAINT: "var(--faint)",
    BAND: "var(--band)",
    "#ffffff": "var(--page)",
    COLORS[0].lower(): "var(--blue)",
}
"""Colors that follow the page, so that charts can be read in dark mode."""
WIDE, NARROW = 7.2, 4.4
"""Inches of a chart on a desktop and on a phone."""
DASHES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)))

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "svg.fonttype": "none",
}


def answer(evaluation: LogEvaluation, width: float = WIDE) -> str:
    """Each policy's value per 1,000 requests by the deciding estimator, with its interval."""
    result = evaluation.result
    rows = [
        (name, found.estimates[result.decide_by], "o", COLORS[0])
        for name, found in result.policies.items()
    ]
    rows += [(name, found, "s", FAINT) for name, found in evaluation.baseline_values.items()]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.75 + 0.3 * len(rows), width)
        band = result.logging.interval
        axes.axvspan(PER * band.low, PER * band.high, color=BAND, lw=0, zorder=0)
        axes.axvline(PER * result.logging.estimate.value, color=FAINT, lw=1.2, zorder=1)
        for i, (_, found, marker, color) in enumerate(rows):
            axes.hlines(i, PER * found.interval.low, PER * found.interval.high, color=color, lw=2)
            axes.plot(PER * found.estimate.value, i, marker, color=color, ms=6)
        axes.set_yticks(range(len(rows)), [_short(name, width) for name, *_ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(f"per {PER:,} requests (gray: today)")
        return _svg(figure, f"Value of each policy with its interval, {evaluation.title}")


def over_time(evaluation: LogEvaluation, width: float = WIDE) -> str:
    """Each policy's value per 1,000 requests by period, and its forecast."""
    time = evaluation.result.time
    assert time is not None, "callers check that there are periods"
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2.9, width)
        draw_over_time(axes, time, PER)
        axes.set_ylabel(f"per {PER:,} requests")
        axes.tick_params(axis="x", labelrotation=0 if width == WIDE else 45)
        _legend(axes, 3, width)
        return _svg(figure, f"Values over time, {evaluation.title}")


def estimates(evaluation: LogEvaluation, width: float = WIDE) -> str:
    """Each policy's estimates with intervals, against the logging policy's value and the truth.

    The deciding estimator is drawn filled, one whose bias does not vanish hollow and dashed.
    """
    result = evaluation.result
    labels = list(next(iter(result.policies.values())).estimates)
    names = list(result.policies)
    height = 0.9 + len(names) * (0.25 + 0.2 * len(labels))
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(height, width)
        band = result.logging.interval
        axes.axvspan(band.low, band.high, color=BAND, lw=0, zorder=0)
        axes.axvline(result.logging.estimate.value, color=FAINT, lw=1.2, zorder=1)
        offsets = np.linspace(-0.3, 0.3, len(labels)) if len(labels) > 1 else np.zeros(1)
        for i, label in enumerate(labels):
            decides = label == result.decide_by
            for j, name in enumerate(names):
                found = result.policies[name].estimates[label]
                y = j + offsets[i]
                axes.hlines(
                    y,
                    found.interval.low,
                    found.interval.high,
                    color=_color(i),
                    lw=3.0 if decides else 1.5,
                    ls="-" if found.consistent else (0, (2, 1.5)),
                )
                axes.plot(
                    found.estimate.value,
                    y,
                    MARKERS[i % len(MARKERS)],
                    color=_color(i),
                    markerfacecolor=_color(i) if found.consistent else "white",
                    ms=7 if decides else 5,
                    label=label + _role(label, result.decide_by, found) if j == 0 else None,
                )
        for j, name in enumerate(names):
            known = evaluation.truth.get(name, {}).get("true_value")
            if known is not None:
                line = axes.vlines(known, j - 0.42, j + 0.42, color=INK, lw=2)
                if j == 0:
                    line.set_label("truth")
        axes.set_yticks(range(len(names)), [_short(name, width) for name in names])
        axes.invert_yaxis()
        axes.set_xlabel("value (gray: the logging policy's)")
        _legend(axes, len(labels) + 1, width)
        return _svg(figure, f"Estimates with intervals, {evaluation.title}")


def _role(label: str, decide_by: str, found: EstimatorResult) -> str:
    if label == decide_by:
        return " (decides)"
    return "" if found.consistent else " (may be biased)"


def _number(value: object) -> float:
    """A stored number; NaN where the line holds something else."""
    return float(value) if isinstance(value, int | float) else math.nan


def learning_curves(evaluation: LogEvaluation, width: float = WIDE) -> str:
    """Held-out estimate after each epoch with its interval, and the truth where it is known."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2.9, width)
        for i, (name, lines) in enumerate(evaluation.curves.items()):
            validated = [line for line in lines if isinstance(line.get("validation"), dict)]
            if validated:
                epoch = [line["epoch"] + 1 for line in validated]
                axes.plot(
                    epoch,
                    [_number(line["validation"].get("value")) for line in validated],
                    color=_color(i),
                    ls=DASHES[i % len(DASHES)],
                    marker=MARKERS[i % len(MARKERS)],
                    ms=3,
                    lw=1.4,
                    label=_short(name, width),
                )
                axes.fill_between(
                    epoch,
                    [_number(line["validation"].get("low")) for line in validated],
                    [_number(line["validation"].get("high")) for line in validated],
                    color=_color(i),
                    alpha=0.12,
                    lw=0,
                )
            known = [line for line in lines if math.isfinite(_number(line.get("true_value")))]
            if known:
                axes.plot(
                    [line["epoch"] + 1 for line in known],
                    [line["true_value"] for line in known],
                    color=_color(i),
                    lw=0.9,
                    alpha=0.9,
                    label=f"{_short(name, width)}, truth",
                )
        axes.set_xlabel("epoch")
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel("value on the validation log")
        if axes.get_legend_handles_labels()[0]:
            _legend(axes, 3, width)
        return _svg(figure, f"Learning curves, {evaluation.title}")


def weights(evaluation: LogEvaluation, width: float = WIDE) -> str:
    """Histogram of the importance weights, on a logarithmic axis."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(2.5, width)
        for i, (name, counts) in enumerate(evaluation.histograms.items()):
            share = np.asarray(counts) / max(sum(counts), 1)
            axes.stairs(
                share,
                10.0**HISTOGRAM_EDGES,
                color=_color(i),
                ls=DASHES[i % len(DASHES)],
                lw=1.5,
                label=_short(name, width),
            )
        axes.axvline(1.0, color=FAINT, lw=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("importance weight")
        axes.set_ylabel("share of rows")
        _legend(axes, 3, width)
        return _svg(figure, f"Importance weights, {evaluation.title}")


def calibration(evaluation: LogEvaluation, width: float = WIDE) -> str:
    """The reward model's predictions against what was observed, in bins; bars: two std. errors."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.2, width)
        # The predictions of the logged items are the same for every policy.
        policies = evaluation.result.policies.values()
        found = next(p.calibration for p in policies if p.calibration is not None)
        predicted = [one.predicted for one in found.bins]
        axes.errorbar(
            predicted,
            [one.observed for one in found.bins],
            yerr=[2.0 * (one.std_error or 0.0) for one in found.bins],
            fmt=MARKERS[0],
            color=_color(0),
            ms=4,
            lw=1.2,
        )
        ends = [min(predicted), max(predicted)]
        axes.plot(ends, ends, color=FAINT, lw=1, ls="--")
        axes.set_xlabel("predicted reward of the logged item")
        axes.set_ylabel("observed mean reward")
        return _svg(figure, f"Calibration of the reward model, {evaluation.title}")


def ranking(
    comparison: SelectionComparison, title: str, width: float = WIDE, shown: int = 12
) -> str:
    """The recommended selector's ranking: root mean squared error of its best candidates."""
    result = comparison.results[comparison.recommended]
    best = result.ranking[:shown]
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(0.9 + 0.24 * len(best), width)
        for i, score in enumerate(best):
            ends = [max(0.0, score.mse + sign * 2.0 * score.noise) ** 0.5 for sign in (-1, 1)]
            same = i == 0 or score.name in result.tied
            axes.hlines(i, *ends, color=INK if same else FAINT, lw=1.8)
            axes.plot(
                max(0.0, score.mse) ** 0.5,
                i,
                "o" if same else "s",
                color=COLORS[0] if same else "white",
                markeredgecolor=COLORS[0] if same else FAINT,
                ms=5.5,
            )
        axes.set_yticks(range(len(best)), [_short(score.name, width) for score in best])
        axes.invert_yaxis()
        axes.set_xlabel("root mean squared error, estimated")
        return _svg(figure, f"Ranking of estimators by {comparison.recommended}, {title}")


def frontier(
    found: ServingFrontier, against: Literal["effective_sample_size", "perplexity"], width: float
) -> str:
    """Value of each way to serve the policy, against one of its other qualities."""
    label = {
        "effective_sample_size": "effective sample size on this log",
        "perplexity": "perplexity: equally likely items that explore as much",
    }[against]
    shares = sorted({point.serving.uniform for point in found.points})
    with matplotlib.rc_context(_STYLE):
        figure, axes = _figure(3.4, width)
        logging = found.evaluation.result.logging
        axes.axhspan(logging.interval.low, logging.interval.high, color=BAND, lw=0, zorder=0)
        axes.axhline(logging.estimate.value, color=FAINT, lw=1.2, zorder=1)
        for i, share in enumerate(shares):
            points = [point for point in found.points if point.serving.uniform == share]
            points.sort(key=lambda point: point.serving.temperature)
            x = [max(getattr(point, against), 1.0) for point in points]
            axes.plot(x, [p.value for p in points], color=_color(i), lw=0.8, alpha=0.6)
            for at, point in zip(x, points, strict=True):
                reliable = point.obstacle is None
                axes.vlines(
                    at,
                    point.low,
                    point.high,
                    color=_color(i),
                    lw=1.6 if reliable else 0.8,
                    alpha=0.7,
                )
                axes.plot(
                    at,
                    point.value,
                    MARKERS[i % len(MARKERS)],
                    color=_color(i),
                    markerfacecolor=_color(i) if reliable else "white",
                    ms=5,
                    label=f"uniform {share:g}" if point is points[0] else None,
                )
        if found.recommended is not None:
            axes.plot(
                max(getattr(found.recommended, against), 1.0),
                found.recommended.value,
                "o",
                color=INK,
                markerfacecolor="none",
                ms=12,
                mew=1.6,
                label="recommended",
            )
        # Wide intervals of unreliable estimates would hide all others.
        reliable_points = [point for point in found.points if point.obstacle is None]
        shown = reliable_points or list(found.points)
        low = min([point.low for point in shown] + [logging.interval.low])
        high = max([point.high for point in shown] + [logging.interval.high])
        axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("value")
        _legend(axes, len(shares) + 1, width)
        return _svg(figure, f"Value of ways to serve the policy against the {label}")


def both(chart: Callable[[float], str]) -> str:
    """A chart drawn wide and, for phones, narrow; the style sheet shows one of them."""
    return f'<div class="wide">{chart(WIDE)}</div><div class="narrow">{chart(NARROW)}</div>'


def _figure(height: float, width: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _short(name: str, width: float) -> str:
    """A label in at most two lines; the tables have the whole name."""
    lines = textwrap.wrap(name, round(2 * width + 14), max_lines=2, placeholder="…")
    text = "\n".join(lines)
    if text.startswith("_"):
        text = f" {text}"  # Matplotlib leaves such labels out of a legend.
    return text.replace("$", r"\$")  # Matplotlib reads text between dollars as TeX.


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _legend(axes: Axes, columns: int, width: float) -> None:
    """Place the legend above the chart, in as many columns as fit its longest text."""
    labels = axes.get_legend_handles_labels()[1]
    if not labels:
        return
    longest = max(len(text) for text in labels)
    room = int(60 * width / (5 * longest + 40))
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=max(1, min(columns, 6, room)),
        frameon=False,
        borderaxespad=0.2,
        handlelength=2.2,
        columnspacing=1.4,
    )


def _svg(figure: Figure, description: str) -> str:
    """Inline SVG with a text alternative."""
    from html import escape

    buffer = io.StringIO()
    # The hidden one of the two widths defines no ids, so theirs must differ.
    with matplotlib.rc_context({"svg.hashsalt": f"offtower {figure.get_figwidth():g}"}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1)
