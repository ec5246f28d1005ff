"""Whole runs on several workers: the same policy as on one, through kills and other numbers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp

from offtower.config import Config
from offtower.data.catalogue import Catalogue
from offtower.data.encoding import to_tensors
from offtower.data.log import ParquetLog
from offtower.data.reader import scan
from offtower.errors import ConfigError, DataError, RunError, StoppedError
from offtower.execution import Execution
from offtower.metrics import read_metrics
from offtower.models.items import ItemFeatures
from offtower.models.store import load_policy
from offtower.training.distributed.item_shard import item_range
from offtower.training.run import train_run
from offtower.training.workers import SINGLE_PROCESS, Workers
from tests.training.conftest import EVERY_STEP, make_config
from tests.training.distributed.processes import START, run_workers
from tests.training.test_resume import StopAfter, assert_same_policy

STRATEGIES = ("replicated", "item_sharded")


def config_of(folder: Path, runs: Path, name: str, strategy: str, *more: str) -> Config:
    return make_config(
        folder,
        runs,
        name,
        f"training.strategy={strategy}",
        "training.epochs=2",
        "policy.item_bias=true",
        *more,
    )


def train(workers: Workers, config: Config, resume: bool = False) -> None:
    made: list[Any] = []
    make = workers.exchange_of_readers
    setattr(workers, "exchange_of_readers", lambda: (made.append(make()), made[-1])[1])  # noqa: B010
    train_run(config, resume=resume, workers=workers)
    # The group of a training's readers does not outlive it.
    groups = dist.distributed_c10d._world.pg_map
    assert len(made) == 1 and all(one is None or one._group not in groups for one in made)


@pytest.fixture(scope="module")
def one_process(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = config_of(simulated, tmp_path_factory.mktemp("one"), "one", "replicated")
    train_run(config)
    return config.run_directory


@pytest.fixture(scope="module")
def on_two(simulated: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Uninterrupted runs on two workers, by strategy."""
    runs = tmp_path_factory.mktemp("two")
    found = {}
    for strategy in STRATEGIES:
        config = config_of(simulated, runs, strategy, strategy)
        run_workers(2, train, config)
        found[strategy] = config.run_directory
    return found


def train_until_stopped(workers: Workers, config: Config) -> None:
    """One worker is asked to stop after its seventh step, and all do."""
    execution = Execution(interruption=StopAfter(7 if workers.rank == 1 else 1_000_000))
    with pytest.raises(StoppedError, match="after step 7;"):
        train_run(config, workers=workers, execution=execution)


def test_a_stop_of_one_worker_stops_all_with_a_checkpoint(
    simulated: Path, tmp_path: Path, on_two: dict[str, Path]
) -> None:
    config = config_of(simulated, tmp_path, "a", "item_sharded")
    run_workers(2, train_until_stopped, config)
    run_workers(2, train, config, True)
    assert_same_policy(config.run_directory, on_two["item_sharded"])


def log_probs(run: Path, data: Path) -> Any:
    """(rows, items) log pi of the test log's contexts."""
    policy, _ = load_policy(run / "policy")
    catalogue = Catalogue.open(data / "catalogue")
    log = ParquetLog.open(data / "test")
    items = ItemFeatures.from_catalogue(catalogue, policy.item_encoding)
    rows = next(iter(scan(log, catalogue, policy.context_encoding, 300)))
    with torch.no_grad():
        u = policy.embed_contexts(to_tensors(rows.context)).double()
        v = policy.embed_items(items)
        assert v.bias is not None
        scores = u @ v.embedding.double().T / policy.temperature + v.bias
    return torch.log_softmax(scores, dim=1)


def assert_near(one: Path, two: Path, data: Path) -> None:
    """The same policy. Weights that shift all logits alike have gradients of pure rounding, which
    Adam magnifies to full steps: they are compared by what they do."""
    a, b = log_probs(one, data), log_probs(two, data)
    assert float((a.exp() - 1 / 14).abs().max()) > 0.02
    torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE)


