"""What must hold for any model on any GPU."""

import dataclasses
import functools

import pytest
import torch
from fxroof.analyzer.analysis import PhaseAnalysis, analyze_phase
from fxroof.analyzer.execution import Execution
from fxroof.analyzer.graph import Graph, Role, dataflow
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.trace import trace
from fxroof.hardware.catalog import all_gpus, load
from fxroof.hardware.units import BytesPerSecond
from hypothesis import given, settings
from hypothesis import strategies as st
from support import TARGETS, traced
from torch import nn

H100 = load("h100_sxm").gpu
GPUS = {gpu.key: gpu for gpu in all_gpus()}
SMALL = ("mymodel", "gptfast", "moe", "vit", "resnet18", "qwen3-8b", "mixtral-8x7b", "gemma-2-9b")
ON_ALL_GPUS = ("moe", "resnet18")


@functools.cache
def phases(name: str, gpu: str = "h100_sxm", scenario: Scenario | None = None) -> dict[str, PhaseAnalysis]:
    model = traced(name, scenario) if scenario else traced(name)
    return {phase: analyze_phase(graph, GPUS[gpu])[0] for phase, graph in model.graphs.items()}


@pytest.mark.parametrize("name", ON_ALL_GPUS)
@pytest.mark.parametrize("gpu", sorted(GPUS))
def test_floor_is_never_above_bound_and_shares_never_above_one(name: str, gpu: str) -> None:
    for phase in phases(name, gpu).values():
        assert 0 <= phase.seconds.floor <= phase.seconds.bound
        assert 0 <= phase.mfu <= 1
        assert 0 <= phase.mbu <= 1
        assert phase.mfu_estimate <= phase.mfu
        assert phase.executions.compiled.bound >= phase.seconds.floor * (1 - 1e-9)
        for execution in (phase.executions.eager, phase.executions.compiled):
            assert execution.bound <= execution.estimate
            assert sum(execution.estimate_share.values()) == pytest.approx(1)
            assert sum(k.seconds.estimate for k in execution.kernels) == pytest.approx(execution.estimate)
            assert execution.bytes_hbm <= execution.bytes_l2 * (1 + 1e-9)
        assert sum(phase.bound_share.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", TARGETS)
def test_totals_are_the_sums_of_the_ops(name: str) -> None:
    for phase in phases(name).values():
        assert sum(op.seconds for op in phase.ops) == pytest.approx(phase.seconds.bound)
        assert sum(op.bytes_read for op in phase.ops) == phase.bytes.read
        assert sum(op.bytes_written for op in phase.ops) == phase.bytes.written
        assert phase.bytes.total == sum(getattr(phase.bytes, role.value) for role in Role)
        assert sum(op.flops for op in phase.ops) == pytest.approx(phase.flops.matmul + phase.flops.vector)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("factor", [1.25, 4.0])
def test_more_of_anything_is_never_slower(name: str, factor: float) -> None:
    bandwidth = dataclasses.replace(H100, memory_bandwidth=BytesPerSecond(H100.memory_bandwidth * factor))
    tensor = dataclasses.replace(H100, tensor={k: v * factor for k, v in H100.tensor.items()})
    vector = dataclasses.replace(H100, vector={k: v * factor for k, v in H100.vector.items()})
    for graph in traced(name).graphs.values():
        before = analyze_phase(graph, H100)[0]
        for better in (bandwidth, tensor, vector):
            after = analyze_phase(graph, better)[0]
            assert after.seconds.bound <= before.seconds.bound
            assert after.seconds.floor <= before.seconds.floor
            for now, then in zip(_both(after), _both(before), strict=True):
                assert now.estimate <= then.estimate * (1 + 1e-9)


def _both(phase: PhaseAnalysis) -> tuple[Execution, Execution]:
    return phase.executions.eager, phase.executions.compiled


@pytest.mark.parametrize("name", ["mymodel", "gptfast", "qwen3-8b", "gemma-2-9b"])
def test_twice_the_batch_is_twice_the_activations_and_the_same_weights(name: str) -> None:
    one, two = (phases(name, scenario=Scenario(batch_size=n, input_len=96, output_len=32)) for n in (2, 4))
    for phase in one:
        embedding_rows = two[phase].tokens - one[phase].tokens
        widest_row = 4096 * 4
        grown = two[phase].bytes.weight - one[phase].bytes.weight
        assert 0 <= grown <= embedding_rows * widest_row
        assert two[phase].bytes.activation == pytest.approx(2 * one[phase].bytes.activation, rel=0.02)
        assert two[phase].bytes.kv_cache == 2 * one[phase].bytes.kv_cache
        assert two[phase].flops.matmul == 2 * one[phase].flops.matmul


def test_half_the_width_is_half_the_bytes() -> None:
    def total(dtype: torch.dtype) -> int:
        module = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.LayerNorm(512)).to(device="meta", dtype=dtype)
        graph = trace(module, (torch.empty(8, 256, dtype=dtype, device="meta"),))
        return analyze_phase(graph, H100)[0].bytes.total

    assert total(torch.float32) == 2 * total(torch.bfloat16)


class Views(nn.Module):
    """A chain of layout changes, some of which are views of what they are given and some of which are copies."""

    def __init__(self, steps: tuple[str, ...]) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for step in self.steps:
            match step:
                case "transpose":
                    x = x.transpose(-1, -2)
                case "contiguous":
                    x = x.contiguous()
                case "reshape":
                    x = x.reshape(x.shape[1], x.shape[0], *x.shape[2:])
                case "flatten":
                    x = x.flatten(0, 1).unflatten(0, x.shape[:2])
                case "narrow":
                    x = x[:, : max(1, x.shape[1] // 2)]
                case "same dtype":
                    x = x.to(x.dtype)
                case "permute":
                    x = x.permute(1, 0, 2)
        return x


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(
        st.sampled_from(["transpose", "contiguous", "reshape", "flatten", "narrow", "same dtype", "permute"]),
        min_size=1,
        max_size=6,
    )
)
def test_bytes_are_moved_exactly_where_memory_really_changes_hands(steps: list[str]) -> None:
    # oracle: the same steps on real memory, where a copy shows as a new data pointer
    module = Views(tuple(steps))
    x = torch.randn(4, 6, 8)
    moved = 0
    for step in steps:
        y = Views((step,))(x)
        if y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            moved += 2 * y.numel() * 4
        x = y
    graph = trace(module, (torch.empty(4, 6, 8, device="meta"),))
    assert analyze_phase(graph, H100)[0].bytes.total == moved


def test_data_flows_only_forward_and_through_views() -> None:
    graph: Graph = traced("gptfast").graphs["decode"]
    flow = dataflow(graph)
    assert all(u < v for u, v in flow.edges)
    writes = [i for i, op in enumerate(graph.ops) if op.mutates]
    assert writes
    for index in writes:
        assert any(graph.ops[v].target.startswith("aten.scaled_dot") or v > index for v in flow.successors(index))
