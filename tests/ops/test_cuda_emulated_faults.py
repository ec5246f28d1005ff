"""Whether the emulation of a thread block sees what a kernel has forgotten, or is given wrongly."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from tests.ops import cuda_emulation
from tests.ops.cases import Case

pytestmark = pytest.mark.skipif(
    bool(cuda_emulation.why_not()), reason=cuda_emulation.why_not() or "runs"
)

FAULTS = [
    ("sm_80", torch.bfloat16, ("syncthreads", "cp_async_wait_group")),
    ("sm_80", torch.float32, ("syncwarp",)),
    (
        "sm_90",
        torch.bfloat16,
        ("fence_barrier_init", "expect_tx", "wait_empty", "wait_full", "syncwarp"),
    ),
    (
        "sm_90",
        torch.bfloat16,
        ("warpgroup_arrive", "warpgroup_commit_batch", "warpgroup_wait", "swizzle"),
    ),
]


@pytest.mark.parametrize(
    ("on", "dtype", "fault"), [(on, dtype, fault) for on, dtype, all_ in FAULTS for fault in all_]
)
def test_a_forgotten_operation_shows(
    on: str, dtype: torch.dtype, fault: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulation leaves one kind of synchronisation out of every kernel: errors, or other bits.

    Else the tests around this one would pass kernels that only work by luck.
    """
    cuda_emulation.put_in_place(module, on, monkeypatch)
    case = Case(40, 700, 72, "sigmoid", dtype)
    whole = case.native("auto")
    monkeypatch.setenv("OFFTOWER_EMULATION_WITHOUT", fault)
    shown = False
    for seed in range(8):
        monkeypatch.setenv("OFFTOWER_EMULATION_SEED", str(seed))
        try:
            shown |= not all(
                torch.equal(value, whole[name]) for name, value in case.native("auto").items()
            )
        except RuntimeError:
            shown = True
        if shown:
            return
    pytest.fail(f"a kernel without {fault} gives the same bits")


def test_the_copy_engine_is_not_given_what_it_cannot_take(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Operands come aligned from Python; others are refused by name before the driver sees them."""
    monkeypatch.setenv("OFFTOWER_EMULATED_DEVICE", cuda_emulation.DEVICES["sm_90"])
    u, v = torch.randn(4, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    out, workspace = torch.empty(4), torch.empty(1 << 20, dtype=torch.uint8)

    def run(context: Tensor, item: Tensor) -> None:
        operands = module.Operands(context=to_dlpack(context), item=to_dlpack(item))
        module.forward(
            operands, log_normalizer=to_dlpack(out), device=0, workspace=to_dlpack(workspace)
        )

    run(u, v)
    with pytest.raises(RuntimeError, match="starts on 16 bytes"):
        run(torch.cat([u.flatten(), u[0]])[1:257].view(4, 64), v)
    with pytest.raises(RuntimeError, match="whole 16 bytes"):
        run(u[:, :60].contiguous(), v[:, :60].contiguous())
