"""One self-contained HTML file: verdicts at the top, every number at the bottom."""

from offtower.evaluation.report.render import write_report

__all__ = ["write_report"]
