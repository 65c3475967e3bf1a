"""Costs of single operators that others have published: PyTorch's own tests, fvcore's tests, definitions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from formulas.one_op import cost_of, traffic_of
from fxroof.hardware.catalog import load

CASES = json.loads((Path(__file__).parent.parent / "data" / "op_cases.json").read_text())
_DTYPES = {"bfloat16": torch.bfloat16}


@pytest.mark.parametrize("case", CASES["flops"], ids=lambda c: c["id"])
def test_matmul_flops(case: dict[str, Any]) -> None:
    assert cost_of(_target(case), *_args(case), gpu=load("h100").gpu).matmul_flops == case["flops"]


@pytest.mark.parametrize("case", CASES["bytes"], ids=lambda c: c["id"])
def test_bytes(case: dict[str, Any]) -> None:
    assert sum(traffic_of(_target(case), *_args(case))) == case["bytes"]


def test_padding_a_bias_or_a_batch_norm_changes_no_matmul_flops() -> None:
    source, weight = torch.empty(2, 3, 6, 6, device="meta"), torch.empty(6, 3, 4, 4, device="meta")
    bias = torch.empty(6, device="meta")
    plain = cost_of(torch.ops.aten.conv2d.default, source, weight, None, [1, 1], [1, 1])
    biased = cost_of(torch.ops.aten.conv2d.default, source, weight, bias, [1, 1], [1, 1])
    assert biased.matmul == plain.matmul
    assert biased.vector_flops - plain.vector_flops == 2 * 6 * 5 * 5


def test_batch_norm_in_inference_is_a_multiply_add_per_element() -> None:
    # fvcore tests/test_flop_count.py: 100 multiply-adds for [10, 10] without affine, 200 with
    stats = [torch.empty(10, device="meta") for _ in range(2)]
    cost = cost_of(
        torch.ops.aten.batch_norm.default,
        torch.empty(10, 10, device="meta"), None, None, *stats, False, 0.1, 1e-5, True,
    )  # fmt: skip
    per_channel = 2 * 10
    assert cost.vector_flops == 2 * 100 + per_channel
    assert cost.special == 10


def _target(case: dict[str, Any]) -> Any:
    _, packet, overload = case["target"].split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def _args(case: dict[str, Any]) -> list[Any]:
    named: dict[str, torch.Tensor] = {}

    def build(value: Any) -> Any:
        if isinstance(value, list):
            return [build(v) for v in value]
        if not isinstance(value, dict):
            return _DTYPES.get(value, value) if isinstance(value, str) else value
        made = torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]), device=case.get("device", "meta"))
        if "name" in value:
            made = named.setdefault(value["name"], made)
        return made.mT if value.get("transposed") else made

    return [build(a) for a in case["args"]]
