from typing import Unpack

from offtower.ops._cpu import Operands as Operands
from offtower.ops.addresses import BackwardAddresses, ForwardAddresses

def forward(
    operands: Operands,
    *,
    device: int,
    stream: int = 0,
    workspace: int = 0,
    **results: Unpack[ForwardAddresses],
) -> int: ...
def backward(
    operands: Operands,
    *,
    anchor: int,
    total: int,
    device: int,
    stream: int = 0,
    workspace: int = 0,
    **arrays: Unpack[BackwardAddresses],
) -> int: ...
def top_k(
    operands: Operands,
    *,
    k: int,
    score: int,
    index: int,
    device: int,
    stream: int = 0,
    workspace: int = 0,
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