TOLERANCE = 2e-4
"""Largest difference of a log-probability after 44 steps."""


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_workers_train_the_policy_of_one(
    simulated: Path, one_process: Path, on_two: dict[str, Path], strategy: str
) -> None:
    assert_near(one_process, on_two[strategy], simulated)
    mine, theirs = (read_metrics(p / "metrics.jsonl") for p in (one_process, on_two[strategy]))
    assert [line["kind"] for line in mine] == [line["kind"] for line in theirs]
    for a, b in zip(mine, theirs, strict=True):
        for key in ("step", "epoch"):
            assert a[key] == b[key]
        for key in ("loss", "value_estimate", "entropy", "effective_sample_size"):
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-6), key
        if "validation" in a:
            assert a["validation"].pop("estimator") == b["validation"].pop("estimator")
            assert a["validation"] == pytest.approx(b["validation"], rel=1e-4)
    manifest = json.loads((on_two[strategy] / "manifest.json").read_text())
    assert manifest["workers"] == 2


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_on_other_numbers_of_workers(
    simulated: Path,
    tmp_path: Path,
    one_process: Path,
    strategy: str,
) -> None:
    """2 -> 1 -> 3 workers, stopped inside epochs: the one-process policy, to rounding."""
    config = config_of(simulated, tmp_path, "a", strategy, EVERY_STEP)
    run_workers(2, train_until, config, 7)
    train_until(SINGLE_PROCESS, config, 25)
    run_workers(3, train_until, config, None)
    assert_near(config.run_directory, one_process, simulated)
    steps = [m["step"] for m in read_metrics(config.run_directory / "metrics.jsonl")]
    assert steps == sorted(steps)


class _Stop(Exception):
    pass


def train_until(workers: Workers, config: Config, stop: int | None) -> None:
    """Stop once `stop` steps are in a checkpoint that has its name."""
    from offtower.training import run as runs
    from offtower.training.checkpoints import CheckpointStore

    class Stopping(CheckpointStore):
        def save(self, policy: Any, optimizer: Any, progression: Any, extra: Any = None) -> None:
            super().save(policy, optimizer, progression, extra)
            self.finish()
            if stop is not None and progression.step >= stop:
                raise _Stop

    runs.CheckpointStore = Stopping  # type: ignore[misc]
    try:
        train_run(config, resume=True, workers=workers)
        assert stop is None
    except _Stop:
        pass
    finally:
        runs.CheckpointStore = CheckpointStore  # type: ignore[misc]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_workers(
    simulated: Path, tmp_path: Path, on_two: dict[str, Path], strategy: str
) -> None:
    """One of two workers is killed twice; the other ends with an error at once, never hangs; the
    resumed run ends with the same bits."""
    config = config_of(simulated, tmp_path, strategy, strategy, EVERY_STEP)
    for kill in range(3):
        checkpoints = config.run_directory / "checkpoints"
        before = len(list(checkpoints.glob("step_*"))) and max(
            path.name for path in checkpoints.glob("step_*")
        )
        context = mp.start_processes(
            _start, (config, tmp_path / f"port{kill}"), nprocs=2, join=False, start_method=START
        )
        if kill < 2:
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline:
                names = [path.name for path in checkpoints.glob("step_*")]
                if names and max(names) != before:
                    break
                time.sleep(0.01)
            os.kill(context.processes[kill].pid, signal.SIGKILL)
            began = time.monotonic()
            for process in context.processes:
                process.join(30)
            assert time.monotonic() - began < 30
            assert context.processes[kill].exitcode == -signal.SIGKILL
            assert context.processes[1 - kill].exitcode == 1
        else:
            for process in context.processes:
                process.join(120)
            assert [process.exitcode for process in context.processes] == [0, 0]
    assert_same_policy(config.run_directory, on_two[strategy])


