"""Which backends exist here, and which of them serves a call."""

from __future__ import annotations

import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from offtower.errors import OperatorError

if TYPE_CHECKING:
    from torch import Tensor

    from offtower.ops.reference import Inputs

NAMES = ("auto", "reference", "cpu", "cuda")


def _load_cpu() -> tuple[ModuleType | None, str]:
    try:
        import offtower.ops._cpu as _cpu
    except ImportError as error:
        return None, (
            f"not built ({error}); 'pip install -e .' with a C++17 compiler builds it. "
            "The reference serves instead"
        )
    return _cpu, f"built for {', '.join(_cpu.isas())}; this machine runs {_cpu.isa()}"


_CPU, _CPU_STATUS = _load_cpu()


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` takes here, beside "auto"."""
    return ("reference", "cpu") if _CPU is not None else ("reference",)


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


def serves(backend: str, x: Inputs, entropy: bool) -> bool:
    """Whether the native core computes this forward pass.

    It has log_prob and log_normalizer in float32 so far; the rest is the reference's.
    """
    if _CPU is None or backend == "reference":
        return False
    fits = (
        not x.has_reward
        and not entropy
        and x.u.dtype == torch.float32
        and x.u.device.type == "cpu"
        and x.u.shape[0] > 0
    )
    # Below this the call is all overhead, and torch's matrix product is as good.
    return fits and (backend == "cpu" or x.u.shape[0] * x.v.shape[0] >= 1 << 16)


def forward(x: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """log_prob and log_normalizer by the native core; the other terms are empty."""
    assert _CPU is not None
    u = x.scaled_context().contiguous()
    v = x.v.contiguous()
    bias = None if x.bias is None else x.bias.contiguous()
    log_normalizer = torch.empty(u.shape[0], dtype=torch.float32)
    _CPU.log_normalizer(
        u.data_ptr(),
        v.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        log_normalizer.data_ptr(),
        u.shape[0],
        v.shape[0],
        u.shape[1],
        torch.get_num_threads(),
        os.environ.get("OFFTOWER_CPU_ISA", ""),
    )
    nothing: Any = log_normalizer.new_empty
    return (
        x.action_logit() - log_normalizer,
        log_normalizer,
        nothing(0),
        nothing(0),
        nothing(0),
    )
