"""The processes of one run and their collectives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from offtower.data.order import rank_slice
from offtower.data.shared_windows import Exchange
from offtower.errors import OfftowerError, RunError

Value = TypeVar("Value")

# The name until torch 2.12.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


_HEARTBEAT = 5.0
"""Seconds between heartbeats while the others wait for the first worker."""


_ALIGNMENT = 64
"""Bytes."""


class WorkerLostError(RunError):
    """A collective did not complete."""


class Workers:
    """A run in one process, in which every collective is the identity.

    `TorchWorkers` implements the same on several processes. All methods except properties, `rows`
    and `counts` are collective: every worker calls them in the same order.
    """

    rank = 0
    size = 1

    @property
    def first(self) -> bool:
        """Whether this worker writes the shared files."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the workers, bit-identical on each; not differentiable."""
        return tensor

    def maximum(self, tensor: Tensor) -> Tensor:
        """Elementwise maximum over the workers."""
        return tensor

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """(n_k, ...) rows of each worker -> (sum of n_k, ...), in the order of ranks.

        Args:
            counts: n_k of each worker.
        """
        return rows

    def exchange(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """(sum of n_k, ...) of each worker -> (workers, n_k, ...): all workers' versions of this
        worker's n_k rows."""
        return rows[None]

    def scatter_sum(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """(sum of n_k, ...) of each worker -> this worker's n_k rows, summed over workers."""
        parts = self.exchange(rows, counts)
        if len(parts) == 1:
            return parts[0]
        # In the order of ranks, so that the bits do not depend on the order of messages.
        total = parts[0].clone()
        for part in parts[1:]:
            total += part
        return total

    def gather_objects(self, value: Value) -> list[Value]:
        """Small objects of all workers, in the order of ranks."""
        return [value]

    def gather_to_first(self, value: Value) -> list[Value]:
        """Objects of all workers, in the order of ranks, on the first; empty on the others."""
        return [value]

    def broadcast(self, value: Value) -> Value:
        """A small object of the first worker."""
        return value

    def barrier(self) -> None:
        """Wait for all workers."""

    def on_first(self, work: Callable[[], object]) -> None:
        """Run `work` on the first worker while the others wait, without a timeout.

        An error is raised on all workers.
        """
        work()

    def on_each(self, work: Callable[[], object]) -> None:
        """Run `work`, which sends no messages, on all workers, without a timeout.

        When all have ended, the error of the first worker that failed is raised on all.
        """
        work()

    def first_then_all(self, work: Callable[[], Value]) -> Value:
        """Run `work` on the first worker and then on the others, which find the files that it
        wrote. An error of the first worker is raised on all."""
        return work()

    def exchange_of_readers(self) -> Exchange | None:
        """Messages between the threads that read the log on all workers, to be closed after use;
        None for one worker."""
        return None

    def rows(self, total: int) -> slice:
        """This worker's slice of `total` rows."""
        return rank_slice(total, self.rank, self.size)

    def counts(self, total: int) -> list[int]:
        """Number of rows of each worker, out of `total`."""
        parts = [rank_slice(total, rank, self.size) for rank in range(self.size)]
        return [part.stop - part.start for part in parts]


SINGLE_PROCESS = Workers()
"""A run in this process alone."""


class TorchWorkers(Workers):
    """The workers of a torch.distributed process group.

    Sums are bit-identical on every worker, and in every repetition with the same number of workers.

    Args:
        timeout: of the process group, for the message.
        group: the default group where None; else one whose first member is process 0.
        readers: another group of the same processes, for what their readers send each other. Where
            None, each use makes one, which all processes of the default group must take part in.

    Raises:
        WorkerLostError: from every method, if another worker died or timed out.
    """

    def __init__(
        self,
        timeout: timedelta | None = None,
        group: dist.ProcessGroup | None = None,
        readers: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._timeout = timeout
        self._group = group
        self._readers = readers

    def sum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def maximum(self, tensor: Tensor) -> Tensor:
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        # Padded to equal sizes; parts of a batch differ by at most one row.
        most = max(counts)
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        whole = rows.new_empty((self.size, *padded.shape))
        self._call(
            "gathering rows",
            lambda: _all_gather(whole.view(-1, *rows.shape[1:]), padded, group=self._group),
        )
        if min(counts) == most:
            return whole.view(-1, *rows.shape[1:])
        return torch.cat([whole[rank, :count] for rank, count in enumerate(counts)])

    def exchange(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        mine = counts[self.rank]
        parts = rows.new_empty((self.size, mine, *rows.shape[1:]))
        self._call(
            "exchanging rows",
            lambda: dist.all_to_all_single(
                parts.view(self.size * mine, *rows.shape[1:]),
                rows.contiguous(),
                [mine] * self.size,
                list(counts),
                group=self._group,
            ),
        )
        return parts

    def gather_objects(self, value: Value) -> list[Value]:
        found: list[Any] = [None] * self.size
        self._call(
            "gathering results", lambda: dist.all_gather_object(found, value, group=self._group)
        )
        return found

    def gather_to_first(self, value: Value) -> list[Value]:
        found: list[Any] | None = [None] * self.size if self.first else None
        self._call(
            "gathering results",
            # Of the default group, whose process 0 is the first of every group.
            lambda: dist.gather_object(value, found, dst=0, group=self._group),
        )
        return found or []

    def broadcast(self, value: Value) -> Value:
        box = [value]
        self._call(
            "sharing a value", lambda: dist.broadcast_object_list(box, src=0, group=self._group)
        )
        return box[0]

    def barrier(self) -> None:
        self._call("waiting for all workers", lambda: dist.barrier(group=self._group))

    def on_first(self, work: Callable[[], object]) -> None:
        self.on_each(work if self.first else lambda: None)

    def on_each(self, work: Callable[[], object]) -> None:
        # Heartbeats, so that a pass over a long log is not mistaken for a stalled worker.
        with ThreadPoolExecutor(max_workers=1) as thread:
            running = thread.submit(work)
            while True:
                done = _ends(running, _HEARTBEAT)
                failed = running.exception() if done else None
                reports = self.gather_objects((done, self._for_others(failed)))
                if all(over for over, _ in reports):
                    break
        for rank, (_, reported) in enumerate(reports):
            if reported is not None:
                raise reported if failed is None or rank != self.rank else failed

    def first_then_all(self, work: Callable[[], Value]) -> Value:
        result: list[Value] = []
        self.on_first(lambda: result.append(work()))
        return result[0] if self.first else work()

    def exchange_of_readers(self) -> Exchange | None:
        if self.size == 1:
            return None
        own = self._readers or dist.new_group(timeout=self._timeout, backend="gloo")
        return _Readers(self._timeout, own, owned=self._readers is None)

    def _reduce(self, tensor: Tensor, how: Any) -> Tensor:
        total = tensor.detach().clone().contiguous()
        self._call("summing over workers", lambda: dist.all_reduce(total, how, group=self._group))
        return total

    def _for_others(self, failure: BaseException | None) -> OfftowerError | None:
        """The error that the other workers raise: errors for users unchanged."""
        if failure is None or isinstance(failure, OfftowerError):
            return failure
        return RunError(f"worker {self.rank} failed: {failure}")

    def _call(self, what: str, collective: Callable[[], Any]) -> None:
        try:
            collective()
        except RuntimeError as error:
            within = "" if self._timeout is None else f" within {self._timeout.total_seconds():g} s"
            raise WorkerLostError(
                f"worker {self.rank} of {self.size}: {what} did not end{within}: another worker "
                f"died or stalled. The last checkpoint is intact. ({error})"
            ) from error


class _Readers(TorchWorkers):
    """The same workers in a process group of their own, whose messages do not meet those of the
    training.

    Args:
        owned: whether `close` destroys the group.
    """

    def __init__(self, timeout: timedelta | None, group: dist.ProcessGroup, *, owned: bool) -> None:
        super().__init__(timeout, group)
        self._owned = owned

    def close(self) -> None:
        """Free the threads and connections of the group; the object is of no use afterwards."""
        # Destroying a group twice is an error, and so is one that ended with all others.
        if self._owned and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._owned = False

    def all_to_all(self, parts: Sequence[memoryview]) -> list[memoryview]:
        """Send part d to worker d; return what each worker sent here."""
        sizes = torch.tensor([len(part) for part in parts], dtype=torch.int64, device="cpu")
        theirs = self.exchange(sizes, [1] * self.size).flatten().tolist()
        # Aligned, since arrays are views of what is received.
        sent = [_aligned(len(part)) for part in parts]
        received = [_aligned(size) for size in theirs]
        outgoing = torch.zeros(sum(sent), dtype=torch.uint8, device="cpu")
        for part, target in zip(parts, outgoing.split(sent), strict=True):
            target.numpy()[: len(part)] = np.frombuffer(part, dtype=np.uint8)
        incoming = torch.empty(sum(received), dtype=torch.uint8, device="cpu")
        self._call(
            "exchanging rows of the log",
            lambda: dist.all_to_all_single(incoming, outgoing, received, sent, group=self._group),
        )
        found = zip(incoming.split(received), theirs, strict=True)
        return [memoryview(part[:size].numpy()) for part, size in found]


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _ends(running: Future[object], seconds: float) -> bool:
    """Whether `running` ends within `seconds`."""
    return bool(wait_for([running], timeout=seconds).done)
