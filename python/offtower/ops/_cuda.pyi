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
    device: int,
    stream: int = 0,
    workspace: int = 0,
) -> int: ...
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
    device: int,
    stream: int = 0,
    workspace: int = 0,
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
most_k: int
