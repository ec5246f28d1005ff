from typing import Unpack

from offtower.ops.arrays import BackwardArrays, Capsule, ForwardArrays, PolicyArrays

class Operands:
    def __init__(
        self,
        *,
        context: Capsule,
        item: Capsule,
        temperature: float = 1.0,
        sigmoid: bool = False,
        tfloat32: bool = False,
        **optional: Unpack[PolicyArrays],
    ) -> None: ...

def forward(
    operands: Operands, *, threads: int, isa: str, **results: Unpack[ForwardArrays]
) -> None: ...
def backward(
    operands: Operands,
    *,
    anchor: Capsule,
    total: Capsule,
    threads: int,
    isa: str,
    **arrays: Unpack[BackwardArrays],
) -> None: ...
def top_k(
    operands: Operands, *, k: int, score: Capsule, index: Capsule, threads: int, isa: str
) -> None: ...
def multiply_add_rate(dtype: int, threads: int, isa: str = "") -> float: ...
def isas() -> list[str]: ...
def isas_here() -> list[str]: ...
def uses_torch_threads() -> bool: ...
