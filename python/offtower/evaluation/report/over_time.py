"""Chart of values by period."""

from __future__ import annotations

from typing import TYPE_CHECKING

from offtower.evaluation.drift.result import DriftSeries, TimeResult
from offtower.evaluation.report.palette import COLORS, FAINT, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS, _MARKERS = (FAINT, *COLORS), ("X", *MARKERS)
"""Of the logging policy, and of the others as in the other charts."""


def draw_over_time(axes: Axes, time: TimeResult, per: float = 1.0) -> Axes:
    """Draw each policy's value by period with two standard errors, and the forecast with its
    interval as a hollow point.

    Args:
        per: factor of the values.
    """
    assert time.logging is not None, "callers check that there are periods"
    rows: list[tuple[str, DriftSeries]] = [("logging policy", time.logging)]
    rows += [(name, one.value) for name, one in time.policies.items()]
    count, periods = len(rows), len(time.periods)
    for i, (name, series) in enumerate(rows):
        shift = 0.3 * ((i + 0.5) / count - 0.5)
        color, marker = _COLORS[i % len(_COLORS)], _MARKERS[i % len(_MARKERS)]
        axes.errorbar(
            [number + shift for number in range(periods)],
            [per * value for value in series.values],
            yerr=[2.0 * per * error for error in series.std_errors],
            lw=1.2,
            ms=4,
            label=name,
            color=color,
            marker=marker,
        )
        found = series.forecast
        if found is not None:
            at = periods + 0.3 + shift
            axes.vlines(at, per * found.interval.low, per * found.interval.high, color)
            axes.plot(at, per * found.value, marker, color=color, markerfacecolor="none", ms=6)
    names = [one.name for one in time.periods]
    ticks, step = [float(i) for i in range(periods)], -(-periods // 8)
    labels = [name if i % step == 0 else "" for i, name in enumerate(names)]
    if rows[0][1].forecast is not None:
        ticks, labels = [*ticks, periods + 0.3], [*labels, rows[0][1].forecast.name]
    axes.set_xticks(ticks, labels)
    return axes
