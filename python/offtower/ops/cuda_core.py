"""The CUDA core: float32 and bfloat16, on NVIDIA GPUs.

Nothing waits for the device; workspaces come from torch's allocator, so that calls can be captured
into graphs.

float32 operands are computed in float32, unless `torch.set_float32_matmul_precision("high")` or
`torch.backends.cuda.matmul.fp32_precision = "tf32"` allows tf32 for torch's own products: then the
products of policy terms are tf32 too, with sums and exponentials in float32. `top_k` never uses it.

A row must be a multiple of 16 bytes for the copies into shared memory: other embeddings are padded
with zeros first (a copy), and their gradients are narrowed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from offtower.ops.native import DTYPES, NativeCore, capsules, native_operands
from offtower.ops.reference import ReferenceCore
from offtower.ops.tiled_draws import DrawSettings, SoftmaxDraws
from offtower.ops.types import Operands, RewardOperands

_TFLOAT32 = 2
"""The core's number of float32 operands whose products may be rounded to tf32."""
_NO_REWARD, _DENSE, _IDENTITY, _SIGMOID = range(4)


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The module, or why there is none."""
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


class CUDACore(NativeCore):
    name = "cuda"

    def available(self) -> bool:
        """Whether the module is there and torch sees a GPU."""
        if not torch.cuda.is_available() or torch.version.cuda is None:
            return False
        return _load()[0] is not None

    def status(self) -> str:
        """What was built for which architectures, and what is missing."""
        module, found = _load()
        if module is None:
            return f"{found}. The reference serves on GPUs"
        if torch.version.cuda is None:
            return f"{found}; this torch has no CUDA"
        if not torch.cuda.is_available():
            return f"{found}; torch sees no NVIDIA GPU"
        names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return f"{found}; this machine has {', '.join(names)}"

    def refusal(self, x: Operands, k: int = 0) -> str:
        if x.context.device.type != "cuda" or x.context.dtype not in DTYPES:
            return (
                "takes float32 and bfloat16 tensors on NVIDIA GPUs, got "
                f"{x.context.dtype} on {x.context.device}"
            )
        return self.kernel_refusal(x, k)

    def kernel_refusal(self, x: Operands, k: int = 0) -> str:
        """Why the kernels do not take operands of these sizes, or ""."""
        module, found = _load()
        if module is None:
            return f"is {found}"
        if x.eligible is not None and x.eligible.excluded is not None:
            return "takes bitmaps of eligible items, not lists of excluded ones"
        if k > module.most_k:
            return f"finds the {module.most_k} best items at most, and k is {k}"
        reward = x.reward or RewardOperands()
        reason = module.refusal(
            dtype=_TFLOAT32 if _tfloat32(x) else DTYPES[x.context.dtype],
            items=x.items,
            dim=_padded_width(x.context),
            reward=_reward_kind(reward),
            reward_dim=0 if reward.context is None else _padded_width(reward.context),
            device=_device_number(x),
        )
        return f"cannot compute this: {reason}" if reason else ""

    def draw(self, x: Operands, settings: DrawSettings) -> SoftmaxDraws:
        """In plain torch on the device: there is no kernel for draws."""
        return ReferenceCore().draw(x, settings)

    def _prepare(self, x: Operands) -> Operands:
        reward = x.reward
        if reward is not None and reward.context is not None and reward.item is not None:
            reward = replace(reward, context=_padded(reward.context), item=_padded(reward.item))
        padded = replace(x, context=_padded(x.context), item=_padded(x.item), reward=reward)
        return super()._prepare(padded)

    def _prepare_array(self, array: Tensor) -> Tensor:
        plain = super()._prepare_array(array)
        return plain if plain.data_ptr() % 16 == 0 else plain.clone()

    def _run(
        self, function: str, x: Operands, arrays: Mapping[str, Tensor | None], **numbers: int
    ) -> None:
        """Ask how large the workspace must be, and launch on the current stream."""
        module, device = _load()[0], x.context.device
        assert module is not None
        guard: AbstractContextManager[Any] = nullcontext()
        stream = 0
        if device.type == "cuda":
            guard = torch.cuda.device(device)
            stream = torch.cuda.current_stream(device).cuda_stream
        call = functools.partial(
            getattr(module, function),
            native_operands(x, module.Operands, tfloat32=function != "top_k" and _tfloat32(x)),
            **capsules(arrays),
            **numbers,
            device=_device_number(x),
            stream=stream,
        )
        with guard:
            workspace = torch.empty(call(), dtype=torch.uint8, device=device)
            call(**capsules({"workspace": workspace}))


def _tfloat32(x: Operands) -> bool:
    """Whether products of policy terms of these operands may be rounded to tf32."""
    float32 = x.context.dtype == torch.float32
    return float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"


def _reward_kind(reward: RewardOperands) -> int:
    """Its number in csrc/operands.h."""
    if reward.dense is not None:
        return _DENSE
    if reward.context is None:
        return _NO_REWARD
    return _SIGMOID if reward.sigmoid else _IDENTITY


def _device_number(x: Operands) -> int:
    return x.context.get_device() if x.context.device.type == "cuda" else 0


def _padded_width(matrix: Tensor) -> int:
    """The next width whose rows fill whole 16 bytes."""
    unit = 16 // matrix.element_size()
    return -(-matrix.shape[1] // unit) * unit


def _padded(matrix: Tensor) -> Tensor:
    missing = _padded_width(matrix) - matrix.shape[1]
    return torch.nn.functional.pad(matrix.detach(), (0, missing)) if missing else matrix
