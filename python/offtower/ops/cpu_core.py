"""The CPU core: float32 and bfloat16, on torch's threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from offtower.ops.gradient_memory import empty_gradient
from offtower.ops.native import DTYPES, NativeCore, capsules, native_operands
from offtower.ops.types import ItemLists, Operands

_MIN_WORK_PER_THREAD = 1 << 22
"""In multiply-adds: some 50 microseconds of one thread."""
_EXPONENTIAL_COST = 16
"""In multiply-adds."""


def _load() -> tuple[ModuleType | None, str]:
    try:
        from offtower.ops import _cpu
    except ImportError as error:
        return None, (
            f"not built ({error}); 'pip install -e .' with a C++17 compiler builds it. "
            "The reference serves instead"
        )
    forced = os.environ.get("OFFTOWER_CPU_ISA")
    chosen = f"OFFTOWER_CPU_ISA={forced}" if forced else f"uses {_cpu.isas_here()[0]}"
    threads = "torch's" if _cpu.uses_torch_threads() else "its own"
    return _cpu, (
        f"built for {', '.join(_cpu.isas())}; this machine runs {', '.join(_cpu.isas_here())} "
        f"and {chosen}, on {threads} threads"
    )


_MODULE, _STATUS = _load()


def available_instruction_sets() -> tuple[str, ...]:
    """Values that OFFTOWER_CPU_ISA may have on this machine, fastest first."""
    return tuple(_MODULE.isas_here()) if _MODULE is not None else ()


class CPUCore(NativeCore):
    name = "cpu"

    def available(self) -> bool:
        return _MODULE is not None

    def status(self) -> str:
        return _STATUS

    def refusal(self, x: Operands, k: int = 0) -> str:
        if _MODULE is None:
            return "is not available"
        if x.context.device.type != "cpu" or x.context.dtype not in DTYPES:
            return (
                "takes float32 and bfloat16 tensors on the CPU, got "
                f"{x.context.dtype} on {x.context.device}"
            )
        return ""

    def _run(
        self, function: str, x: Operands, arrays: Mapping[str, Tensor | None], **numbers: int
    ) -> None:
        assert _MODULE is not None
        width = x.context.shape[1] + _EXPONENTIAL_COST
        if x.reward is not None and x.reward.context is not None:
            width += x.reward.context.shape[1]
        getattr(_MODULE, function)(
            native_operands(x, _MODULE.Operands),
            **capsules(arrays),
            **numbers,
            **_threads(x.rows * x.items * width),
        )

    def _empty_gradient(self, like: Tensor) -> Tensor:
        return empty_gradient(like.shape, like)

    def list_dots(self, rows: Tensor, items: Tensor, lists: ItemLists) -> Tensor:
        found = rows.new_empty(lists.items.shape, dtype=torch.float32)
        self._run_lists("list_dots", lists, rows=rows, matrix=items, dots=found)
        return found

    def list_sums(self, weight: Tensor, matrix: Tensor, lists: ItemLists) -> Tensor:
        found = weight.new_empty(lists.rows, matrix.shape[1], dtype=torch.float32)
        self._run_lists("list_sums", lists, weight=weight, matrix=matrix, sums=found)
        return found

    def _run_lists(self, function: str, lists: ItemLists, **arrays: Tensor) -> None:
        assert _MODULE is not None
        arrays |= {"offsets": lists.offsets, "items": lists.items}
        # Most of the time is waiting for rows from memory.
        work = 4 * lists.items.shape[0] * arrays["matrix"].shape[1]
        given = {name: to_dlpack(self._prepare_array(array)) for name, array in arrays.items()}
        getattr(_MODULE, function)(**given, **_threads(work))


def _threads(work: int) -> dict[str, Any]:
    """As many threads as torch has, but none for less work than it costs to wake one.

    Results do not depend on the number of threads, but on the instruction set.

    Args:
        work: in multiply-adds.
    """
    return {
        "threads": max(1, min(torch.get_num_threads(), work // _MIN_WORK_PER_THREAD)),
        "isa": os.environ.get("OFFTOWER_CPU_ISA", ""),
    }
