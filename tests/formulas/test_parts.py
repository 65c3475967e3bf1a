"""Ops that launch several kernels: which ones PyTorch dispatches, and that the parts make the whole."""

from collections.abc import Callable
from typing import Any

import torch
from formulas.one_op import add_up
from fxroof.analyzer.graph import Graph
from fxroof.analyzer.kernels import eager_kernels
from fxroof.analyzer.meta import on_meta
from fxroof.analyzer.pricing import price
from fxroof.analyzer.trace import trace
from fxroof.hardware.catalog import load
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

H100 = load("h100_sxm").gpu
_NO_KERNEL = {
    "view", "_unsafe_view", "t", "transpose", "expand", "unsqueeze", "squeeze_", "permute", "select", "slice",
    "as_strided", "alias", "detach", "lift_fresh", "unbind", "split", "_reshape_alias", "squeeze",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """The ops that remain when composite ones have dispatched, and the bytes that copies among them write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.copied = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name not in _NO_KERNEL:
            self.names.append(name)
        if name == "clone":
            self.copied += result.numel() * result.element_size()
        return result


class Call(nn.Module):
    def __init__(self, forward: Callable[..., torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
        super().__init__()
        self.function = forward
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return self.function(*args, *self.parameters())


def traced(forward: Callable[..., torch.Tensor], args: list[torch.Tensor], **weights: torch.Tensor) -> Graph:
    return trace(on_meta(Call(forward, weights).eval()), tuple(args))


def recorded(forward: Callable[..., torch.Tensor], args: list[torch.Tensor], **weights: torch.Tensor) -> Recorder:
    module = Call(forward, weights)
    with torch.no_grad(), Recorder() as recorder:
        module(*args)
    return recorder


@st.composite
def layouts(draw: st.DrawFn, rank: int, last: int) -> torch.Tensor:
    """A tensor on meta whose dimensions lie in memory in any order, the last of the given size."""
    shape = [*(draw(st.integers(1, 4)) for _ in range(rank - 1)), last]
    order = draw(st.permutations(range(rank)))
    memory = torch.empty([shape[d] for d in order], device="meta")
    return memory.permute([order.index(d) for d in range(rank)])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_linear_copies_and_adds_its_bias_as_pytorch_dispatches(data: st.DataObject) -> None:
    x = data.draw(layouts(data.draw(st.integers(1, 4)), 6))
    weights = {"weight": torch.empty(5, 6, device="meta")}
    if data.draw(st.booleans()):
        weights["bias"] = torch.empty(5, device="meta")
    _agree(nn.functional.linear, [x], weights)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_matmul_copies_as_pytorch_dispatches(data: st.DataObject) -> None:
    left = data.draw(layouts(data.draw(st.integers(2, 4)), 6))
    batch = left.shape[:-2] if data.draw(st.booleans()) else ()
    order = data.draw(st.permutations(range(len(batch) + 2)))
    shape = (*batch, 6, 3)
    right = torch.empty([shape[d] for d in order], device="meta").permute([order.index(d) for d in range(len(shape))])
    _agree(torch.matmul, [left, right], {})


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    mask=st.sampled_from(["none", "bool", "float"]),
    causal=st.booleans(),
    gqa=st.booleans(),
    head_dim=st.sampled_from([20, 64, 300]),
    gpu=st.sampled_from(["h100_sxm", "t4", "mi300x", "m2_ultra"]),
)
def test_the_kernels_of_attentionadd_up(
    *, dtype: torch.dtype, mask: str, causal: bool, gqa: bool, head_dim: int, gpu: str
) -> None:
    def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    keys = [meta(2, 2 if gqa else 4, 24, head_dim) for _ in range(2)]
    masks = {"none": None, "bool": meta(24, 24, dtype=torch.bool), "float": meta(24, 24)}
    chosen = None if causal else masks[mask]

    def attend(*given: torch.Tensor) -> torch.Tensor:
        bias = given[3] if len(given) > 3 else None
        return nn.functional.scaled_dot_product_attention(*given[:3], attn_mask=bias, is_causal=causal, enable_gqa=gqa)

    graph = traced(attend, [meta(2, 4, 24, head_dim), *keys, *([chosen] if chosen is not None else [])])
    (cost,) = (c for c in price(graph, load(gpu).gpu) if c.backend)
    add_up(graph, cost)
    assert cost.backend != "math" or gpu == "m2_ultra" or len(cost.parts) > 6


def _agree(forward: Callable[..., torch.Tensor], args: list[torch.Tensor], weights: dict[str, torch.Tensor]) -> None:
    graph = traced(forward, args, **weights)
    seen = recorded(forward, args, **weights)
    (cost,) = (c for c in price(graph, H100) if c.matmul)
    kernels = [k for k in eager_kernels(graph, price(graph, H100)) if "copy_" not in k.name]
    assert len(kernels) == len(seen.names), (seen.names, [k.name for k in kernels])
    assert sum(p.cost.scratch_written for p in cost.parts if p.name.startswith("copy")) == seen.copied
    add_up(graph, cost)
