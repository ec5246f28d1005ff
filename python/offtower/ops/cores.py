"""The cores that compute the operators, and the choice of one for a call."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops.candidates import CandidateCore, ListProducts, TorchListProducts
from offtower.ops.cpu_core import CPUCore, available_instruction_sets
from offtower.ops.cuda_core import CUDACore
from offtower.ops.reference import ReferenceCore
from offtower.ops.tiled_draws import DrawSettings, SoftmaxDraws
from offtower.ops.types import (
    Cotangents,
    ForwardResults,
    ForwardStatistics,
    Gradients,
    Needs,
    Operands,
    PartialTerms,
)

__all__ = [
    "Core",
    "available_backends",
    "available_instruction_sets",
    "backend_status",
    "check_backend",
    "choose_core",
]


class Core(Protocol):
    """An implementation of the operators. Operands have passed `checks`."""

    name: str

    def available(self) -> bool: ...

    def status(self) -> str:
        """That the core is available, or why not; for users."""
        ...

    def refusal(self, x: Operands, k: int = 0) -> str:
        """Why the core does not take these operands, or ""; a sentence without its subject.

        Args:
            k: of `top_k`.
        """
        ...

    def forward(self, x: Operands, entropy: bool) -> ForwardResults:
        """All terms over all items of `x`."""
        ...

    def partial(self, x: Operands, entropy: bool) -> PartialTerms:
        """Sums over the items of `x`; actions may be -1."""
        ...

    def backward(
        self, x: Operands, forward: ForwardStatistics, g: Cotangents, needs: Needs
    ) -> Gradients:
        """Gradients over the items of `x`, which may be a slice of those of `forward`."""
        ...

    def top_k(self, x: Operands, k: int) -> tuple[Tensor, Tensor]:
        """Scores (B, k), falling, and item numbers (B, k); of equal scores the lowest first."""
        ...

    def draw(self, x: Operands, settings: DrawSettings) -> SoftmaxDraws:
        """Items drawn from the softmax of each row."""
        ...


_REFERENCE = ReferenceCore()
_CPU = CPUCore()
_CORES: dict[str, Core] = {core.name: core for core in (_REFERENCE, _CPU, CUDACore())}
_PRODUCTS: dict[str, ListProducts] = {_CPU.name: _CPU}


def available_backends() -> tuple[str, ...]:
    """Names that `backend=` takes here, beside "auto"."""
    return tuple(name for name, core in _CORES.items() if core.available())


def backend_status() -> dict[str, str]:
    """For each backend, that it is available, or why not."""
    return {name: core.status() for name, core in _CORES.items()}


def check_backend(name: str) -> None:
    """Refuse names that are unknown or not available here."""
    if name == "auto":
        return
    if name not in _CORES:
        raise OperatorError(f"backend must be one of auto, {', '.join(_CORES)}, got {name!r}")
    if not _CORES[name].available():
        raise OperatorError(f"backend '{name}' is not available: {_CORES[name].status()}")


def choose_core(backend: str, x: Operands, k: int = 0) -> Core:
    """The core that computes a call; "auto" falls back to the reference.

    Args:
        k: of `top_k`.

    Raises:
        OperatorError: a native core was asked for and does not take these operands.
    """
    core = _CORES.get(x.context.device.type if backend == "auto" else backend, _REFERENCE)
    refusal = core.refusal(x, k)
    if refusal and backend != "auto":
        raise OperatorError(f"backend '{backend}' {refusal}; use backend='reference' or 'auto'")
    chosen = _REFERENCE if refusal or x.rows == 0 else core
    if x.candidates is None:
        return chosen
    return CandidateCore(chosen.name, _PRODUCTS.get(chosen.name, TorchListProducts()))
