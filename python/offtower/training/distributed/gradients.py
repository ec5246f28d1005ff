"""Sums of gradients over workers, after which each worker makes the same update.

Every loss is a sum over all rows of the step divided by their number, so the workers' parts add up
without averaging. Gradients of replicated parameters are summed. A table with rows owned by workers
(`owned`) keeps its gradient, except for row 0, the shared value "unknown".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from offtower.models.features import UNKNOWN, embedding_tables
from offtower.models.optimizer import clip_gradients, scale_down
from offtower.training.workers import Workers

_BUCKET = 1 << 22
"""Numbers per message, 16 MiB: few messages, and little memory beside the gradients."""


class GradientSum:
    """Sums and clips the gradients of a module over the workers.

    Args:
        module: its parameters have gradients after a backward pass.
        workers: share the step.
        owned: weights of tables of which each worker owns some rows.
    """

    def __init__(
        self, module: nn.Module, workers: Workers, owned: Sequence[nn.Parameter] = ()
    ) -> None:
        self._workers = workers
        self._owned = list(owned)
        mine = {id(parameter) for parameter in owned}
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._tables = embedding_tables(module)
        self._shared = [p for p in self._parameters if id(p) not in mine]

    def combine(self) -> None:
        """Replace local gradients by their sums over the workers."""
        if self._workers.size == 1:
            return
        sparse = {id(table.weight) for table in self._tables if table.sparse}
        dense = [p for p in self._shared if id(p) not in sparse]
        unknown = [_unknown_row(parameter) for parameter in self._owned]
        self._sum_dense(dense, unknown)
        for parameter, row in zip(self._owned, unknown, strict=True):
            _set_unknown_row(parameter, row)
        for parameter in self._shared:
            if id(parameter) in sparse:
                self._sum_sparse(parameter)

    def clip(self, max_norm: float) -> Tensor:
        """Scale the summed gradients so that the norm over all workers is at most `max_norm`.

        Returns:
            The norm before clipping, a scalar, the same on every worker; on a GPU without a
            synchronization.
        """
        if not self._owned or self._workers.size == 1:
            return clip_gradients(self._parameters, max_norm)
        mine: list[Tensor] = []
        rows: list[Tensor] = []
        for parameter in self._owned:
            if parameter.grad is None:
                continue
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.coalesce()
            index, values = _parts(parameter.grad)
            mine.append(values[index != UNKNOWN])
            rows.append(values[index == UNKNOWN])
        square = torch.zeros((), dtype=torch.float64, device=self._owned[0].device)
        for part in mine:
            square = square + part.double().square().sum()
        square = self._workers.sum(square)
        for parameter in self._shared:
            if parameter.grad is not None:
                if parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.coalesce()
                square = square + _parts(parameter.grad)[1].double().square().sum()
        for row in rows:
            square = square + row.double().square().sum()
        norm = square.sqrt()
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        scale_down((_parts(gradient)[1] for gradient in gradients), norm, max_norm)
        return norm

    def _sum_dense(self, parameters: list[nn.Parameter], extra: list[tuple[Tensor, bool]]) -> None:
        """Sum in buckets; a gradient that no worker has stays None.

        Flags of the existing gradients are summed first, so that all workers form the same buckets
        even if a worker without rows has no graph.
        """
        flags = [float(p.grad is not None) for p in parameters] + [float(has) for _, has in extra]
        if not flags:
            return
        present = self._workers.sum(torch.tensor(flags, dtype=torch.float32, device="cpu")) > 0
        parts: list[Tensor] = []
        for parameter, some in zip(parameters, present.tolist(), strict=False):
            if not some:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parts.append(parameter.grad)
        parts += [row for row, _ in extra]
        bucket: list[Tensor] = []
        size = 0
        for part in parts:
            if bucket and size + part.numel() > _BUCKET:
                self._sum_together(bucket)
                bucket, size = [], 0
            bucket.append(part)
            size += part.numel()
        self._sum_together(bucket)
        some_unknown = present[len(parameters) :].tolist()
        extra[:] = [(row, some) for (row, _), some in zip(extra, some_unknown, strict=True)]

    def _sum_together(self, parts: list[Tensor]) -> None:
        if not parts:
            return
        total = self._workers.sum(torch.cat([part.reshape(-1) for part in parts]))
        for part, value in zip(parts, total.split([p.numel() for p in parts]), strict=True):
            part.copy_(value.view_as(part))

    def _sum_sparse(self, parameter: nn.Parameter) -> None:
        width = parameter.shape[1]
        if parameter.grad is None:
            index = torch.empty(0, dtype=torch.int64, device=parameter.device)
            values = parameter.new_empty(0, width)
        else:
            index, values = _parts(parameter.grad.coalesce())
        own = torch.tensor([len(index)], dtype=torch.int64, device="cpu")
        counts = self._workers.gather(own, [1] * self._workers.size).tolist()
        if max(counts) == 0:
            parameter.grad = None
            return
        parameter.grad = torch.sparse_coo_tensor(
            self._workers.gather(index, counts)[None],
            self._workers.gather(values.detach(), counts),
            parameter.shape,
            check_invariants=False,
        ).coalesce()


def _parts(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Row numbers and rows (views) of a dense or coalesced gradient."""
    if gradient.is_sparse:
        return gradient._indices()[0], gradient._values()
    if gradient.dim() < 2:
        gradient = gradient.reshape(1, -1)
    return torch.arange(len(gradient), device=gradient.device), gradient


def _unknown_row(parameter: nn.Parameter) -> tuple[Tensor, bool]:
    """The gradient of row 0, and whether it exists."""
    row = parameter.new_zeros(parameter.shape[1])
    if parameter.grad is None:
        return row, False
    if not parameter.grad.is_sparse:
        return parameter.grad[UNKNOWN].clone(), True
    parameter.grad = parameter.grad.coalesce()
    index, values = _parts(parameter.grad)
    found = values[index == UNKNOWN]
    return (found[0].clone(), True) if len(found) else (row, False)


def _set_unknown_row(parameter: nn.Parameter, summed: tuple[Tensor, bool]) -> None:
    row, present = summed
    if not present:
        return
    if parameter.grad is None:
        # Only other workers touched it.
        place = torch.full((1, 1), UNKNOWN, dtype=torch.int64, device=row.device)
        lone = torch.sparse_coo_tensor(place, row[None], parameter.shape, check_invariants=False)
        parameter.grad = lone.coalesce()
        return
    if not parameter.grad.is_sparse:
        parameter.grad[UNKNOWN] = row
        return
    index, values = _parts(parameter.grad)
    kept = index != UNKNOWN
    parameter.grad = torch.sparse_coo_tensor(
        torch.cat([index.new_full((1,), UNKNOWN), index[kept]])[None],
        torch.cat([row[None], values[kept]]),
        parameter.shape,
        check_invariants=False,
    ).coalesce()
