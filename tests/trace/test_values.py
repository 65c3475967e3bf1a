"""Forwards that look at tensors take the branch that they take on a device that has values."""

import pytest
import torch
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.errors import TraceError
from fxroof.analyzer.graph import Graph
from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.trace import trace
from fxroof.analyzer.values import assuming
from fxroof.hardware.catalog import load
from torch import nn
from torch.nn import functional as F

H100 = load("h100_sxm").gpu
META = torch.device("meta")


def targets(graph: Graph) -> list[str]:
    return [op.target.rsplit(".", 1)[0] for op in graph.ops]


class Looks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(x.shape[0], 8, dtype=torch.int64, device=x.device)
        positions = mask.cumsum(-1) - 1
        if mask.all() and int(positions.max()) == 7 and positions[:, -1].tolist() == [7] * x.shape[0]:
            x = F.relu(x)
        mask[:, 0] = 0
        if not bool(mask.bool().all()):
            x = F.silu(x)
        if 3 in positions:
            x = torch.tanh(x)
        return x[: mask.sum().item() // 7]


def test_values_that_follow_from_constants_are_known() -> None:
    graph = trace(Looks(), (torch.empty(2, 4, device=META),))
    assert {"aten.relu", "aten.silu", "aten.tanh"} <= set(targets(graph))
    assert graph.tensors[graph.outputs[0]].shape == Looks()(torch.randn(2, 4)).shape


class Half(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones(4, device=x.device)
        mask[0] = x.sum()  # from here on nothing is known of it
        if mask.all():
            return x
        return F.relu(x)


def test_what_activations_were_written_into_is_unknown() -> None:
    with pytest.raises(TraceError, match="values"):
        trace(Half(), (torch.empty(2, 4, device=META),))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.head = nn.Linear(16, 32)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        lengths = (tokens != 0).sum(-1)
        if lengths.max().item() == tokens.shape[1]:
            return self.head(self.embed(tokens))
        return self.embed(tokens)


def test_token_ids_are_known_and_are_no_padding() -> None:
    with torch.device("meta"):
        model = Gated()
    report = analyze(model, gpus=["h100_sxm"], scenario=Scenario(input_len=8, output_len=4))
    assert report.runs[0].phases[0].flops.matmul == 2 * 8 * 16 * 32


class Routed(nn.Module):
    """Experts in a Python loop over the tokens that chose them."""

    def __init__(self, experts: int, chosen: int, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(experts))
        self.chosen = chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, picks = torch.topk(F.softmax(self.router(x), dim=-1), self.chosen, dim=-1)
        out = torch.zeros_like(x)
        counts = torch.bincount(picks.flatten(), minlength=len(self.experts)).tolist()
        for index, expert in enumerate(self.experts):
            if counts[index] == 0:
                continue
            rows, slots = torch.where(picks == index)
            out[rows] += expert(x[rows]) * weights[rows, slots, None]
        return out


@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(16, 8, 2), (4, 8, 1), (64, 4, 2)])
def test_expert_loops_trace_under_stated_balanced_routing(tokens: int, experts: int, chosen: int) -> None:
    width = 32
    module = Routed(experts, chosen, width).to("meta")
    x = torch.empty(tokens, width, device=META)
    with pytest.raises(TraceError, match="values"):
        trace(module, (x,))
    with assuming(frozenset({"balanced-routing"})):
        graph = trace(module, (x,))
    flops = analyze_phase(graph, H100)[0].flops.matmul
    assert flops == 2 * tokens * width * (experts + chosen * width), "every token goes through its experts, no more"


@pytest.mark.parametrize(
    "pick",
    [
        lambda y: y[(y.sum(-1) > 0).nonzero().squeeze(-1)],
        lambda y: y[y > 0],
        lambda y: y.masked_select(y > 0),
        lambda y: y.sum(-1).unique(),
    ],
    ids=["nonzero", "boolean index", "masked_select", "unique"],
)
def test_a_shape_that_only_data_tell_is_refused_at_its_line(pick):
    class Picking(nn.Module):
        def forward(self, x):
            return pick(x.relu()) * 2

    with pytest.raises(TraceError, match=r"A shape depends on tensor values at .*test_values\.py:\d+") as caught:
        trace(Picking(), (torch.empty(8, 64, device="meta"),))
    assert "torch.where" in caught.value.hint
