"""Compare a served log with the run that served it: propensities, features, items, rewards."""

from offtower.monitoring.result import Check, Day, MonitorReport
from offtower.monitoring.run import monitor_run

__all__ = ["Check", "Day", "MonitorReport", "monitor_run"]
