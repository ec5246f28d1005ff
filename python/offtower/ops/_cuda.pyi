from typing import Unpack

from offtower.ops._cpu import BackwardArrays, Capsule, ForwardArrays
from offtower.ops._cpu import Operands as Operands

def forward(
    operands: Operands,
    *,
    device: int,
    stream: int = 0,
    workspace: Capsule | None = None,
    **results: Unpack[ForwardArrays],
) -> int: ...
def backward(
    operands: Operands,
    *,
    reference_max: Capsule,
    total: Capsule,
    device: int,
    stream: int = 0,
    workspace: Capsule | None = None,
    **arrays: Unpack[BackwardArrays],
) -> int: ...
def top_k(
    operands: Operands,
    *,
    k: int,
    score: Capsule,
    index: Capsule,
    device: int,
    stream: int = 0,
    workspace: Capsule | None = None,
) -> int: ...
def refusal(
    *, dtype: int, items: int, dim: int, reward: int, reward_dim: int, device: int
) -> str: ...
def plans(
    *, dtype: int, rows: int, items: int, dim: int, reward: int, reward_dim: int, device: int
) -> dict[str, dict[str, int]]: ...

architectures: str
sources: str
most_k: int
