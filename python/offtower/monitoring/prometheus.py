"""A monitoring as metrics in Prometheus' text format, for the textfile collector."""

from __future__ import annotations

import time
from pathlib import Path

from offtower.atomic import write_bytes
from offtower.errors import MissingExtraError
from offtower.monitoring.result import MonitorReport

_CHECK = ["run", "check", "subject"]
_DAY = ["run", "day"]


def write_metrics(report: MonitorReport, path: Path) -> None:
    """Write the metrics, whole or not at all.

    Raises:
        MissingExtraError: the extra `serve` is not installed.
    """
    write_bytes(path, metrics_text(report, time.time()))


def metrics_text(report: MonitorReport, now: float) -> bytes:
    """The metrics.

    Args:
        now: seconds since 1970, when the log was read.
    """
    try:
        from prometheus_client import CollectorRegistry, Gauge, generate_latest
    except ImportError as error:
        raise MissingExtraError("prometheus_client", "serve", "--prometheus") from error
    registry = CollectorRegistry()

    def gauge(name: str, text: str, labels: list[str]) -> Gauge:
        return Gauge(f"offtower_monitor_{name}", text, labels, registry=registry)

    run = Path(report.run).absolute().name
    gauge("time_seconds", "When the log was read.", ["run"]).labels(run).set(now)
    gauge("rows", "Rows of the log.", ["run"]).labels(run).set(report.rows)
    gauge("breached_checks", "Checks beyond their thresholds.", ["run"]).labels(run).set(
        len(report.breached)
    )
    value = gauge("check", "Value of a check.", _CHECK)
    low = gauge("check_low", "Lower bound of the value.", _CHECK)
    high = gauge("check_high", "Upper bound of the value.", _CHECK)
    threshold = gauge("check_threshold", "Its threshold.", _CHECK)
    breached = gauge("check_breached", "1 where the check is beyond its threshold.", _CHECK)
    for one in report.checks:
        labels = (run, one.name, one.subject)
        value.labels(*labels).set(one.value)
        breached.labels(*labels).set(one.breached)
        for metric, number in ((low, one.low), (high, one.high), (threshold, one.threshold)):
            if number is not None:
                metric.labels(*labels).set(number)
    by_day = {
        name: gauge(f"day_{name}", text, _DAY)
        for name, text in (
            ("value", "Mean reward of a day."),
            ("value_low", "Its lower bound."),
            ("value_high", "Its upper bound."),
            ("weight", "Mean weight of a day."),
            ("rows", "Rows of a day."),
        )
    }
    for day in report.days:
        for name, metric in by_day.items():
            number = getattr(day, name)
            if number is not None:
                metric.labels(run, day.name).set(number)
    content: bytes = generate_latest(registry)
    return content
