"""SHP003: depthwise convolutions with a batch norm behind them, and the twin into which it is folded."""

import pytest
import torch
from findings.situations import figures, graphs_of, rewritten, situation
from fxroof.analyzer.finding import Severity, registered
from fxroof.rules import depthwise_or_grouped_conv_bound  # noqa: F401  # registers it
from support import traced
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

(RULE,) = (r for r in registered() if r.code == "SHP003")
CHANNELS = 96


class Inverted(nn.Module):
    """MobileNetV2's block: widen, filter each channel, narrow."""

    def __init__(self, groups=4 * CHANNELS, bias=False, affine=True):
        super().__init__()
        wide = 4 * CHANNELS
        self.widen = nn.Conv2d(CHANNELS, wide, 1)
        self.filter = nn.Conv2d(wide, wide, 3, padding=1, groups=groups, bias=bias)
        self.norm = nn.BatchNorm2d(wide, affine=affine)
        self.narrow = nn.Conv2d(wide, CHANNELS, 1)

    def forward(self, x):
        return x + self.narrow(F.relu6(self.norm(self.filter(F.relu6(self.widen(x))))))


class Net(nn.Module):
    def __init__(self, fold=False, block=Inverted, layers=2, dtype=torch.float16, **kwargs):
        super().__init__()
        self.blocks = nn.ModuleList([block(**kwargs) for _ in range(layers)])
        self.eval()
        if fold:
            for block in self.blocks:
                block.filter, block.norm = fuse_conv_bn_eval(block.filter, block.norm), nn.Identity()
        self.to(dtype)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def forward_of(net, dtype="fp16"):
    return graphs_of(net.eval(), inputs=(f"x=32x{CHANNELS}x56x56:{dtype}",))["forward"]


@pytest.mark.parametrize("kwargs", [{}, {"bias": True}, {"affine": False}], ids=str)
def test_the_rewrite_is_the_trace_of_the_twin(kwargs):
    graph, twin = forward_of(Net(**kwargs)), forward_of(Net(fold=True, **kwargs))
    assert len(list(RULE.check(situation(graph)))) == 2
    assert not list(RULE.check(situation(twin)))
    assert figures(rewritten(graph, RULE)) == {k: pytest.approx(v, rel=0.01) for k, v in figures(twin).items()}
    assert figures(rewritten(graph, RULE))["eager bound"] < 0.9 * figures(graph)["eager bound"]


def test_folding_changes_no_number():
    torch.manual_seed(0)
    bad = Net(dtype=torch.float32, layers=1)
    norm = bad.blocks[0].norm
    for tensor in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        tensor.uniform_(0.5, 1.5)
    x = torch.randn(1, CHANNELS, 8, 8)
    before = bad(x)
    block = bad.blocks[0]
    block.filter, block.norm = fuse_conv_bn_eval(block.filter, block.norm), nn.Identity()
    torch.testing.assert_close(bad(x), before, rtol=1e-4, atol=1e-4)


class Training(Inverted):
    def forward(self, x):
        h = self.filter(F.relu6(self.widen(x)))
        norm = self.norm
        h = F.batch_norm(h, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=True)
        return x + self.narrow(h)


class UsedElsewhere(Inverted):
    def forward(self, x):
        h = self.filter(F.relu6(self.widen(x)))
        return x + self.narrow(self.norm(h) + h)


class LayerNormed(nn.Module):
    """ConvNeXt's block."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Conv2d(CHANNELS, CHANNELS, 7, padding=3, groups=CHANNELS)
        self.norm = nn.LayerNorm(CHANNELS)

    def forward(self, x):
        return x + self.norm(self.filter(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    "net",
    [
        lambda: Net(groups=1),
        lambda: Net(groups=32),
        lambda: Net(block=Training),
        lambda: Net(block=UsedElsewhere),
        lambda: Net(block=LayerNormed),
    ],
    ids=["dense", "grouped", "training", "used elsewhere", "layer norm"],
)
def test_it_is_silent(net):
    assert not list(RULE.check(situation(forward_of(net()))))


def test_it_informs():
    assert RULE.severity is Severity.INFO


@pytest.mark.parametrize("model", ["resnet18", "mamba2-2.7b"])
def test_real_models(model):
    for graph in traced(model).graphs.values():
        assert not list(RULE.check(situation(graph)))
