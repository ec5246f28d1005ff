"""Which backends exist here, and which of them serves a call."""

from __future__ import annotations

import os
from types import ModuleType
from typing import Protocol, cast

from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops import native, native_cuda
from offtower.ops.reference import Cotangents, Inputs, RunningSums

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
    cpu = ("cpu",) if _CPU is not None else ()
    return ("reference", *cpu, *(("cuda",) if native_cuda.usable() else ()))


def available_instruction_sets() -> tuple[str, ...]:
    """What OFFTOWER_CPU_ISA may be set to on this machine, widest first."""
    return tuple(_CPU.isas_here()) if _CPU is not None else ()


def backend_status() -> dict[str, str]:
    """For each backend, that it is available, or why not."""
    return {
        "reference": "available (plain torch)",
        "cpu": _CPU_STATUS,
        "cuda": native_cuda.status(),
    }


def check_backend(name: str) -> None:
    """Refuse names that are unknown or not available here."""
    if name not in NAMES:
        raise OperatorError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    if name != "auto" and name not in available_backends():
        raise OperatorError(f"backend '{name}' is not available: {backend_status()[name]}")


class Core(Protocol):
    """What `native` and `native_cuda` both offer."""

    def forward(self, x: Inputs, entropy: bool) -> native.Terms: ...
    def running_sums(
        self, x: Inputs, entropy: bool
    ) -> tuple[RunningSums, Tensor, Tensor | None]: ...
    def backward(
        self,
        x: Inputs,
        sums: tuple[Tensor, Tensor],
        expected_reward: Tensor,
        entropy: Tensor,
        g: Cotangents,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]: ...
    def top_k(self, x: Inputs, k: int) -> tuple[Tensor, Tensor]: ...


def core_of(backend: str, x: Inputs, k: int = 0) -> Core | None:
    """The native core that computes this call, or None for the reference.

    The CPU's takes float32 and bfloat16 there, the CUDA one on NVIDIA GPUs.

    Args:
        k: of `top_k`.

    Raises:
        OperatorError: "cpu" or "cuda" was asked for and does not take these operands.
    """
    if backend == "reference":
        return None
    kind = "cuda" if x.u.is_cuda else x.u.device.type
    wanted = kind if backend == "auto" else backend
    refusal = _refusal(wanted, kind, x, k)
    if refusal and backend != "auto":
        raise OperatorError(f"backend '{backend}' {refusal}; use backend='reference' or 'auto'")
    if refusal or x.u.shape[0] == 0:
        return None
    return cast(Core, native_cuda if wanted == "cuda" else native)


def _refusal(wanted: str, kind: str, x: Inputs, k: int) -> str:
    """Why core `wanted` does not take these operands, or ""."""
    if wanted not in ("cpu", "cuda") or (wanted == "cpu" and _CPU is None):
        return "is not available"
    if kind != wanted or x.u.dtype not in native.DTYPES:
        where = "on the CPU" if wanted == "cpu" else "on NVIDIA GPUs"
        return f"takes float32 and bfloat16 tensors {where}, got {x.u.dtype} on {x.u.device}"
    return native_cuda.refusal(x, k) if wanted == "cuda" else ""
