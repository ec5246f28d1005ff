"""Emulate a CUDA device on the CPU, for machines without a GPU.

A tensor "on" the device wraps a CPU tensor, and its operations run on that, so values, control flow
and whole trainings are real. The emulation adds the rules of a GPU: an operation that mixes device
and CPU tensors raises as in torch, reading a tensor's memory from Python raises, and operations
that make the host wait for the device are counted.

    with PretendGPU() as gpu:
        x = torch.arange(3, device="cuda:0")
        x + torch.arange(3)         # RuntimeError
        float(x.sum())              # counted in gpu.waits
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.utils import clip_grad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from offtower.ops.cuda_core import CUDACore

DEVICE = torch.device("cuda", 0)

aten = torch.ops.aten

_CROSSES = {aten.copy_.default, aten._to_copy.default}
"""Operations that may have operands on both devices."""
_WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten._unique2.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten.masked_select.default,
    aten._coalesce.default,
    aten.equal.default,
    aten.bincount.default,
}
"""Operations whose result, or its shape, is needed by the host."""
_READS = {torch.Tensor.numpy, torch.Tensor.data_ptr, torch.Tensor.__array__}

_GROUP = "_group_tensors_by_device_and_dtype"

_current: list[PretendGPU] = []


class GPUTensor(Tensor):
    """A CPU tensor that reports to be on the GPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> GPUTensor:
        made: GPUTensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=None if held.layout == torch.sparse_coo else held.stride(),
            storage_offset=None if held.layout == torch.sparse_coo else held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=held.device,
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:
        return f"GPUTensor({self.held!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS:
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")
        if func is torch.Tensor.tolist:
            _wait("tolist")
            return args[0].held.tolist()
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def get_device(self) -> int:
        return 0


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    theirs = [x for x in tensors if not isinstance(x, GPUTensor)]
    if func is aten.stack.default:
        # Backward of unbind: torch's C++ creates zeros for unused outputs on the wrapped tensor's
        # device.
        theirs = [x for x in theirs if x.count_nonzero()]
    if func not in _CROSSES and any(x.dim() > 0 for x in theirs):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, cuda:0 "
            f"and cpu, in {func} of {[(type(x).__name__, tuple(x.shape)) for x in tensors]}"
        )
    _count(func, args, kwargs)
    own = {id(x.held): x for x in tensors if isinstance(x, GPUTensor)}

    def inner(x: Any) -> Any:
        return x.held if isinstance(x, GPUTensor) else x

    def outer(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return own[id(x)] if id(x) in own else GPUTensor(x)

    result = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    if func is aten.copy_.default and not isinstance(args[0], GPUTensor):
        return args[0]
    return tree_map(outer, result)


def _count(func: Any, args: Any, kwargs: Any) -> None:
    waits = func in _WAITS
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        index = [x for x in args[1] if x is not None]
        waits = any(x.dtype in (torch.bool, torch.uint8) for x in index)
    if func is aten.repeat_interleave.Tensor:
        waits = kwargs.get("output_size") is None
    if func is aten.copy_.default and isinstance(args[0], GPUTensor) != isinstance(
        args[1], GPUTensor
    ):
        # Copies from pinned memory are asynchronous; the host waits for copies back.
        waits = isinstance(args[1], GPUTensor)
    if waits:
        _wait(str(func))


def _wait(what: str) -> None:
    if _current:
        _current[-1].waits[what] += 1


class _Devices(TorchFunctionMode):
    """Create and move tensors for device "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return self._move(func, args, kwargs)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
            if isinstance(kwargs.get("generator"), torch.Generator):
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            made = func(*args, **kwargs)
            return made if isinstance(made, GPUTensor) else GPUTensor(made)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.backward:
            return self._backward(args[0])
        return func(*args, **kwargs)

    def _backward(self, loss: Tensor) -> None:
        """Run autograd inside this mode: Python backward functions create tensors too."""
        first = torch.ones_like(loss)
        with self:
            torch.autograd.graph._engine_run_backward(
                (loss,), (first,), False, False, (), allow_unreachable=True, accumulate_grad=True
            )

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor, rest = args[0], list(args[1:])
        target: torch.device | None = None
        if func is torch.Tensor.cuda:
            target = DEVICE
        elif func is torch.Tensor.cpu:
            target = torch.device("cpu")
        elif "device" in kwargs:
            target = None if kwargs["device"] is None else torch.device(kwargs.pop("device"))
        elif rest and isinstance(rest[0], (str, torch.device, int)):
            target = torch.device(rest.pop(0))
        elif rest and isinstance(rest[0], Tensor):
            target = rest[0].device
            kwargs.setdefault("dtype", rest.pop(0).dtype)
        kwargs.pop("non_blocking", None)
        # The remaining arguments are a dtype, None, or flags without effect here.
        rest = [x for x in rest if isinstance(x, torch.dtype)]
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        moved = torch.Tensor.to(tensor, *rest, **kwargs) if rest or kwargs else tensor
        if target is None or target.type == moved.device.type:
            return moved
        return _Across.apply(moved)


class _Across(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        if isinstance(tensor, GPUTensor):
            _wait("to the CPU")
            return tensor.held.clone()
        return GPUTensor(tensor.detach().clone())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Across.apply(gradients[0])


class PretendGPU:
    """Context manager in which device "cuda" exists, for this thread.

    Attributes:
        waits: the number of times that the host waited for the device, by operation.
    """

    def __init__(self) -> None:
        self.waits: Counter[str] = Counter()
        self._mode = _Devices()
        self._before = False

    def __enter__(self) -> PretendGPU:
        # Module.to must replace parameters: a wrapper cannot become the data of a plain tensor.
        self._before = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        _current.append(self)
        # torch's C++ sees the wrapped tensors and would group gradients by the CPU.
        self._patches = (
            patch.object(clip_grad, _GROUP, _grouped(getattr(clip_grad, _GROUP))),
            # A built CUDA core would look for a GPU.
            patch.object(CUDACore, "kernel_refusal", lambda *_: "needs a real GPU"),
        )
        for one in self._patches:
            one.start()
        self._mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._mode.__exit__(*error)
        for one in self._patches:
            one.stop()
        _current.pop()
        torch.__future__.set_overwrite_module_params_on_conversion(self._before)


def _grouped(group: Callable[..., Any]) -> Callable[..., Any]:
    def grouped(lists: list[list[Tensor]], *rest: Any) -> dict[Any, Any]:
        found = group(lists, *rest).items()
        return {(parts[0][0][0].device, dtype): parts for (_, dtype), parts in found}

    return grouped


def _is_cuda(device: Any) -> bool:
    if device is None:
        return False
    return torch.device(device).type == "cuda"
