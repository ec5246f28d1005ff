"""Training on Ray Train: its workers, their failures, and one clear end.

Ray starts the workers, joins them in a process group and starts them again after a failure; all
else is `train_run`, which goes on from the run's newest checkpoint. The run directory must be on
storage that every node sees under the same path.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from offtower.atomic import write_text
from offtower.config import Config, parse_config, to_dict
from offtower.errors import ClusterError, ConfigError, OfftowerError, RunError
from offtower.imports import TRUST_CODE
from offtower.jobs.connect import absolute, import_ray, require
from offtower.jobs.mapper import settle
from offtower.metrics import read_metrics
from offtower.progress import Progress
from offtower.run_claim import ClaimedRun, claim_run, join_run
from offtower.run_directory import RunDirectory
from offtower.tracking import Tracker, numbers

logger = logging.getLogger("offtower.jobs")

_FAILURE = "failure.json"
"""In the job's own folder below the run: the error that ended the run on a worker. Restarted
workers return when they find it, and the driver raises it."""
_STARTS = 5
"""How often a group of workers may fail to start, so that resources that went away are told."""


@dataclass(frozen=True)
class WorkerPlan:
    """What training asks of the cluster.

    Attributes:
        workers: how many, or the least and the most: then a lost node is done without until
            another comes.
        cpus: of each worker, and its threads.
        gpus: of each worker, 0 or 1; None is 1 where training.device is cuda, else 0.
        max_failures: how often workers may be lost before the run ends with an error.
        timeout: seconds after which a worker that does not answer counts as lost.
        wait: seconds that the cluster may take to grow at the start.
        elastic_check: seconds between two looks for room for more workers.
    """

    workers: int | tuple[int, int] = 2
    cpus: float = 1.0
    gpus: int | None = None
    max_failures: int = 3
    timeout: float = 600.0
    wait: float = 0.0
    elastic_check: float = 60.0

    def __post_init__(self) -> None:
        least, most = self.range
        if not 1 <= least <= most:
            raise ConfigError(
                f"the number of workers must be at least 1, and a range rise: got {self.workers}"
            )

    def gpus_for(self, device: str) -> int:
        """GPUs of each worker, where the configuration has this `training.device`.

        Raises:
            ConfigError: the two contradict each other.
        """
        gpus = int(device.startswith("cuda")) if self.gpus is None else self.gpus
        if gpus not in (0, 1):
            raise ConfigError(
                f"--worker-gpus {gpus}: a worker learns on one GPU; take more workers with 1 each"
            )
        if ":" in device:
            raise ConfigError(
                f"training.device={device}: Ray gives each worker its GPU, so name none: "
                "training.device=cuda"
            )
        if device != "auto" and gpus != int(device == "cuda"):
            raise ConfigError(
                f"training.device={device} and --worker-gpus {gpus} do not fit; leave one of them "
                "away"
            )
        return gpus

    @property
    def range(self) -> tuple[int, int]:
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)


def train_on_ray(
    config: Config,
    plan: WorkerPlan,
    *,
    resume: bool = False,
    take_over: bool = False,
    progress: Progress | None = None,
    mirror: str | None = None,
) -> dict[str, Any]:
    """Train as configured on the cluster that this process is connected to.

    This process holds the run's lease; workers check it before they write.

    Args:
        config: the run; relative paths are those of this process.
        plan: workers and what each gets.
        resume, take_over, mirror: as in `train_run`.
        progress: drawn from the run's metrics.

    Returns:
        The run's manifest.

    Raises:
        ClusterError: the cluster has no room, or workers were lost too often. The last checkpoint
            stays, and --resume goes on.
        LeaseError: another process writes to the run, or took it over.
        OfftowerError: what ended the training on the workers, as one process would have said it.
    """
    progress = progress or Progress()
    gpus = plan.gpus_for(config.training.device)
    RunDirectory(config.run_directory).check(config, resume=resume or take_over)
    least, _ = plan.range
    require(least, plan.cpus, gpus, wait=plan.wait, progress=progress)
    began = time.time()
    with claim_run(config, resume=resume, take_over=take_over, mirror=mirror) as run:
        with _drawn(run, config, progress):
            _fit(config, plan, gpus, run)
        manifest = run.manifest()
        run.update_manifest({"seconds_with_start": round(time.time() - began, 3)})
    return manifest


def _fit(config: Config, plan: WorkerPlan, gpus: int, run: ClaimedRun) -> None:
    import_ray()
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    storage = absolute(run.path / "ray")
    # A name of its own: Ray would take an equal one for a run to be resumed by its rules.
    name = f"train-{uuid.uuid4().hex[:12]}"
    failure_path = Path(storage) / name / _FAILURE
    # Ray makes a worker's own GPU its current one.
    content, device = to_dict(config), "cuda" if gpus else "cpu"
    least, most = plan.range
    # Mappings, since what these classes take is decided when Ray is imported.
    scaling: dict[str, Any] = {
        "num_workers": least if least == most else (least, most),
        "resources_per_worker": {"CPU": plan.cpus, **({"GPU": gpus} if gpus else {})},
        "use_gpu": gpus > 0,
        "elastic_resize_monitor_interval_s": plan.elastic_check,
    }
    failures: dict[str, Any] = {
        "max_failures": plan.max_failures,
        "controller_failure_limit": _STARTS,
    }
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "config": {**content, "training": {**content["training"], "device": device}},
            "folder": os.getcwd(),
            "trust_code": os.environ.get(TRUST_CODE, ""),
            "threads": max(1, math.floor(plan.cpus)),
            "timeout": plan.timeout,
            "claim": run.key,
            "failure": str(failure_path),
        },
        scaling_config=train.ScalingConfig(**scaling),
        run_config=train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=train.FailureConfig(**failures),
        ),
        torch_config=TorchConfig(
            backend=backend_of(gpus), timeout_s=max(1, math.ceil(plan.timeout))
        ),
    )
    with _quiet():
        try:
            trainer.fit()
        except Exception as error:
            failure = _failure(failure_path)
            if failure is not None:
                raise failure from error
            raise ClusterError(_lost(error, plan, run)) from error
    failure = _failure(failure_path)
    if failure is not None:
        raise failure


def backend_of(gpus: int) -> str:
    """The process group's backends: tensors of GPUs by NCCL, the host's few numbers by gloo."""
    return "cpu:gloo,cuda:nccl" if gpus else "gloo"


def _work(settings: Mapping[str, Any]) -> None:
    """What each worker runs."""
    from offtower.training.distributed import TorchWorkers
    from offtower.training.distributed.workers import WorkerLostError
    from offtower.training.run import train_claimed

    settle(settings["folder"], settings["threads"], settings["trust_code"])
    config, failure = parse_config(settings["config"]), Path(settings["failure"])
    if failure.exists():
        return
    workers = TorchWorkers(timedelta(seconds=settings["timeout"]))
    claimed = join_run(settings["claim"]) if workers.first else None
    try:
        with claimed or nullcontext(ClaimedRun(config.run_directory)) as run:
            train_claimed(
                run, config, resume=True, workers=workers, trackers=[_Reports(), _Gauges()]
            )
    except WorkerLostError:
        raise
    except (OfftowerError, OSError) as error:
        _report_failure(failure, error)
        raise
    except Exception as error:
        # A bug comes back after a restart: report it once, with its traceback.
        _report_failure(
            failure, RunError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        )
        raise


class _Reports(Tracker):
    """Tells Ray of every epoch; every worker calls it as often as the others."""

    def write(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "epoch":
            from ray import train

            train.report({"step": line["step"], "epoch": line["epoch"], **dict(numbers(line))})


class _Gauges(Tracker):
    """The first worker's numbers as metrics of Ray, for its dashboard and Prometheus."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def write(self, line: Mapping[str, Any]) -> None:
        from ray import train
        from ray.util.metrics import Gauge

        context = train.get_context()
        if context.get_world_rank() != 0:
            return
        for name, value in numbers(line):
            key = "offtower_" + name.replace("/", "_")
            if key not in self._gauges:
                self._gauges[key] = Gauge(key, description=f"{name} of a training run")
            self._gauges[key].set(value)


