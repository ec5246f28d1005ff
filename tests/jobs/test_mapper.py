"""The mapper on Ray: order of results, lost workers, errors for users."""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from offtower.data.check import BadRow, BadRowsError
from offtower.errors import ClusterError, DataError
from offtower.jobs.mapper import RayMapper, ray_mapper
from offtower.jobs.tensors import _pack, _unpack

pytestmark = pytest.mark.ray


def square(number: int) -> int:
    return number * number


def die_once(folder: Path, number: int) -> int:
    """Kills its own process the first time that part 2 runs."""
    mark = folder / "died"
    if number == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def refuse(number: int) -> int:
    if number == 1:
        row = BadRow("a.parquet", 0, 3, 3, "reward", "nan", "NaN", "a number")
        raise BadRowsError([row], Counter({("reward", "NaN"): 1}))
    if number == 3:
        raise DataError("part 3 is bad too, but not the first")
    return number


def full_disk(number: int) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/full/part.parquet")


def bug(number: int) -> int:
    raise ZeroDivisionError("a bug")


def test_results_come_in_the_order_of_the_parts(ray_cluster: str) -> None:
    assert list(RayMapper(3).map(square, range(40))) == [n * n for n in range(40)]
    assert list(RayMapper(3).map(square, [])) == []


def test_a_lost_worker_is_replaced_and_its_part_runs_again(
    ray_cluster: str, tmp_path: Path
) -> None:
    assert list(RayMapper(2).map(partial(die_once, tmp_path), range(5))) == list(range(5))
    assert (tmp_path / "died").exists()


def test_a_worker_that_is_lost_too_often_is_an_error(ray_cluster: str) -> None:
    with pytest.raises(ClusterError, match=r"evaluating: the worker of part [01] was lost 2 times"):
        list(RayMapper(2, retries=1).map(die, range(2), "evaluating"))


def test_retries_for_lack_of_memory_are_not_counted_as_ours() -> None:
    ray = pytest.importorskip("ray")
    error = RayMapper(2)._lost_error("evaluating", 1, ray.exceptions.OutOfMemoryError("killed"))
    assert "the worker of part 1 was lost repeatedly (OutOfMemoryError: killed)" in str(error)


def test_the_first_error_in_order_is_raised_unchanged(ray_cluster: str) -> None:
    with pytest.raises(BadRowsError, match="1 bad value in the log") as caught:
        list(RayMapper(4).map(refuse, range(6)))
    assert caught.value.rows[0].row == 3 and caught.value.counts == {("reward", "NaN"): 1}


def test_a_full_disk_keeps_its_file_and_number(ray_cluster: str) -> None:
    with pytest.raises(OSError) as caught:
        list(RayMapper(2).map(full_disk, range(3)))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/full/part.parquet")


def test_a_bug_keeps_its_traceback(ray_cluster: str) -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(RayMapper(2).map(bug, range(3)))


def total(array: np.ndarray, tensor: torch.Tensor, number: int) -> float:
    return float(array.sum() + tensor.double().sum()) + number


def test_large_arrays_and_tensors_arrive_whole(ray_cluster: str) -> None:
    tensor = torch.arange(600_000, dtype=torch.float32)
    with ray_mapper("local", 2) as mapper:
        found = list(mapper.map(partial(total, np.ones(400_000), tensor), [0, 1]))
    assert found == [float(tensor.double().sum()) + 400_000 + n for n in (0, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_tensors_keep_their_bits(dtype: torch.dtype) -> None:
    for size in (3, 1 << 20):
        tensor = torch.arange(size).to(dtype).view(-1, 1)
        assert torch.equal(_unpack(_pack(tensor)), tensor)
