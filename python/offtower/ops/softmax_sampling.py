"""Exact draws from the softmax policy."""

from __future__ import annotations

import torch
from torch import Tensor

from offtower.errors import OperatorError
from offtower.ops import cores
from offtower.ops.cores import check_backend
from offtower.ops.eligibility_checks import check_found
from offtower.ops.policy import logit_operands, with_eligible
from offtower.ops.tiled_draws import DrawSettings, SoftmaxDraws
from offtower.ops.types import Backend, Eligibility


def sample_softmax(
    context_embedding: Tensor,
    item_embedding: Tensor,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    eligible: Eligibility | None = None,
    generator: torch.Generator | None = None,
    num_samples: int = 1,
    replacement: bool = True,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Draw items from the softmax policy, exactly, without a (B, N) array.

    An item is drawn by inversion: a tile of about sqrt(N) items from the tiles' masses, then an
    item of the tile. On the CPU this takes about as long as one `policy_terms` without gradient.
    Random numbers follow from a seed that the generator gives, the row and the draw (Philox), so a
    backend has the same draws for any number of threads, and backends differ only where the
    rounding of a logit decides. On a GPU the draws are computed in plain torch.

    Args:
        context_embedding: u, (B, d), float32, bfloat16 or float64.
        item_embedding: v, (N, d), of the same dtype.
        temperature: positive; divides <u, v>.
        item_bias: b, (N,).
        eligible: the items that each row may draw; log-probabilities are among them. With candidate
            lists only their items are scored.
        generator: gives the seed; one number is taken from it.
        num_samples: s, draws a row.
        replacement: draw independently; otherwise the items of a row are distinct, in the order of
            draws from what is left (Plackett-Luce). Without replacement a call on a GPU waits for
            the device.
        backend: "auto", or one of `available_backends()`.

    Returns:
        item numbers (B, s) int64 and their log-probabilities (B, s) under a single draw, float32
        (float64 for float64 operands). Without replacement a row with fewer than s items of
        positive probability ends with -1 and -inf.

    Raises:
        OperatorError: as for `policy_terms`, num_samples is below 1, or a row (which is named) has
            no eligible item, or logits that are NaN or infinite. On a GPU such a row has items of
            -1 instead.
    """
    draws = draw_softmax(
        context_embedding,
        item_embedding,
        temperature=temperature,
        item_bias=item_bias,
        eligible=eligible,
        generator=generator,
        num_samples=num_samples,
        replacement=replacement,
        backend=backend,
    )
    return draws.item, draws.log_prob


@torch.no_grad()
def draw_softmax(
    context_embedding: Tensor,
    item_embedding: Tensor,
    *,
    temperature: float = 1.0,
    item_bias: Tensor | None = None,
    eligible: Eligibility | None = None,
    generator: torch.Generator | None = None,
    num_samples: int = 1,
    replacement: bool = True,
    backend: Backend = "auto",
) -> SoftmaxDraws:
    """Draw as `sample_softmax`, and return the normalizer of each row too."""
    if not 1 <= num_samples < 1 << 31:
        raise OperatorError(f"num_samples must lie in [1, 2^31), got {num_samples}")
    x = logit_operands(context_embedding, item_embedding, temperature, item_bias)
    x = with_eligible(x, eligible)
    check_backend(backend)
    device = x.context.device
    stream = torch.arange(x.rows, dtype=torch.int64, device=device)
    settings = DrawSettings(num_samples, replacement, _seed(generator), stream)
    if not x.rows:
        shape = 0, num_samples
        score = x.context.new_empty(shape, dtype=x.accumulation_dtype)
        return SoftmaxDraws(stream.new_empty(shape), score, score[:, 0], score[:, 0])
    draws = cores.choose_core(backend, x).draw(x, settings)
    if device.type == "cpu":
        _check_logits(draws)
        check_found(draws.item)
    return draws


def _seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.empty((), dtype=torch.int64, device=device).random_(generator=generator))


def _check_logits(draws: SoftmaxDraws) -> None:
    wrong = ~draws.total.isfinite()
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise OperatorError(
            f"row {row} has a logit that is NaN or infinite; look for such numbers in its "
            "embedding, in the items' embeddings and in the bias"
        )
