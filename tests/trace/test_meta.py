"""User code meets the meta device: devices, autocast, small real tensors, ties."""

from typing import Any

import pytest
import torch
from fxroof.analyzer.errors import TraceError
from fxroof.analyzer.graph import Graph, Role
from fxroof.analyzer.load import from_module
from fxroof.analyzer.meta import SMALL, building, expose_plain_tensors, on_meta, tracing
from fxroof.analyzer.trace import trace
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode


def traced(module: nn.Module, *args: torch.Tensor) -> Graph:
    meta = on_meta(module)
    expose_plain_tensors(meta)
    return trace(meta.eval(), tuple(a.to("meta") for a in args))


def dtypes_of_matmuls(graph: Graph) -> list[str]:
    return [
        graph.tensors[op.inputs[0]].dtype for op in graph.ops if op.target.startswith(("aten.linear", "aten.matmul"))
    ]


class Mixed(nn.Module):
    def __init__(self, device: str) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))
        self.device = device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16):
            x = self.a(x)
            x = torch.softmax(x, -1)
            x = torch.matmul(x, x.transpose(-1, -2)) @ x
            with torch.autocast(self.device, enabled=False):
                x = self.b(x.float())
        return self.c(x)


class MatmulDtypes(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("addmm", "mm", "bmm"):
            operand = args[1] if name == "addmm" else args[0]
            self.seen.append(str(operand.dtype).removeprefix("torch."))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_autocast_computes_in_the_types_that_real_autocast_does(device: str) -> None:
    x = torch.randn(2, 4, 8)
    with torch.no_grad(), MatmulDtypes() as real:
        Mixed("cpu")(x)
    graph = traced(Mixed(device), x)
    assert dtypes_of_matmuls(graph) == real.seen == ["bfloat16", "bfloat16", "bfloat16", "float32", "float32"]
    assert not [op for op in graph.ops if op.target.startswith("higher_order")]


def test_autocast_charges_the_cast_of_the_weight() -> None:
    graph = traced(Mixed("cuda"), torch.randn(2, 4, 8))
    casts = [op for op in graph.ops if op.target.startswith("aten.to") and graph.role(op.inputs[0]) is Role.WEIGHT]
    assert len(casts) == 2  # weight and bias of the one linear under autocast


def test_autocast_is_put_back() -> None:
    before = torch.autocast.__init__
    with tracing():
        assert torch.autocast.__init__ is not before
    assert torch.autocast.__init__ is before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.is_autocast_enabled("cpu")


class Cuda(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4, device="cuda").cuda()
        self.table = torch.arange(4.0).cuda()
        self.depths = [float(x.item()) for x in torch.linspace(0, 1, 3)]
        self.big = torch.zeros(SMALL + 1)
        self.to("cuda:0")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        noise = torch.zeros(4, device="cuda")
        return self.linear(x.to("cuda", non_blocking=True)).cuda() + noise + self.table.to(x.device, torch.float16)


def test_cuda_code_builds_and_traces_without_cuda() -> None:
    with building():
        module = Cuda()
    assert module.depths == [0.0, 0.5, 1.0]
    assert all(p.is_meta for p in module.parameters())
    assert not module.table.is_meta, "small tensors keep their values"
    assert module.big.is_meta
    graph = traced(module, torch.empty(2, 4))
    assert [op.target for op in graph.ops if op.target.startswith("aten.linear")]


class Blocks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            x = x @ x
        with torch.inference_mode():
            y = x @ x
        return x + y.clone()


def test_grad_mode_regions_hide_nothing() -> None:
    graph = traced(Blocks(), torch.randn(4, 4))
    assert dtypes_of_matmuls(graph) == ["float32", "float32"]


def test_ties_and_views_of_one_storage_survive() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(16, 8)
            self.head = nn.Linear(8, 16, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("table", torch.randn(6, 8))
            self.register_buffer("part", self.table[:3])

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids)) + (self.table.sum() + self.part.sum())

    real = Tied()
    model = from_module(real)
    assert model.parameters == 16 * 8
    assert not real.embed.weight.is_meta, "the caller's module is left as it is"
    graph = traced(real, torch.zeros(2, dtype=torch.int64))
    weights = [s for s in graph.storages if s.role is Role.WEIGHT]
    assert sorted(s.nbytes for s in weights) == [6 * 8 * 4, 16 * 8 * 4]


def test_building_under_the_mode_keeps_ties() -> None:
    with building():
        embed = nn.Embedding(16, 8)
        head = nn.Linear(8, 16, bias=False)
        head.weight = embed.weight
        shared = nn.ModuleList([embed, head])
    assert sum(p.numel() for p in shared.parameters()) == 16 * 8


def test_nothing_asks_whether_it_is_being_exported() -> None:
    class Asks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.compiler.is_exporting() or torch.compiler.is_compiling() or torch.compiler.is_dynamo_compiling():
                return x
            return x @ x

    assert dtypes_of_matmuls(traced(Asks(), torch.randn(4, 4))) == ["float32"]
    assert torch.compiler.is_exporting() is False


def test_data_dependent_code_is_named_with_its_line() -> None:
    class Reads(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.sum() > 0:
                return x
            return F.relu(x)

    with pytest.raises(TraceError) as caught:
        traced(Reads(), torch.randn(4))
    assert "test_meta.py:" in caught.value.message
    assert "values" in caught.value.message
    assert caught.value.hint


def test_in_place_writes_show_as_aliases() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("cache", torch.zeros(8, 4), persistent=False)

        def forward(self, x: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
            self.cache[position] = x
            return self.cache.sum()

    graph = traced(Writes(), torch.randn(1, 4), torch.zeros(1, dtype=torch.int64))
    (cache,) = [s for s in graph.storages if s.name == "cache"]
    assert cache.role is Role.KV_CACHE
