"""Read a running A/B test, as often as you like.

Takes the rows so far, in the order of their time: a CSV or Parquet file with an arm and a reward in
each row, or the logs that the two policies served. Bounds and decision hold for all readings
together. Exit code 0: launch. 1: stop, the new policy is worse. 3: continue. 2: refused.

\b
Example:
  offtower experiment read runs/mine/experiment.json --rows rows.parquet --new b
  offtower experiment read runs/mine/experiment.json --new-log logs/b --current-log logs/a
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offtower.cli.common import AsJson, escape, messages, print_json, verb
from offtower.errors import ConfigError
from offtower.jsonable import finite


@verb
def experiment_read(
    plan: Annotated[Path, typer.Argument(help="Plan of offtower experiment plan.", metavar="PLAN")],
    rows: Annotated[str | None, typer.Option(help="File or folder of rows.")] = None,
    new: Annotated[str, typer.Option(help="Name of the new policy's arm.")] = "new",
    current: Annotated[
        str | None, typer.Option(help="Name of the other arm; needed where there are several.")
    ] = None,
    arm: Annotated[str, typer.Option(help="Column of the arm.")] = "arm",
    reward: Annotated[str, typer.Option(help="Column of the reward.")] = "reward",
    time: Annotated[str | None, typer.Option(help="Column of the time.")] = None,
    user: Annotated[
        str | None, typer.Option(help="Column of the user, where users are assigned.")
    ] = None,
    window: Annotated[
        str | None,
        typer.Option(help="Time after a user's first row in which its rows count, such as 7d."),
    ] = None,
    new_log: Annotated[
        str | None, typer.Option(help="Log that the new policy served, in place of --rows.")
    ] = None,
    current_log: Annotated[
        str | None, typer.Option(help="Log that the current policy served.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    from functools import partial

    from offtower.experiment.plan import load_design
    from offtower.experiment.read import describe, read_experiment
    from offtower.experiment.rows import ArmColumns, units_of_file, units_of_logs

    if (rows is None) == (new_log is None) or (new_log is None) != (current_log is None):
        raise ConfigError("name the rows: --rows, or both --new-log and --current-log")
    if rows is not None:
        columns = ArmColumns(new, current, arm, reward, time, user, window)
        units = partial(units_of_file, rows, columns)
    else:
        assert new_log is not None and current_log is not None, "checked before"
        units = partial(units_of_logs, new_log, current_log)
    reading = read_experiment(load_design(plan), units)
    if as_json:
        print_json(finite(reading.to_dict()))
    else:
        for line in describe(reading):
            messages().print(escape(line), soft_wrap=True)
    raise typer.Exit(reading.exit_code)