def _report_failure(path: Path, error: Exception) -> None:
    """Store what ended the run; the first error stays."""
    if path.exists():
        return
    with contextlib.suppress(OSError):
        write_text(path, json.dumps({"kind": type(error).__name__, "message": str(error)}))


def _failure(path: Path) -> OfftowerError | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    from offtower import errors

    kind = getattr(errors, content["kind"], RunError)
    known = isinstance(kind, type) and issubclass(kind, OfftowerError)
    try:
        return (kind if known else RunError)(content["message"])
    except TypeError:
        return RunError(content["message"])


def _lost(error: Exception, plan: WorkerPlan, run: RunDirectory) -> str:
    cause: BaseException = error
    failures = getattr(error, "worker_failures", None)
    if failures:
        said = "; ".join(f"worker {rank}: {_first_line(e)}" for rank, e in failures.items())
    else:
        said = _first_line(getattr(error, "controller_failure", None) or cause)
    checkpoints = sorted(run.checkpoints.glob("step_*")) if run.checkpoints.exists() else []
    left = (
        f"Its newest checkpoint is {checkpoints[-1].name}: --resume goes on from there"
        if checkpoints
        else "It had no checkpoint yet"
    )
    return (
        f"training '{run.path}' ended: its workers were lost more than {plan.max_failures} times, "
        f"or could not start ({said}). {left}. Most often a node's memory did not do (docs/"
        "cluster.md has the sizes), or nodes went away; --max-failures allows more"
    )


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__)[:300]


@contextmanager
def _drawn(run: RunDirectory, config: Config, progress: Progress) -> Iterator[None]:
    """Draws the run's progress from its metrics while the workers train."""
    done = threading.Event()

    def follow() -> None:
        shown = 0
        while not done.wait(1.0):
            with contextlib.suppress(OSError, ValueError):
                lines = [m for m in read_metrics(run.metrics_path) if m["kind"] == "epoch"]
                if len(lines) > shown:
                    loss = lines[-1]["loss"]
                    progress.advance(len(lines) - shown, f"loss {loss:.4f}")
                    shown = len(lines)

    progress.start("training on Ray: epochs", config.training.epochs)
    thread = threading.Thread(target=follow, name="offtower-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        progress.finish()


@contextmanager
def _quiet() -> Iterator[None]:
    """Ray Train's notes at each start are no news."""
    names = ("ray.train", "ray.train.v2")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
