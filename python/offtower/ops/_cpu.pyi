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
        item_bias: int = 0,
        action: int = 0,
        temperature: float = 1.0,
        reward: int = 0,
        dense: int = 0,
        reward_dim: int = 0,
        reward_context: int = 0,
        reward_item: int = 0,
        reward_bias: int = 0,
    ) -> None: ...

def forward(
    operands: Operands,
    *,
    log_prob: int = 0,
    log_normalizer: int = 0,
    expected_reward: int = 0,
    action_reward: int = 0,
    entropy: int = 0,
    anchor: int = 0,
    total: int = 0,
    reward_sum: int = 0,
    centred_sum: int = 0,
    action_logit: int = 0,
    threads: int,
    isa: str,
) -> None: ...
def backward(
    operands: Operands,
    *,
    anchor: int,
    total: int,
    expected_reward: int = 0,
    entropy: int = 0,
    g_log_prob: int = 0,
    g_log_normalizer: int = 0,
    g_expected_reward: int = 0,
    g_entropy: int = 0,
    context: int = 0,
    item: int = 0,
    item_bias: int = 0,
    threads: int,
    isa: str,
) -> None: ...
def top_k(
    operands: Operands, *, k: int, score: int, index: int, threads: int, isa: str
) -> None: ...
def multiply_add_rate(dtype: int, threads: int, isa: str = "") -> float: ...
def isas() -> list[str]: ...
def isas_here() -> list[str]: ...
def uses_torch_threads() -> bool: ...
