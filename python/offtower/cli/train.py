"""Train a two-tower policy from a log, as a configuration file says.

\b
Example:
  offtower train configs/quickstart/ips.yaml --set training.epochs=5
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from offtower.cli.common import (
    AsJson,
    DrawnProgress,
    Overrides,
    messages,
    print_json,
    verb,
)
from offtower.jsonable import finite


@verb
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG")],
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the run's newest checkpoint, if it has one."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    from offtower.config import load_config
    from offtower.training.run import train_run

    settings = load_config(config, overrides or [])
    result = train_run(settings, resume=resume, progress=DrawnProgress())
    if as_json:
        print_json(
            finite(
                {
                    "run": str(settings.run_directory),
                    "epochs": result.epochs,
                    "steps": result.steps,
                    "selected_step": result.selected_step,
                    "validation_lower_bound": result.validation,
                    "chosen": result.chosen,
                    "stopped_early": result.stopped_early,
                }
            )
        )
        return
    console = messages()
    stopped = ", stopped early" if result.stopped_early else ""
    console.print(f"{result.epochs} epochs, {result.steps:,} steps{stopped}")
    if result.chosen is not None:
        console.print(
            f"auto chose {result.chosen}: on rows that it did not learn from its value is at least "
            f"{result.validation:.4f} (lower bound); all candidates are in manifest.json"
        )
    elif result.validation is not None:
        console.print(
            f"kept step {result.selected_step:,}: the value on the validation log is at least "
            f"{result.validation:.4f} (lower end of its interval)"
        )
    console.print(f"policy in {settings.run_directory / 'policy'}")
