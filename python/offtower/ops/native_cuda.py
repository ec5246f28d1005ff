"""The CUDA library's calls: tensors in, DLPack capsules out, results as tensors.

Everything here assumes operands that `checks` has passed and that `backends.core_of` has accepted:
float32 or bfloat16, all on one NVIDIA GPU. Nothing waits for the device; workspaces come from
torch's allocator, so that calls can be captured into graphs.

float32 is computed in float32, unless torch is told that its own products may be tf32, by
`torch.set_float32_matmul_precision("high")` or
`torch.backends.cuda.matmul.fp32_precision = "tf32"`: then the products of policy terms are tf32
too, with sums and exponentials in float32. `top_k` never is.

Numbers of a row must fill whole 16 bytes for the copies into shared memory: embeddings whose width
does not are padded with zeros first (a copy), and their gradients cut.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from offtower.ops.arrays import capsule
from offtower.ops.native import (
    DTYPES,
    Operands,
    Terms,
    as_float32,
)
from offtower.ops.reference import Cotangents, Inputs, RunningSums

_TFLOAT32 = 2
"""The core's number of float32 operands whose products may be rounded to tf32."""
_NONE, _DENSE, _IDENTITY, _SIGMOID = range(4)


def _tfloat32(x: Inputs) -> bool:
    """Whether products of policy terms of these operands may be rounded to tf32."""
    return x.u.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _reward_kind(x: Inputs) -> int:
    """The core's number of the reward model's kind."""
    if x.dense is not None:
        return _DENSE
    if x.e is None:
        return _NONE
    return _SIGMOID if x.sigmoid else _IDENTITY


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The library, or why there is none. Asked for by the first CUDA tensor, or by doctor."""
    if importlib.util.find_spec("offtower.ops._cuda") is None:
        record = Path(__file__).with_name("_cuda_build.txt")
        reason = record.read_text().strip() if record.exists() else "no record of a build"
        return None, (
            f"not built ({reason or 'compiling it failed'}); 'OFFTOWER_CUDA=1 pip install -e .' "
            "builds it where CUDA's compiler nvcc is on the PATH or under CUDA_HOME"
        )
    try:
        from offtower.ops import _cuda
    except ImportError as error:
        return None, f"built, but cannot be loaded ({error}); build it again: 'pip install -e .'"
    return _cuda, f"built for {_cuda.architectures}"


def library() -> ModuleType:
    """offtower.ops._cuda; the tests put an emulation in its place."""
    loaded, _ = _load()
    assert loaded is not None
    return loaded


def usable() -> bool:
    """Whether the library is there and torch sees a GPU."""
    return torch.cuda.is_available() and torch.version.cuda is not None and _load()[0] is not None


def status() -> str:
    """What was built for which architectures, and what is missing."""
    loaded, said = _load()
    if loaded is None:
        return f"{said}. The reference serves on GPUs"
    if torch.version.cuda is None:
        return f"{said}; this torch has no CUDA"
    if not torch.cuda.is_available():
        return f"{said}; torch sees no NVIDIA GPU"
    names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return f"{said}; this machine has {', '.join(names)}"


def refusal(x: Inputs, k: int) -> str:
    """Why the kernels do not take these operands, or ""; a sentence without its subject."""
    loaded, said = _load()
    if loaded is None:
        return f"is {said}"
    most = int(loaded.most_k)
    if k > most:
        return f"finds the {most} best items at most, and k is {k}"
    width, reward_width = _widths(x)
    reason = loaded.refusal(
        dtype=_TFLOAT32 if _tfloat32(x) else DTYPES[x.u.dtype],
        items=x.v.shape[0],
        dim=width,
        reward=_reward_kind(x),
        reward_dim=reward_width,
        device=_device(x),
    )
    return f"cannot compute this: {reason}" if reason else ""


def forward(x: Inputs, entropy: bool) -> Terms:
    """All terms over all items of `x`."""
    rows, reward = x.u.shape[0], x.u.shape[0] if x.has_reward else 0
    make = functools.partial(torch.empty, device=x.u.device, dtype=torch.float32)
    terms = Terms(
        make(rows), make(rows), make(reward), make(reward), make(rows if entropy else 0),
        make(rows), make(rows),
    )  # fmt: skip
    arrays = {name: capsule(tensor) for name, tensor in terms._asdict().items()}
    operands = _operands(x)
    _run(x, functools.partial(library().forward, operands.native, **arrays))
    return terms


def running_sums(x: Inputs, entropy: bool) -> tuple[RunningSums, Tensor, Tensor | None]:
    """Sums over the items of `x`, logits (-inf) and rewards (0) of actions (-1 if elsewhere)."""
    make = functools.partial(torch.empty, x.u.shape[0], device=x.u.device, dtype=torch.float32)
    top, total, logit = make(), make(), make()
    reward = make() if x.has_reward else None
    action_reward = make() if x.has_reward else None
    centred = make() if entropy else None
    operands = _operands(x)
    call = functools.partial(
        library().forward,
        operands.native,
        anchor=capsule(top),
        total=capsule(total),
        reward_sum=capsule(reward),
        centred_sum=capsule(centred),
        action_logit=capsule(logit),
        action_reward=capsule(action_reward),
    )
    _run(x, call)
    return RunningSums(top, total, reward, centred), logit, action_reward


def backward(
    x: Inputs,
    sums: tuple[Tensor, Tensor],
    expected_reward: Tensor,
    entropy: Tensor,
    g: Cotangents,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients in u, v and bias; only those that `needs` names are computed."""
    need_u, need_v, need_b = needs
    operands = _operands(x)
    width = _widths(x)[0]
    make = functools.partial(torch.empty, device=x.u.device, dtype=x.u.dtype)
    du = make(x.u.shape[0], width) if need_u else None
    dv = make(x.v.shape[0], width) if need_v else None
    db = make(x.v.shape[0]) if need_b and x.bias is not None else None
    anchor, total = sums
    given: dict[str, Tensor | None] = {
        "g_log_prob": g.log_prob,
        "g_log_normalizer": g.log_normalizer,
        "g_expected_reward": g.expected_reward,
        "g_entropy": g.entropy,
        "anchor": anchor,
        "total": total,
        "expected_reward": expected_reward,
        "entropy": entropy,
    }
    arrays = {name: operands.capsule(as_float32(tensor)) for name, tensor in given.items()}
    call = functools.partial(
        library().backward,
        operands.native,
        **arrays,
        context=capsule(du),
        item=capsule(dv),
        item_bias=capsule(db),
    )
    _run(x, call)
    return _cut(du, x.u.shape[1]), _cut(dv, x.v.shape[1]), db


