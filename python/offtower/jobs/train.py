"""Train on Ray Train.

Ray starts the workers, joins them in a process group and restarts them after a failure. Each runs
`train_claimed`, which resumes from the newest checkpoint. Every node must see the run directory
under the same path.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import socket
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from offtower import errors
from offtower.atomic import write_text
from offtower.config import Config, parse_config, to_dict
from offtower.errors import ClusterError, ConfigError, OfftowerError, RunError, StoppedError
from offtower.execution import LOCAL, Execution
from offtower.jobs.connect import absolute
from offtower.jobs.job_progress import (
    JobFollower,
    SharedProgress,
    WorkerInterruption,
    following,
    record_failures,
)
from offtower.jobs.resources import ResourceRequest, import_ray, require
from offtower.jobs.worker_errors import absent_paths, cause_of, check_seen, unseen
from offtower.jobs.worker_settings import WorkerSettings
from offtower.progress import Progress
from offtower.run_claim import ClaimedRun, claim_run, join_run
from offtower.run_directory import RunDirectory
from offtower.tracking import Tracker, numbers

_FAILURE = "failure.json"
"""In the job's own folder below the run: the error that ended the run on a worker. Restarted
workers return when they find it, and the driver raises it."""
_MAX_START_FAILURES = 5
"""Failed starts of a group of workers; the limit ends a job whose resources are gone."""


@dataclass(frozen=True)
class WorkerPlan:
    """Workers of a training job.

    Attributes:
        workers: their number, or (min, max): the job then continues without a lost node.
        cpus: of each worker, and its number of threads.
        gpus: of each worker, 0 or 1; None is 1 where training.device is cuda, else 0.
        max_failures: how often workers may be lost before the job ends with an error.
        timeout: seconds after which a worker that does not answer counts as lost.
        wait: seconds that the cluster may take to grow at the start.
        elastic_check: seconds between two checks for room for more workers.
    """

    workers: int | tuple[int, int] = 2
    cpus: float = 1.0
    gpus: int | None = None
    max_failures: int = 3
    timeout: float = 600.0
    wait: float = 0.0
    elastic_check: float = 60.0

    def __post_init__(self) -> None:
        low, high = self.range
        if not 1 <= low <= high:
            raise ConfigError(
                f"the number of workers must be at least 1, and a range rise: got {self.workers}"
            )

    @property
    def range(self) -> tuple[int, int]:
        """Minimum and maximum number of workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    def gpus_for(self, device: str) -> int:
        """Return the GPUs of each worker for a `training.device`.

        Raises:
            ConfigError: the device contradicts `gpus`, or is one GPU of several.
        """
        gpus = int(device.startswith("cuda")) if self.gpus is None else self.gpus
        if gpus not in (0, 1):
            raise ConfigError(
                f"--worker-gpus {gpus}: a worker trains on one GPU; take more workers with 1 each"
            )
        if ":" in device:
            raise ConfigError(
                f"training.device={device}: Ray assigns a GPU to each worker; set "
                "training.device=cuda"
            )
        if device != "auto" and gpus != int(device == "cuda"):
            raise ConfigError(
                f"training.device={device} and --worker-gpus {gpus} do not fit; omit one of them"
            )
        return gpus


def train_on_ray(
    config: Config,
    plan: WorkerPlan,
    *,
    resume: bool = False,
    take_over: bool = False,
    execution: Execution = LOCAL,
    mirror: str | None = None,
) -> dict[str, Any]:
    """Train as configured on the connected cluster, and return the run's manifest.

    This process holds the run's lease; workers check it before they write.

    Args:
        config: the run; relative paths are those of this process.
        resume, take_over, mirror: as in `train_run`.
        execution: reports progress, and may stop the workers, which then save their work.

    Raises:
        ClusterError: the cluster has no room, or workers were lost too often. The last checkpoint
            stays, and --resume goes on.
        LeaseError: another process writes to the run, or took it over.
        StoppedError: `execution.interruption` asked to stop.
        OfftowerError: the error of a worker.
    """
    gpus = plan.gpus_for(config.training.device)
    RunDirectory(config.run_directory).check(config, resume=resume or take_over)
    request = ResourceRequest(plan.range[0], plan.cpus, gpus)
    require(request, wait=plan.wait, progress=execution.progress)
    began = time.time()
    with claim_run(config, resume=resume, take_over=take_over, mirror=mirror) as run:
        _fit(config, plan, request, run, execution)
        manifest = run.manifest()
        run.update_manifest({"seconds_with_start": round(time.time() - began, 3)})
    return manifest


def _fit(
    config: Config,
    plan: WorkerPlan,
    request: ResourceRequest,
    run: ClaimedRun,
    execution: Execution,
) -> None:
    import_ray()
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    storage = absolute(run.path / "ray")
    name = f"train-{uuid.uuid4().hex[:12]}"  # Unique: Ray resumes a name that it finds.
    folder = Path(storage) / name
    folder.mkdir(parents=True)
    failure_path = folder / _FAILURE
    low, high = plan.range
    # Ray makes a worker's own GPU its current device.
    content, device = to_dict(config), "cuda" if request.gpus else "cpu"
    # Keyword mappings, since mypy sees other signatures of these classes than Ray 2.60 has.
    scaling: dict[str, Any] = {
        "num_workers": low if low == high else (low, high),
        "resources_per_worker": request.resources,
        "use_gpu": request.gpus > 0,
        "elastic_resize_monitor_interval_s": plan.elastic_check,
    }
    failures: dict[str, Any] = {
        "max_failures": plan.max_failures,
        "controller_failure_limit": _MAX_START_FAILURES,
    }
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "config": {**content, "training": {**content["training"], "device": device}},
            "worker": WorkerSettings.of(plan.cpus),
            "timeout": plan.timeout,
            "claim": run.key,
            "folder": str(folder),
        },
        scaling_config=train.ScalingConfig(**scaling),
        run_config=train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=train.FailureConfig(**failures),
            callbacks=[_failure_recorder(folder)],
        ),
        torch_config=TorchConfig(
            backend=backend_of(int(request.gpus)), timeout_s=max(1, math.ceil(plan.timeout))
        ),
    )
    follower = JobFollower(folder, request, execution)
    with (
        _quiet_ray_train(),
        following(follower),
        execution.interruption.deferred(lambda: follower.trains),
    ):
        try:
            trainer.fit()
        except Exception as error:
            raise _failure(failure_path) or _lost_error(error, plan, run) from error
    failure = _failure(failure_path)
    if failure is not None:
        raise failure


