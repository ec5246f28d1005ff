"""Search objective and settings by the lower bound of the value on the validation log.

With --workers trials run in parallel on Ray.

\b
Example:
  offtower tune configs/simulated.yaml --trials 12
  offtower train runs/simulated-tune/best.yaml
  offtower tune mine.yaml --trials 60 --ray auto --workers 16 --worker-cpus 4
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from offtower.cli.cluster import IN_PROCESS, RayOptions
from offtower.cli.common import (
    AsJson,
    DrawnProgress,
    Overrides,
    TrustCode,
    escape,
    messages,
    print_json,
    verb,
)
from offtower.jsonable import finite


@verb
def tune(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG")],
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option("--trials", help="Runs to train.", min=1)] = 20,
    space: Annotated[
        Path | None,
        typer.Option("--space", help="YAML file of dotted keys, each with a list of values."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished trials, and continue.")
    ] = False,
    trust_code: TrustCode = None,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Like --resume, also where another process runs this search; that one stops.",
        ),
    ] = False,
    ray: RayOptions = IN_PROCESS,
    as_json: AsJson = False,
) -> None:
    from offtower.config import load_config
    from offtower.training.checks import check_paths
    from offtower.training.tune import DEFAULT_SPACE, load_space
    from offtower.training.tune import tune as search

    console = messages()
    settings = load_config(config, overrides or [])
    check_paths(settings)
    with ray.execution(DrawnProgress()) as execution:
        found = search(
            settings,
            space=DEFAULT_SPACE if space is None else load_space(space),
            count=trials,
            resume=resume,
            take_over=take_over,
            execution=execution,
            say=lambda text: console.print(escape(text), soft_wrap=True),
        )
    if as_json:
        trials_best_first = [asdict(trial) for trial in found.trials]
        print_json(finite({"folder": str(found.folder), "trials": trials_best_first}))
        return
    best = found.best
    console.print(
        f"best is trial {best.number + 1}: its value is at least {best.low:.4f}, with all "
        f"{len(found.trials)} bounds at once"
    )
    console.print(f"its configuration: {found.folder / 'best.yaml'}")
