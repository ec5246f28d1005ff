"""Faults that the emulated thread block must detect: omitted synchronization, invalid operands."""

from __future__ import annotations

import re
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
def test_omitted_synchronization_is_detected(
    on: str, dtype: torch.dtype, fault: str, module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one kind of synchronization, kernels raise an error or give different bits.

    Otherwise the other tests of the emulation could pass kernels that synchronize too little.
    """
    cuda_emulation.put_in_place(module, on, monkeypatch)
    case = Case(40, 700, 72, "sigmoid", dtype)
    whole = case.native("auto")
    monkeypatch.setenv("OFFTOWER_EMULATION_WITHOUT", fault)
    detected = False
    for seed in range(8):
        monkeypatch.setenv("OFFTOWER_EMULATION_SEED", str(seed))
        try:
            detected |= not all(
                torch.equal(value, whole[name]) for name, value in case.native("auto").items()
            )
        except RuntimeError:
            detected = True
        if detected:
            return
    pytest.fail(f"kernels without {fault} give the same bits")


def test_operands_that_tma_cannot_load_raise(
    module: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python aligns operands; the launcher names the requirement where it is not met."""
    monkeypatch.setenv("OFFTOWER_EMULATED_DEVICE", cuda_emulation.DEVICES["sm_90"])
    u, v = torch.randn(4, 64).bfloat16(), torch.randn(300, 64).bfloat16()
    out, workspace = torch.empty(4), torch.empty(1 << 20, dtype=torch.uint8)

    def run(context: Tensor, item: Tensor) -> None:
        operands = module.Operands(context=to_dlpack(context), item=to_dlpack(item))
        module.forward(
            operands, log_normalizer=to_dlpack(out), device=0, workspace=to_dlpack(workspace)
        )

    run(u, v)
    with pytest.raises(RuntimeError, match="start on 16 bytes"):
        run(torch.cat([u.flatten(), u[0]])[1:257].view(4, 64), v)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        run(u[:, :60].contiguous(), v[:, :60].contiguous())


REFUSED = "built for sm_{built}, and device 0 has compute capability {has}; .*ARCHITECTURES={need}"


@pytest.mark.parametrize(
    ("architectures", "device", "reason"),
    [
        ("80_90a", "sm_80", ""),
        ("80_90a", "sm_86", ""),
        ("80_90a", "sm_90", ""),
        ("90a", "sm_90", ""),
        ("90a", "sm_80", REFUSED.format(built="90a", has=r"8\.0", need=80)),
        ("86", "sm_90", ""),  # its PTX is compiled for later devices when it is loaded
        ("86_90a", "sm_80", REFUSED.format(built="86, sm_90a", has=r"8\.0", need=80)),
    ],
)
def test_devices_without_built_kernels_are_refused(
    architectures: str,
    device: str,
    reason: str,
    module: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that backend "auto" falls back to the reference; a launch would fail."""
    monkeypatch.setenv("OFFTOWER_EMULATED_DEVICE", cuda_emulation.DEVICES[device])
    monkeypatch.setenv("OFFTOWER_EMULATED_ARCHITECTURES", architectures)
    refusal = module.refusal(dtype=1, items=300, dim=64, reward=0, reward_dim=0, device=0)
    assert re.search(reason, refusal) if reason else refusal == ""
