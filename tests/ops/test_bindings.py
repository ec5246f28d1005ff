"""The native module refuses arrays that its kernels would read or write out of bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from offtower.ops import available_instruction_sets

if not available_instruction_sets():
    pytest.skip("the native core is not built", allow_module_level=True)

from offtower.ops import _cpu

ROWS, ITEMS, DIM, WIDTH = 5, 9, 4, 3


def policy(**change: Tensor | None) -> Any:
    arrays: dict[str, Tensor | None] = {
        "context": torch.zeros(ROWS, DIM),
        "item": torch.zeros(ITEMS, DIM),
        "item_bias": torch.zeros(ITEMS),
        "action": torch.zeros(ROWS, dtype=torch.int64),
        "reward_context": torch.zeros(ROWS, WIDTH),
        "reward_item": torch.zeros(ITEMS, WIDTH),
        "reward_bias": torch.zeros(ITEMS),
        **change,
    }
    given: Any = {name: to_dlpack(array) for name, array in arrays.items() if array is not None}
    return _cpu.Operands(**given)


def call(name: str, operands: Any, arrays: dict[str, Tensor], **rest: Any) -> None:
    given: Any = {key: to_dlpack(array) for key, array in arrays.items()}
    getattr(_cpu, name)(operands, **given, **rest, threads=1, isa="")


OPERANDS: list[tuple[dict[str, Tensor | None], str]] = [
    ({"item": torch.zeros(ITEMS, DIM + 1)}, r"item must have shape \(9, 4\), but has \(9, 5\)"),
    ({"item": torch.zeros(ITEMS, DIM).bfloat16()}, r"item must be float32.*\(4, 16 bits\)"),
    ({"context": torch.zeros(ROWS, DIM).double()}, r"context must be float32.*\(2, 64 bits\)"),
    ({"context": torch.zeros(ROWS)}, "context must have two dimensions"),
    ({"context": torch.zeros(ROWS, 2 * DIM)[:, ::2]}, "context must be contiguous"),
    ({"item_bias": torch.zeros(ITEMS - 1)}, r"item_bias must have shape \(9,\)"),
    ({"action": torch.zeros(ROWS, dtype=torch.int32)}, "action must be int64"),
    ({"action": torch.zeros(ROWS - 1, dtype=torch.int64)}, r"action must have shape \(5,\)"),
    ({"reward_item": torch.zeros(ITEMS, WIDTH - 1)}, r"reward_item must have shape \(9, 3\)"),
    ({"reward_bias": torch.zeros(1)}, r"reward_bias must have shape \(9,\)"),
    ({"reward_item": None}, "must be given together"),
    ({"dense": torch.zeros(ROWS, ITEMS - 1)}, r"dense must have shape \(5, 9\)"),
    ({"group": torch.zeros(ROWS, dtype=torch.int32)}, "group and bitmap must be given together"),
    (
        {"group": torch.zeros(ROWS).long(), "bitmap": torch.zeros(1, 1).long()},
        "group must be int32",
    ),
    (
        {"group": torch.zeros(ROWS).int(), "bitmap": torch.zeros(1, 2).long()},
        r"bitmap must have shape \(1, 1\), but has \(1, 2\)",
    ),
    ({"excluded_items": torch.zeros(3).long()}, "excluded_offsets and excluded_items must be"),
    (
        {"excluded_offsets": torch.zeros(ROWS).long(), "excluded_items": torch.zeros(0).long()},
        r"excluded_offsets must have shape \(6,\)",
    ),
]


@pytest.mark.parametrize(("change", "message"), OPERANDS)
def test_operands_of_another_shape_or_type_are_refused(
    change: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        policy(**change)


RESULTS = (
    "log_prob",
    "log_normalizer",
    "expected_reward",
    "action_reward",
    "entropy",
    "reference_max",
)
RESULTS += ("total", "reward_sum", "centered_sum", "action_logit")


@pytest.mark.parametrize("name", RESULTS)
def test_forward_results_of_another_shape_or_type_are_refused(name: str) -> None:
    operands = policy()
    for wrong, message in (
        (torch.empty(ROWS, dtype=torch.bfloat16), f"{name} must be float32"),
        (torch.empty(ROWS, dtype=torch.float64), f"{name} must be float32"),
        (torch.empty(ROWS - 1), rf"{name} must have shape \(5,\), but has \(4,\)"),
        (torch.empty(2 * ROWS)[::2], f"{name} must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            call("forward", operands, {name: wrong})
    call("forward", operands, {name: torch.empty(ROWS)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_max": torch.zeros(ROWS - 1)}, r"reference_max must have shape \(5,\)"),
        ({"total": torch.zeros(ROWS).double()}, "total must be float32"),
        ({"g_log_prob": torch.zeros(1)}, r"g_log_prob must have shape \(5,\)"),
        ({"g_entropy": torch.zeros(ROWS)}, "g_entropy needs entropy"),
        ({"g_expected_reward": torch.zeros(ROWS)}, "g_expected_reward needs expected_reward"),
        ({"context": torch.zeros(ROWS, DIM).bfloat16()}, "context must be float32"),
        ({"item": torch.zeros(ITEMS, DIM - 1)}, r"item must have shape \(9, 4\)"),
        ({"item_bias": torch.zeros(ITEMS).half()}, "item_bias must be float32"),
    ],
)
def test_backward_arrays_of_another_shape_or_type_are_refused(
    change: dict[str, Tensor], message: str
) -> None:
    arrays = {"reference_max": torch.zeros(ROWS), "total": torch.ones(ROWS), **change}
    with pytest.raises(ValueError, match=message):
        call("backward", policy(), arrays)


@pytest.mark.parametrize(
    ("change", "k", "message"),
    [
        ({}, ITEMS + 1, r"k must lie in \[1, 9\]"),
        ({}, 0, r"k must lie in \[1, 9\]"),
        ({"score": torch.zeros(ROWS, 2)}, 3, r"score must have shape \(5, 3\)"),
        ({"score": torch.zeros(ROWS, 3).bfloat16()}, 3, "score must be float32"),
        ({"index": torch.zeros(ROWS, 3)}, 3, "index must be int64"),
    ],
)
def test_top_k_arrays_of_another_shape_or_type_are_refused(
    change: dict[str, Tensor], k: int, message: str
) -> None:
    arrays = {
        "score": torch.zeros(ROWS, k),
        "index": torch.zeros(ROWS, k, dtype=torch.int64),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        call("top_k", policy(), arrays, k=k)


def test_actions_beyond_the_items_are_refused() -> None:
    """Whoever calls the module directly has passed no check of the values."""
    operands = policy(action=torch.tensor([0, 1, ITEMS, 0, -1]))
    with pytest.raises(ValueError, match="action 9 in row 2 is out of range: there are 9 items"):
        call("forward", operands, {"log_prob": torch.empty(ROWS)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"group": torch.tensor([0, 0, 2, 0, 0]).int(), "bitmap": torch.zeros(2, 1).long()},
            "group 2 of row 2 is out of range: the bitmap has 2 rows",
        ),
        (
            {
                "excluded_offsets": torch.tensor([0, 0, 2, 1, 2, 2]),
                "excluded_items": torch.arange(2),
            },
            "excluded must have rising offsets, but they fall after row 2",
        ),
        (
            {
                "excluded_offsets": torch.tensor([0, 0, 0, 0, 0, 3]),
                "excluded_items": torch.arange(2),
            },
            "excluded must have offsets from 0 to 2",
        ),
        (
            {
                "excluded_offsets": torch.tensor([0, 0, 0, 0, 0, 1]),
                "excluded_items": torch.tensor([9]),
            },
            "excluded has item 9, out of range: there are 9",
        ),
    ],
)
def test_values_of_eligible_items_that_point_elsewhere_are_refused(
    change: dict[str, Tensor | None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call("forward", policy(**change), {"log_prob": torch.empty(ROWS)})


LISTS: list[tuple[dict[str, Tensor], str]] = [
    ({"matrix": torch.zeros(ITEMS, DIM + 1)}, r"matrix must have shape \(9, 4\)"),
    ({"matrix": torch.zeros(ITEMS, DIM).double()}, "must be float32"),
    ({"offsets": torch.zeros(ROWS).long()}, r"offsets must have shape \(6,\)"),
    ({"items": torch.full((7,), ITEMS)}, "has item 9, out of range: there are 9"),
    ({"items": torch.zeros(6).long()}, "must have"),
    ({"offsets": torch.tensor([0, 1, 3, 2, 3, 7])}, "rising offsets, but they fall after row 2"),
]


@pytest.mark.parametrize(("change", "message"), LISTS)
@pytest.mark.parametrize("function", ["list_dots", "list_sums"])
def test_lists_that_point_elsewhere_are_refused(
    function: str, change: dict[str, Tensor], message: str
) -> None:
    arrays = {
        "matrix": torch.zeros(ITEMS, DIM),
        "offsets": torch.tensor([0, 1, 3, 3, 5, 7]),
        "items": torch.zeros(7, dtype=torch.int64),
    }
    if function == "list_dots":
        arrays |= {"rows": torch.zeros(ROWS, DIM), "dots": torch.empty(7)}
    else:
        width = change.get("matrix", arrays["matrix"]).shape[1]
        if width != DIM:
            message = r"sums must have shape \(5, 5\)"
        arrays |= {"weight": torch.zeros(7), "sums": torch.empty(ROWS, DIM)}
    arrays |= change
    given: Any = {key: to_dlpack(array) for key, array in arrays.items()}
    with pytest.raises(ValueError, match=message):
        getattr(_cpu, function)(**given, threads=1, isa="")


def test_a_capsule_is_used_once() -> None:
    capsule = to_dlpack(torch.zeros(ROWS, DIM))
    torch.from_dlpack(capsule)
    with pytest.raises(ValueError, match="context must be an unused DLPack capsule"):
        _cpu.Operands(context=capsule, item=to_dlpack(torch.zeros(ITEMS, DIM)))


def test_operands_keep_their_arrays_alive() -> None:
    """The tensors behind the capsules have no other owner."""
    operands = _cpu.Operands(
        context=to_dlpack(torch.ones(ROWS, DIM)), item=to_dlpack(torch.ones(ITEMS, DIM))
    )
    others = [torch.full((ROWS, DIM), float(i)) for i in range(20)]
    found = torch.empty(ROWS)
    call("forward", operands, {"log_normalizer": found})
    torch.testing.assert_close(found, torch.full((ROWS,), DIM + torch.tensor(9.0).log().item()))
    assert len(others) == 20


@pytest.mark.parametrize(
    ("change", "numbers", "message"),
    [
        ({}, {"samples": 0}, "samples must lie in"),
        ({}, {"tile": 64}, "tile must be a positive multiple of 192, got 64"),
        ({}, {"tile": 0}, "tile must be a positive multiple of 192, got 0"),
        ({"stream": torch.zeros(ROWS - 1).long()}, {}, r"stream must have shape \(5,\)"),
        ({"item": torch.zeros(ROWS, 3)}, {}, "item must be int64"),
        ({"log_prob": torch.zeros(ROWS, 2)}, {}, r"log_prob must have shape \(5, 3\)"),
        ({"reference_max": torch.zeros(ROWS).double()}, {}, "reference_max must be float32"),
        ({"total": torch.zeros(1)}, {}, r"total must have shape \(5,\)"),
    ],
)
def test_arrays_of_draws_of_another_shape_or_type_are_refused(
    change: dict[str, Tensor], numbers: dict[str, int], message: str
) -> None:
    arrays = {
        "stream": torch.arange(ROWS),
        "item": torch.zeros(ROWS, 3, dtype=torch.int64),
        "log_prob": torch.zeros(ROWS, 3),
        "reference_max": torch.zeros(ROWS),
        "total": torch.zeros(ROWS),
        **change,
    }
    rest = {"samples": 3, "tile": 192, **numbers}
    with pytest.raises(ValueError, match=message):
        call("draw", policy(), arrays, replacement=True, seed=1, **rest)