def _start(rank: int, config: Config, rendezvous: Path) -> None:
    import torch
    import torch.distributed as dist

    from offtower.training.workers import TorchWorkers
    from tests.training.distributed.processes import TIMEOUT

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2, timeout=TIMEOUT
    )
    train_run(config, resume=True, workers=TorchWorkers(TIMEOUT))
    dist.destroy_process_group()


def test_a_damaged_checkpoint_is_passed_over(
    simulated: Path, tmp_path: Path, on_two: dict[str, Path]
) -> None:
    """The newest has a flipped byte: the run goes on from the one before, and says so."""
    config = config_of(simulated, tmp_path, "item_sharded", "item_sharded", EVERY_STEP)
    run_workers(2, train_until, config, 9)
    newest = sorted((config.run_directory / "checkpoints").glob("step_*"))[-1]
    file = sorted(newest.glob("*.safetensors"))[-1]
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    run_workers(2, train, config, True)
    assert_same_policy(config.run_directory, on_two["item_sharded"])
    manifest = json.loads((config.run_directory / "manifest.json").read_text())
    assert manifest["checkpoints_skipped"] == [f"{newest.name}: {file.name} is damaged"]


def test_a_full_disk(simulated: Path, tmp_path: Path, on_two: dict[str, Path]) -> None:
    """One worker cannot write its part: all stop with the same error, older checkpoints stay, and
    the run goes on from them."""
    config = config_of(simulated, tmp_path, "item_sharded", "item_sharded", EVERY_STEP)
    run_workers(2, train_with_full_disk, config)
    folder = config.run_directory / "checkpoints"
    assert not list(folder.glob(".*.partial"))
    assert sorted(folder.glob("step_*"))
    run_workers(2, train, config, True)
    assert_same_policy(config.run_directory, on_two["item_sharded"])


def train_with_full_disk(workers: Workers, config: Config) -> None:
    real, calls = dcp.async_save, []

    def full(state: Any, **arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 6 and workers.rank == 1:
            arguments["storage_writer"].fs = _FullDisk(arguments["storage_writer"].fs)
        return real(state, **arguments)

    dcp.async_save = full
    with pytest.raises(RunError, match=r"worker 1: .*No space left.*go on with --resume"):
        train_run(config, workers=workers)


class _FullDisk:
    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def create_stream(self, *arguments: Any, **keywords: Any) -> Any:
        raise OSError(28, "No space left on device")


def test_too_few_items_are_refused() -> None:
    assert [item_range(14, rank, 5) for rank in (0, 3, 4)] == [(0, 3), (9, 12), (12, 14)]
    with pytest.raises(ConfigError, match="14 items cannot be spread over 6 workers with 3 each"):
        item_range(14, 0, 6)


def test_an_error_of_the_first_worker_reaches_all(simulated: Path, tmp_path: Path) -> None:
    config = config_of(simulated, tmp_path, "bad", "replicated", "data.train=nowhere")
    run_workers(2, fails, config)


def fails(workers: Workers, config: Config) -> None:
    # On every worker: which of them tells the driver of it first is a matter of luck.
    with pytest.raises(DataError, match="nowhere"):
        train_run(config, workers=workers)


def test_the_same_workers_give_the_same_bits(
    simulated: Path, tmp_path: Path, on_two: dict[str, Path]
) -> None:
    config = config_of(simulated, tmp_path, "item_sharded", "item_sharded")
    run_workers(2, train, config)
    assert_same_policy(config.run_directory, on_two["item_sharded"])
    shutil.rmtree(config.run_directory)


def test_long_work_of_the_first_worker_is_waited_for() -> None:
    """Longer than the group's timeout: signs of life keep the others waiting."""
    run_workers(2, waits, timeout=timedelta(seconds=3))


def waits(workers: Workers) -> None:
    from offtower.training import workers as module

    module._HEARTBEAT = 0.5
    began = time.monotonic()
    workers.on_first(lambda: time.sleep(6))
    assert time.monotonic() - began > 5
    with pytest.raises(RunError, match="too late"):
        workers.on_first(_fail)


def _fail() -> None:
    raise RunError("too late")
