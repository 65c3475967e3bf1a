"""What a forward keeps on the host, and the copies that a trace shows of it."""

from collections.abc import Callable

import pytest
import torch
from fxroof.analyzer import residence
from fxroof.analyzer.graph import Graph, Role
from fxroof.analyzer.meta import building, on_meta, tracing
from fxroof.analyzer.pricing import price
from fxroof.analyzer.roofline import Bound, place
from fxroof.analyzer.trace import trace
from fxroof.hardware.catalog import load
from torch import nn
from torch.nn import functional as F

H100 = load("h100_sxm").gpu
WIDTH = 8
Function = Callable[["Model", torch.Tensor], torch.Tensor]


class Model(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.embed = nn.Embedding(16, WIDTH)
        self.register_buffer("table", torch.ones(WIDTH))
        self.device = torch.device("cpu")  # as a script has it where torch.cuda.is_available() says no
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def traced(function: Function, *shape: int) -> Graph:
    return trace(on_meta(Model(function)).eval(), (torch.empty(shape or (2, WIDTH), device="meta"),))


def copies(function: Function, *shape: int) -> list[str]:
    """Copies in order: where to, and the name of what is moved, if that is a weight."""
    graph = traced(function, *shape)
    return [
        " ".join(
            [op.target.split(".")[1]]
            + [graph.storages[graph.tensors[i].storage].name for i in op.inputs if graph.role(i) is Role.WEIGHT]
        )
        for op in graph.ops
        if op.target.startswith("fxroof.")
    ]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.linear(x.cuda()),
        lambda m, x: m.linear(x.to("cuda:0", non_blocking=True)).cuda(non_blocking=True),
        lambda m, x: F.linear(x, m.linear.weight.to(x.device)) + m.table.to("cuda"),
        lambda m, x: m.linear.to("cuda")(x),
        lambda m, x: m.linear.cuda()(x).to(x.device, torch.float16),
        lambda m, x: x.to(m.device) + torch.arange(WIDTH, device=m.device),  # the device of the run
        lambda m, x: x + torch.arange(WIDTH),  # only runs if the default device is the GPU
        lambda m, x: x + torch.arange(WIDTH, device=x.device).to(x),
        lambda m, x: x + torch.zeros_like(x).cuda(),
        lambda m, x: x * 2.0 + torch.tensor(3.0),
        lambda m, x: x.to(torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")),
    ],
)
def test_what_is_on_the_device_already_is_not_copied(function: Function) -> None:
    assert copies(function) == []


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda m, x: x.cpu(), ["to_host"]),
        (lambda m, x: x.to("cpu").cpu().to(device="cpu"), ["to_host"]),
        (lambda m, x: (x.cpu() + 1).to(x.device).cuda(), ["to_host", "to_device"]),
        (lambda m, x: x.cpu()[0].view(-1).cuda(), ["to_host", "to_device"]),
        (lambda m, x: x + torch.arange(WIDTH).cuda(), ["to_device"]),
        (lambda m, x: x + torch.arange(WIDTH, device="cpu").to(x.device), ["to_device"]),
        (lambda m, x: x + torch.arange(WIDTH).to(m.device), ["to_device"]),
        (lambda m, x: x + torch.arange(WIDTH).type_as(x), ["to_device"]),
        (lambda m, x: x + torch.as_tensor(torch.arange(WIDTH), device="cuda"), ["to_device"]),
        (lambda m, x: x + torch.tensor([1.0] * WIDTH).cuda(), ["to_device"]),
        (lambda m, x: x + x.cpu().new_ones(WIDTH).cuda(), ["to_host", "to_device"]),
        (lambda m, x: x + torch.ones(WIDTH, device=x.cpu().device).cuda(), ["to_host", "to_device"]),
        (lambda m, x: m.embed(x.long().cpu()).cuda(), ["to_host", "to_device"]),  # a table that stays on the host
    ],
)
def test_a_move_is_an_op(function: Function, found: list[str]) -> None:
    assert copies(function) == found


def test_a_step_begins_with_weights_where_the_one_before_left_them() -> None:
    def bring(model: Model, x: torch.Tensor) -> torch.Tensor:
        x = model.linear.to("cuda")(x)
        model.linear.to("cpu")
        return x

    weights = ["linear.weight", "linear.bias"]
    assert copies(bring) == [f"move_to_{where} {name}" for where in ("device", "host") for name in weights]
    graph = traced(bring)
    (linear,) = (op for op in graph.ops if op.target.startswith("aten.linear"))
    assert [graph.role(i) for i in linear.inputs[1:]] == [Role.WEIGHT, Role.WEIGHT]


def test_tied_weights_cross_once() -> None:
    def bring(model: Model, x: torch.Tensor) -> torch.Tensor:
        pair = nn.ModuleList([model.linear, model.linear])
        x = pair.cuda()[1](x)
        pair.cpu()
        return x

    assert len(copies(bring)) == 4


def test_values_are_known_after_a_move() -> None:
    def branch(_: Model, x: torch.Tensor) -> torch.Tensor:
        chosen = torch.tensor([0, 2]).cuda()
        return x.cos() if (chosen.cpu() > 1).any() and chosen.max().item() == 2 else x.sin()

    assert "aten.cos.default" in [op.target for op in traced(branch).ops]


def test_building_is_left_alone() -> None:
    class Built(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH, device="cpu").cpu().cuda()
            self.register_buffer("table", torch.arange(WIDTH, device="cpu").cuda())
            self.to("cpu").to("cuda")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear.to("cuda")(x) + self.table.to(x.device)

    with building():
        model = Built()
    graph = trace(on_meta(model), (torch.empty(2, WIDTH, device="meta"),))
    assert not [op for op in graph.ops if op.target.startswith("fxroof.")]


def test_a_default_device_is_where_things_are_made() -> None:
    try:
        with building():
            torch.set_default_device("cuda")
        assert copies(lambda _, x: x + torch.arange(WIDTH).cuda()) == []
    finally:
        residence.default_to(None)


def test_a_forward_that_is_only_run_works_too() -> None:
    with tracing():
        y = torch.empty(2, device="meta").cpu()
    assert y.is_meta


def test_bytes_cross_the_link_and_device_memory_on_its_side() -> None:
    def there_and_back(_: Model, x: torch.Tensor) -> torch.Tensor:
        return (x[:, ::2].cpu() + 1).to("cuda", non_blocking=True)

    graph = traced(there_and_back, 1 << 20, WIDTH)
    costs = dict(zip((op.target for op in graph.ops), price(graph, H100), strict=True))
    off, on = costs["fxroof.to_host.default"], costs["fxroof.to_device.default"]
    nbytes = (1 << 20) * WIDTH // 2 * 4
    assert off.exchange
    assert on.exchange
    assert (off.exchange.nbytes, on.exchange.nbytes) == (nbytes, nbytes)
    assert (off.waits, on.waits) == (True, False)
    assert (sum(a.read for a in off.traffic), sum(a.written for a in off.traffic)) == (nbytes, 0)
    assert (off.scratch_written, on.scratch_written) == (nbytes, 0)  # what has gaps is made dense first
    assert (sum(a.read for a in on.traffic), sum(a.written for a in on.traffic)) == (0, nbytes)
    found = place(on, nbytes, nbytes, H100)
    assert (found.bound, found.seconds) == (Bound.LINK, pytest.approx(nbytes / 64e9))


def test_an_unpublished_link_is_said_to_be_unpriced() -> None:
    graph = traced(lambda _, x: x.cpu())
    (cost,) = price(graph, load("m2_ultra").gpu)
    assert "not priced" in cost.note
