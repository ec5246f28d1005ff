from typing import Unpack

from offtower.ops.addresses import BackwardAddresses, ForwardAddresses, OperandAddresses

class Operands:
    def __init__(
        self,
        *,
        dtype: int,
        rows: int,
        items: int,
        dim: int,
        context: int,
        item: int,
        temperature: float = 1.0,
        reward: int = 0,
        reward_dim: int = 0,
        **optional: Unpack[OperandAddresses],
    ) -> None: ...

def forward(
    operands: Operands, *, threads: int, isa: str, **results: Unpack[ForwardAddresses]
) -> None: ...
def backward(
    operands: Operands,
    *,
    anchor: int,
    total: int,
    threads: int,
    isa: str,
    **arrays: Unpack[BackwardAddresses],
) -> None: ...
def top_k(
    operands: Operands, *, k: int, score: int, index: int, threads: int, isa: str
) -> None: ...
def multiply_add_rate(dtype: int, threads: int, isa: str = "") -> float: ...
def isas() -> list[str]: ...
def isas_here() -> list[str]: ...
def uses_torch_threads() -> bool: ...
