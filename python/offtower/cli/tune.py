"""Search objective and settings by the lower bound of the value on the validation log.

Trials with low bounds are stopped early. With --workers trials run in parallel on Ray, and the
same one is chosen.

\b
Example:
  offtower tune configs/simulated.yaml --trials 12
  offtower train runs/simulated-tune/best.yaml
  offtower tune mine.yaml --trials 60 --ray auto --workers 16 --worker-cpus 4
  offtower tune mine.yaml --set training.device=cuda --ray auto --workers 8
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from offtower.cli.cluster import IN_PROCESS, RayOptions, WorkerGpus
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
from offtower.errors import ConfigError
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
    reduction_factor: Annotated[
        int,
        typer.Option(
            "--reduction-factor",
            min=1,
            help="One in this many trials is trained further at each rung, the others are stopped; "
            "1 trains all to the end.",
        ),
    ] = 3,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a search, to the same choice.")
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
    worker_gpus: WorkerGpus = None,
    as_json: AsJson = False,
) -> None:
    from offtower.config import load_config
    from offtower.jobs.train import WorkerPlan
    from offtower.training.checks import check_paths
    from offtower.training.tune import DEFAULT_SPACE, Search, load_space
    from offtower.training.tune import tune as run_search

    console = messages()
    settings = load_config(config, overrides or [])
    check_paths(settings)
    search = Search(DEFAULT_SPACE if space is None else load_space(space), trials, reduction_factor)
    on_ray = ray.ray is not None or ray.workers is not None
    gpus = WorkerPlan(gpus=worker_gpus).gpus_for(settings.training.device) if on_ray else 0
    if worker_gpus and not on_ray:
        raise ConfigError(
            "--worker-gpus is an option of --ray; add --ray local, auto or an ADDRESS"
        )
    with ray.execution(DrawnProgress(), gpus) as execution:
        found = run_search(
            settings,
            search,
            resume=resume,
            take_over=take_over,
            execution=execution,
            say=lambda text: console.print(escape(text), soft_wrap=True),
        )
    if as_json:
        trials_best_first = [asdict(trial) for trial in found.trials]
        content = {"folder": str(found.folder), "epochs": found.epochs, "trials": trials_best_first}
        print_json(finite(content))
        return
    best = found.best
    console.print(
        f"best is trial {best.number + 1}: its value is at least {best.low:.4f}, with all "
        f"{len(found.trials)} bounds at once"
    )
    stopped = sum(trial.stopped for trial in found.trials)
    if stopped:
        trained = sum(trial.epochs for trial in found.trials)
        console.print(
            f"{stopped} trials were stopped early: {trained:,} epochs instead of up to "
            f"{found.epochs:,}"
        )
    console.print(f"its configuration: {found.folder / 'best.yaml'}")
