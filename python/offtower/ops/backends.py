"""Which backends exist here, and which of them serves a call."""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from offtower.errors import OperatorError

if TYPE_CHECKING:
    from offtower.ops.reference import Inputs

NAMES = ("auto", "reference", "cpu", "cuda")


def _load_cpu() -> tuple[ModuleType | None, str]:
    try:
        from offtower.ops import _cpu
    except ImportError as error:
        return None, (
            f"not built ({error}); 'pip install -e .' with a C++17 compiler builds it. "
            "The reference serves instead"
        )
    forced = os.environ.get("OFFTOWER_CPU_ISA")
    chosen = f"OFFTOWER_CPU_ISA={forced}" if forced else f"uses {_cpu.isas_here()[0]}"
    whose = "torch's" if _cpu.uses_torch_threads() else "its own"
    return _cpu, (
        f"built for {', '.join(_cpu.isas())}; this machine runs {', '.join(_cpu.isas_here())} "
        f"and {chosen}, on {whose} threads"
    )


_CPU, _CPU_STATUS = _load_cpu()


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` takes here, beside "auto"."""
    return ("reference", "cpu") if _CPU is not None else ("reference",)


def available_instruction_sets() -> tuple[str, ...]:
    """What OFFTOWER_CPU_ISA may be set to on this machine, widest first."""
    return tuple(_CPU.isas_here()) if _CPU is not None else ()


def backend_status() -> dict[str, str]:
    """For each backend, that it is available, or why not."""
    return {
        "reference": "available (plain torch)",
        "cpu": _CPU_STATUS,
        "cuda": "not built: this version has no CUDA operators; the reference runs on GPUs",
    }


def check_backend(name: str) -> None:
    """Refuse names that are unknown or not available here."""
    if name not in NAMES:
        raise OperatorError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    if name != "auto" and name not in available_backends():
        raise OperatorError(f"backend '{name}' is not available: {backend_status()[name]}")


def serves(backend: str, x: Inputs) -> bool:
    """Whether the native core computes this call: float32 and bfloat16 on the CPU.

    Raises:
        OperatorError: backend "cpu" was asked for and does not take these operands.
    """
    if _CPU is None or backend == "reference":
        return False
    fits = x.u.dtype in (torch.float32, torch.bfloat16) and x.u.device.type == "cpu"
    if backend == "cpu" and not fits:
        raise OperatorError(
            f"backend 'cpu' takes float32 and bfloat16 tensors on the CPU, got {x.u.dtype} on "
            f"{x.u.device}; use backend='reference' or 'auto'"
        )
    return fits and x.u.shape[0] > 0
