"""SHP002: products whose last wave of tiles is nearly empty, and the same model traced at the neighbouring shape."""

import dataclasses
import re

import pytest
import torch
from findings.situations import graphs_of, situation
from fxroof.analyzer.estimate import busy, derating
from fxroof.analyzer.finding import Confidence, Severity, registered
from fxroof.analyzer.scenario import Scenario
from fxroof.rules import wave_tail  # noqa: F401  # registers it
from support import SHORT, traced
from torch import nn

(RULE,) = (r for r in registered() if r.code == "SHP002")
INNER, WIDTH = 4096, 4352  # 34 columns of tiles, of 128


class Rows(nn.Module):
    def __init__(self, width=WIDTH, packed=torch.bfloat16):
        super().__init__()
        self.up = nn.Linear(INNER, width, bias=False, dtype=packed)

    def forward(self, x):
        return self.up(x)


class Functional(nn.Module):
    """The same, as `addmm` and `matmul` with weights that are no layer's."""

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.empty(INNER, WIDTH, dtype=torch.bfloat16))
        self.other = nn.Parameter(torch.empty(INNER, WIDTH, dtype=torch.bfloat16))
        self.bias = nn.Parameter(torch.empty(WIDTH, dtype=torch.bfloat16))

    def forward(self, x):
        return torch.addmm(self.bias, x, self.one) + x @ self.other


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(256, 1024, 3, padding=1, bias=False, dtype=torch.float16)

    def forward(self, x):
        return self.conv(x)


def at(module, shape, kind="bf16"):
    return graphs_of(module, inputs=(f"x={'x'.join(map(str, shape))}:{kind}",))["forward"]


def seconds(found, rows=None):
    """Of the products alone, of so many rows if given, as the estimate prices them."""
    gpu = found.gpu
    costs = [cost for cost in found.costs if cost.gemms and rows in (None, cost.gemms[0].m)]
    moved = [sum(a.read + a.written for a in cost.traffic) for cost in costs]
    return sum(
        busy(cost, nbytes, 0.0, nbytes, gpu, derating(gpu)).working for cost, nbytes in zip(costs, moved, strict=True)
    )


def batch_of(match):
    return int(re.search(r"a batch of ([\d,]+)", match.message)[1].replace(",", ""))


@pytest.mark.parametrize(
    ("model", "shape", "kind"),
    [
        (Rows, (528, INNER), "bf16"),
        (Rows, (1024, INNER), "bf16"),
        (Functional, (1024, INNER), "bf16"),
        (Images, (11, 256, 14, 14), "fp16"),
    ],
    ids=["two waves", "three waves", "functional", "images"],
)
def test_the_saving_is_that_of_the_trace_at_the_neighbouring_shape(model, shape, kind):
    now = situation(at(model(), shape, kind))
    (match,) = RULE.check(now)
    other = batch_of(match)
    assert 0.75 * shape[0] <= other <= 1.25 * shape[0]
    there = situation(at(model(), (other, *shape[1:]), kind))
    bound, estimate = match.saving
    assert bound == 0.0
    assert estimate == pytest.approx(seconds(now) - seconds(there) * shape[0] / other, rel=0.01)
    assert estimate >= 0.1 * seconds(now)
    assert (RULE.severity, match.confidence) == (Severity.INFO, Confidence.MEDIUM)
    assert "per unit of work" in match.remedy.text


def test_the_example_of_its_page():
    """136 tiles on 132 multiprocessors take two waves; smaller tiles, which load more, take some of that back."""
    now = situation(at(Rows(), (1024, INNER)))
    (match,) = RULE.check(now)
    assert match.evidence["product"] == f"1024 x {WIDTH} x {INNER}"
    assert match.evidence["lost_seconds"] > 0.1 * match.evidence["seconds"]


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Rows(4224), (512, INNER)),  # 132 tiles
        (Rows(8448), (8192, INNER)),  # 32 waves
        (Rows(), (8, INNER)),  # waits for its weight
        (Rows(256), (128, INNER)),  # launched for longer than it runs
    ],
    ids=["full wave", "many waves", "memory", "small"],
)
def test_it_is_silent(model, shape):
    assert not list(RULE.check(situation(at(model, shape))))


def test_products_without_a_weight_are_left_out():
    class Scores(nn.Module):
        def forward(self, x):
            return x @ x.mT

    assert not list(RULE.check(situation(at(Scores(), (17, 1056, 512)))))


def test_it_is_silent_where_the_multiprocessors_are_not_known():
    found = situation(at(Rows(), (1024, INNER)))
    assert list(RULE.check(found))
    unknown = dataclasses.replace(found.gpu, sm_count=None)
    assert not list(RULE.check(dataclasses.replace(found, gpu=unknown)))


def prefill(scenario):
    """Of a model that may shorten the lengths to its own limit."""
    found = traced("llama-3-8b", scenario)
    return dataclasses.replace(situation(found.graphs["prefill"]), scenario=found.workload.scenario)


def test_chunks_of_prompts_are_cut_elsewhere():
    scenario = Scenario(batch_size=1, input_len=13000, chunk=1300)
    found = prefill(scenario)
    (match,) = RULE.check(found)
    assert "in chunks of" in match.message
    assert match.evidence["products"] == 4 * 7  # the head sees the last rows alone
    there = prefill(dataclasses.replace(scenario, chunk=int(match.remedy.code.rsplit(" ", 1)[1])))
    each = [seconds(s, rows=s.graph.tokens) / s.graph.tokens for s in (found, there)]
    assert match.saving[1] == pytest.approx((each[0] - each[1]) * found.graph.tokens, rel=0.01)


def test_whole_prompts_are_not_cut():
    found = prefill(Scenario(batch_size=5, input_len=700))
    assert all("a batch of" in match.message for match in RULE.check(found))


@pytest.mark.parametrize("name", ["llama-3-8b", "gpt2", "mymodel", "mixtral-8x7b"])
def test_small_steps_are_no_matter_of_tiles(name):
    for graph in traced(name).graphs.values():
        assert not list(RULE.check(dataclasses.replace(situation(graph), scenario=SHORT)))
