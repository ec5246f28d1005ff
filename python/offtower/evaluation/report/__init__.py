"""One self-contained HTML file: verdicts at the top, every number at the bottom."""

from offtower.evaluation.report.over_time import draw_over_time
from offtower.evaluation.report.render import write_report

__all__ = ["draw_over_time", "write_report"]
