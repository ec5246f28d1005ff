"""Compare a served log with the run that served it.

Checks logged propensities, drift of features and rewards, shown and unknown items, unknown values,
and mean rewards by day against the thresholds of the section `monitor`, in one pass. Exit code 0:
no threshold is breached. 1: one is. 2: refused.

\b
Example:
  offtower monitor runs/mine --log logs/served/log
  offtower monitor runs/mine --log logs/served/log --prometheus node_exporter/offtower.prom \\
    --set monitor.max_feature_drift=0.2
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offtower.cli.common import (
    AsJson,
    DrawnProgress,
    Overrides,
    TrustCode,
    print_json,
    verb,
)
from offtower.errors import ConfigError
from offtower.jsonable import finite


@verb
def monitor(
    run: Annotated[Path, typer.Argument(help="Run directory.", metavar="RUN")],
    log: Annotated[str, typer.Option(help="Log that its policy served, as ingest wrote it.")],
    reference: Annotated[
        str | None,
        typer.Option(help="Log to compare with; by default the run's training log."),
    ] = None,
    prometheus: Annotated[
        Path | None,
        typer.Option(help="Also write the figures to this file, for node_exporter (extra serve)."),
    ] = None,
    overrides: Overrides = None,
    trust_code: TrustCode = None,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Exit with 0 for breached thresholds too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    from offtower.cli.tables import print_monitoring
    from offtower.execution import Execution
    from offtower.monitoring import monitor_run
    from offtower.monitoring.prometheus import write_metrics

    if prometheus is not None and prometheus.is_dir():
        raise ConfigError(
            f"--prometheus: '{prometheus}' is a folder; name a file in it, such as "
            f"{prometheus / 'offtower.prom'}"
        )
    report = monitor_run(
        run,
        log,
        reference=reference,
        overrides=overrides or [],
        execution=Execution(progress=DrawnProgress()),
    )
    if prometheus is not None:
        write_metrics(report, prometheus)
    if as_json:
        print_json(finite(report.to_dict()))
    else:
        print_monitoring(report)
    raise typer.Exit(0 if exit_zero else report.exit_code)
