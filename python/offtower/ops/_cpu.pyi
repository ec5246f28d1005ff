"""The CPU core (csrc/bindings): arrays are DLPack capsules, None where one is absent.

They hold (B,) float32 each, unless stated otherwise; csrc/operands.h documents them.
"""

from typing import TypedDict, Unpack

Capsule = object

class PolicyArrays(TypedDict, total=False):
    """Optional arrays of a policy: `item_bias`, `reward_bias` (N,), `action` (B,) int64,
    `dense` (B, N), `reward_context` (B, e), `reward_item` (N, e); eligible items as in
    `offtower.ops.Eligibility`."""

    item_bias: Capsule | None
    action: Capsule | None
    dense: Capsule | None
    reward_context: Capsule | None
    reward_item: Capsule | None
    reward_bias: Capsule | None
    group: Capsule | None
    bitmap: Capsule | None
    excluded_offsets: Capsule | None
    excluded_items: Capsule | None

class ForwardArrays(TypedDict, total=False):
    """Filled by the forward pass."""

    log_prob: Capsule | None
    log_normalizer: Capsule | None
    expected_reward: Capsule | None
    action_reward: Capsule | None
    entropy: Capsule | None
    reference_max: Capsule | None
    total: Capsule | None
    reward_sum: Capsule | None
    centered_sum: Capsule | None
    action_logit: Capsule | None

class BackwardArrays(TypedDict, total=False):
    """Cotangents and results of the forward pass, and the gradients to be filled: `context` (B, d),
    `item` (N, d), `item_bias` (N,), in the operands' dtype."""

    expected_reward: Capsule | None
    entropy: Capsule | None
    g_log_prob: Capsule | None
    g_log_normalizer: Capsule | None
    g_expected_reward: Capsule | None
    g_entropy: Capsule | None
    context: Capsule | None
    item: Capsule | None
    item_bias: Capsule | None

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
    reference_max: Capsule,
    total: Capsule,
    threads: int,
    isa: str,
    **arrays: Unpack[BackwardArrays],
) -> None: ...
def top_k(
    operands: Operands, *, k: int, score: Capsule, index: Capsule, threads: int, isa: str
) -> None: ...
def draw(
    operands: Operands,
    *,
    samples: int,
    replacement: bool,
    seed: int,
    tile: int,
    stream: Capsule,
    item: Capsule,
    log_prob: Capsule,
    reference_max: Capsule,
    total: Capsule,
    threads: int,
    isa: str,
) -> None: ...
def philox(counter: list[int], key: int) -> list[int]: ...
def list_dots(
    *,
    rows: Capsule,
    matrix: Capsule,
    offsets: Capsule,
    items: Capsule,
    dots: Capsule,
    threads: int,
    isa: str,
) -> None: ...
def list_sums(
    *,
    weight: Capsule,
    matrix: Capsule,
    offsets: Capsule,
    items: Capsule,
    sums: Capsule,
    threads: int,
    isa: str,
) -> None: ...
def multiply_add_rate(dtype: int, threads: int, isa: str = "") -> float: ...
def isas() -> list[str]: ...
def isas_here() -> list[str]: ...
def uses_torch_threads() -> bool: ...