def top_k(x: Inputs, k: int) -> tuple[Tensor, Tensor]:
    """Scores (B, k) float32, falling, and item numbers (B, k); of equal scores the lowest first."""
    operands = _operands(x, exact=True)
    score = torch.empty(x.u.shape[0], k, dtype=torch.float32, device=x.u.device)
    index = torch.empty(x.u.shape[0], k, dtype=torch.int64, device=x.u.device)
    call = functools.partial(
        library().top_k, operands.native, k=k, score=capsule(score), index=capsule(index)
    )
    _run(x, call)
    return score, index


def _run(x: Inputs, call: Callable[..., int]) -> None:
    """Ask how large the workspace must be, and launch on the current stream."""
    guard: AbstractContextManager[Any] = (
        torch.cuda.device(x.u.device) if x.u.is_cuda else nullcontext()
    )
    with guard:
        stream = torch.cuda.current_stream(x.u.device).cuda_stream if x.u.is_cuda else 0
        size = call(device=_device(x), stream=stream)
        workspace = torch.empty(size, dtype=torch.uint8, device=x.u.device)
        call(device=_device(x), stream=stream, workspace=capsule(workspace))


def _device(x: Inputs) -> int:
    return x.u.get_device() if x.u.is_cuda else 0


def _operands(x: Inputs, exact: bool = False) -> Operands:
    wide, reward_wide = _widths(x)
    fitted = replace(
        x,
        u=_padded(x.u, wide),
        v=_padded(x.v, wide),
        e=None if x.e is None else _padded(x.e, reward_wide),
        t=None if x.t is None else _padded(x.t, reward_wide),
    )
    return Operands(fitted, library().Operands, aligned=True, tfloat32=not exact and _tfloat32(x))


def _widths(x: Inputs) -> tuple[int, int]:
    """Widths of embeddings and of a factored reward model whose rows fill whole 16 bytes."""
    unit = 16 // x.u.element_size()
    given = (x.u.shape[1], 0 if x.e is None else x.e.shape[1])
    return -(-given[0] // unit) * unit, -(-given[1] // unit) * unit


def _padded(tensor: Tensor, width: int) -> Tensor:
    missing = width - tensor.shape[1]
    return torch.nn.functional.pad(tensor.detach(), (0, missing)) if missing else tensor


def _cut(gradient: Tensor | None, width: int) -> Tensor | None:
    if gradient is None or gradient.shape[1] == width:
        return gradient
    return gradient[:, :width].contiguous()
