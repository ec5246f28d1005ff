"""Train a two-tower policy from a log, as configured in a file.

With --workers training runs on Ray and gives the same policy up to rounding. With objective=auto
the candidates are trained in parallel and give exactly the same policy.

\b
Example:
  offtower train configs/quickstart/ips.yaml --set training.epochs=5
  offtower train mine.yaml --workers 4 --set training.strategy=item_sharded
  offtower train configs/daily.yaml --from runs/monday --log logs/tuesday --name tuesday
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from offtower.cli.cluster import (
    PANEL,
    RayAddress,
    RayOptions,
    RayWait,
    TrainingWorkers,
    WorkerCpus,
    WorkerGpus,
    cluster,
    worker_range,
)
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
from offtower.execution import Execution
from offtower.interruption import TerminationSignal
from offtower.jsonable import finite


@verb
def train(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.", metavar="CONFIG")],
    overrides: Overrides = None,
    from_run: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="RUN",
            help="Go on from the policy of this finished run: its encodings are extended, its "
            "weights and optimizer state mapped (incremental.from_run).",
        ),
    ] = None,
    log: Annotated[
        str | None, typer.Option(metavar="LOG", help="Training log (data.train).")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run (name).")] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume from the run's newest checkpoint, if it has one."),
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option(
            "--take-over",
            help="Like --resume, also where another process writes to the run; that one stops.",
        ),
    ] = False,
    mirror: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="Keep a copy of the run there (s3://bucket/runs, gs://..., file:///...); --resume "
            "fetches it if there is no local run.",
        ),
    ] = None,
    trust_code: TrustCode = None,
    ray: RayAddress = None,
    workers: TrainingWorkers = None,
    worker_cpus: WorkerCpus = 1.0,
    worker_gpus: WorkerGpus = None,
    worker_timeout: Annotated[
        float,
        typer.Option(
            min=1.0,
            metavar="SECONDS",
            help="A worker without an answer for this long is lost.",
            rich_help_panel=PANEL,
        ),
    ] = 600.0,
    max_failures: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often lost workers are restarted.",
            rich_help_panel=PANEL,
        ),
    ] = 3,
    ray_wait: RayWait = 0.0,
    as_json: AsJson = False,
) -> None:
    from offtower.config import load_config
    from offtower.jobs.train import WorkerPlan, train_on_ray
    from offtower.run_directory import RunDirectory
    from offtower.training.checks import check_run
    from offtower.training.device import describe_device, resolve_device
    from offtower.training.run import train_run

    given = {"incremental.from_run": from_run, "data.train": log, "name": name}
    named = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    settings = load_config(config, [*(overrides or []), *named])
    check_run(settings, resume=resume or take_over)
    progress, interruption = DrawnProgress(), TerminationSignal()
    claim: dict[str, Any] = {"resume": resume, "take_over": take_over, "mirror": mirror}
    execution = Execution(progress=progress, interruption=interruption)
    with interruption.installed():
        if ray is None and workers is None:
            device = resolve_device(settings.training.device)
            messages().print(f"training on {describe_device(device)}")
            train_run(settings, **claim, execution=execution)
        elif settings.objective.name == "auto":
            if worker_gpus:
                raise ConfigError(
                    "--worker-gpus: objective.name=auto trains its members on CPUs if it has "
                    "workers; remove the option, or name an objective"
                )
            most = None if workers is None else WorkerPlan(worker_range(workers)).range[1]
            on_ray = RayOptions(ray, most, worker_cpus, 0.0, ray_wait)
            with on_ray.execution(progress) as on_workers:
                train_run(settings, **claim, execution=on_workers)
        else:
            plan = WorkerPlan(
                worker_range(workers or "2"),
                worker_cpus,
                worker_gpus,
                max_failures,
                worker_timeout,
                ray_wait,
            )
            gpus = plan.gpus_for(settings.training.device)
            messages().print(f"learning on Ray, {'a GPU' if gpus else 'no GPU'} for each worker")
            with cluster(ray, plan.range[1], worker_cpus):
                train_on_ray(settings, plan, **claim, execution=execution)
    result = RunDirectory(settings.run_directory).manifest()
    if as_json:
        names = (
            *("epochs", "steps", "selected_step", "validation_lower_bound", "stopped_early"),
            "workers",
        )
        found = {name: result[name] for name in names}
        found |= {name: result.get(name) for name in ("chosen", "advice")}
        print_json(finite({"run": str(settings.run_directory), **found}))
        return
    console = messages()
    stopped = ", stopped early" if result["stopped_early"] else ""
    of = "" if result.get("chosen") is None else f" of {result['chosen']}"
    console.print(f"{result['epochs']} epochs, {result['steps']:,} steps{of}{stopped}")
    if result.get("chosen") is not None:
        console.print(
            f"auto chose {result['chosen']}: on rows that it did not learn from its value is at "
            f"least {result['validation_lower_bound']:.4f} (lower bound); all candidates are in "
            "manifest.json"
        )
        if result.get("advice") is not None:
            console.print(f"[yellow]{escape(result['advice'])}[/]")
    elif result["validation_lower_bound"] is not None:
        console.print(
            f"kept step {result['selected_step']:,}: the value on the validation log is at least "
            f"{result['validation_lower_bound']:.4f} (a bound for the best of all validations)"
        )
    console.print(f"policy in {settings.run_directory / 'policy'}")
