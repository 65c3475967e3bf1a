"""Matmul FLOPs against PyTorch's own counter, run on meta over the very programs that are analysed."""

import pytest
import torch
from fxroof.analyzer.analysis import analyze_phase
from fxroof.hardware.catalog import load
from support import TARGETS, traced
from torch.utils.flop_counter import FlopCounterMode

H100 = load("h100_sxm").gpu
UNCOUNTED = ("aten._grouped_mm", "aten.linalg_solve_triangular")  # FlopCounterMode of torch 2.13 returns 0 for them


def counted(name: str, phase: str) -> int:
    program = traced(name).program(phase)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        program.module(*program.args)
    return counter.get_total_flops()


@pytest.mark.parametrize("name", [n for n in TARGETS if n != "llama_reference"])
def test_matmul_flops_equal_pytorchs_counter(name: str) -> None:
    for phase, graph in traced(name).graphs.items():
        analysis, costs = analyze_phase(graph, H100)
        skipped = sum(
            cost.matmul_flops
            for op, cost in zip(graph.ops, costs, strict=True)
            if op.target.rsplit(".", 1)[0] in UNCOUNTED
        )
        assert analysis.flops.matmul - skipped == counted(name, phase)


@pytest.mark.parametrize("name", TARGETS)
def test_every_op_is_priced_or_proved_free(name: str) -> None:
    for graph in traced(name).graphs.values():
        analysis, _ = analyze_phase(graph, H100)
        assert not {op.target for op in analysis.ops if op.status == "unpriced"}