def backend_of(gpus: int) -> str:
    """Backends of the process group: NCCL for tensors on GPUs, gloo for those on the host."""
    return "cpu:gloo,cuda:nccl" if gpus else "gloo"


def _train_worker(settings: Mapping[str, Any]) -> None:
    """The training loop of one worker."""
    from offtower.training.run import train_claimed
    from offtower.training.workers import TorchWorkers, WorkerLostError

    folder = Path(settings["folder"])
    failure = folder / _FAILURE
    check_seen(folder)
    if failure.exists():
        return
    try:
        settings["worker"].apply()
        config = parse_config(settings["config"])
        workers = TorchWorkers(timedelta(seconds=settings["timeout"]))
        claimed = join_run(settings["claim"]) if workers.first else None
        with claimed or nullcontext(ClaimedRun(config.run_directory)) as run:
            train_claimed(
                run,
                config,
                resume=True,
                execution=Execution(
                    progress=SharedProgress(folder) if workers.first else Progress(),
                    interruption=WorkerInterruption(folder),
                ),
                workers=workers,
                trackers=[_RayReports(), _RayGauges()],
            )
    except StoppedError as stopped:
        # The workers end as if they had finished: Ray would start them again after an error.
        _store_failure(failure, stopped)
    except WorkerLostError:
        raise
    except (OfftowerError, OSError) as error:
        _store_failure(failure, error)
        raise
    except Exception as error:
        # A bug comes back after a restart: report it once, with its traceback.
        _store_failure(
            failure, RunError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        )
        raise


def _failure_recorder(folder: Path) -> Any:
    """A callback of the job's controller that records why workers failed."""
    from ray.train import UserCallback

    class Recorder(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: Any) -> None:
            record_failures(folder, worker_exceptions)

    return Recorder()


class _RayReports(Tracker):
    """Reports every epoch to Ray, which requires the same number of reports on every worker."""

    def write(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "epoch":
            from ray import train

            train.report({"step": line["step"], "epoch": line["epoch"], **dict(numbers(line))})


class _RayGauges(Tracker):
    """The first worker's metrics as gauges of Ray, for its dashboard and Prometheus."""

    def __init__(self) -> None:
        self._gauges: dict[str, Any] = {}

    def write(self, line: Mapping[str, Any]) -> None:
        from ray import train
        from ray.util.metrics import Gauge

        if train.get_context().get_world_rank() != 0:
            return
        for name, value in numbers(line):
            key = "offtower_" + name.replace("/", "_")
            if key not in self._gauges:
                self._gauges[key] = Gauge(key, description=f"{name} of a training run")
            self._gauges[key].set(value)


def _store_failure(path: Path, error: Exception) -> None:
    """Store the error that ended the run; the first one stays."""
    if not path.exists():
        with contextlib.suppress(OSError):
            content = {"kind": type(error).__name__, "message": str(error)}
            node = {"node": socket.gethostname(), "absent": absent_paths(error)}
            write_text(path, json.dumps({**content, **node}))


def _failure(path: Path) -> OfftowerError | None:
    """The stored error, as the class that it had on the worker where that is known."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
    elsewhere = unseen(content["node"], content["absent"], content["message"])
    if elsewhere is not None:
        return elsewhere
    kind = getattr(errors, content["kind"], RunError)
    if not (isinstance(kind, type) and issubclass(kind, OfftowerError)):
        kind = RunError
    try:
        return kind(content["message"])
    except TypeError:
        return RunError(content["message"])


def _lost_error(error: Exception, plan: WorkerPlan, run: RunDirectory) -> ClusterError:
    failures = getattr(error, "worker_failures", None)
    if failures:
        cause = "; ".join(f"worker {rank}: {cause_of(one)}" for rank, one in failures.items())
    else:
        cause = cause_of(getattr(error, "controller_failure", None) or error)
    checkpoints = sorted(run.checkpoints.glob("step_*"))
    resume = (
        f"Its newest checkpoint is {checkpoints[-1].name}: --resume goes on from there"
        if checkpoints
        else "It had no checkpoint yet"
    )
    return ClusterError(
        f"training '{run.path}' ended: its workers were lost more than {plan.max_failures} times, "
        f"or could not start ({cause}). {resume}. Where no cause is named, a node usually ran out "
        "of memory (docs/reference/cluster.md has the sizes) or was removed; --max-failures allows "
        "more"
    )


@contextmanager
def _quiet_ray_train() -> Iterator[None]:
    """Drop what Ray Train logs below the level of a warning."""
    loggers = [logging.getLogger(name) for name in ("ray.train", "ray.train.v2")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)
