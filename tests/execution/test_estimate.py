"""Estimates against brute force: blocks handed to multiprocessors one by one, launches queued one by one."""

import dataclasses
from math import ceil

import pytest
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.cost import Cost, Gemm
from fxroof.analyzer.estimate import Launch, busy, derating, queued
from fxroof.analyzer.scenario import Scenario
from fxroof.hardware.catalog import all_gpus, load
from hypothesis import given, settings
from hypothesis import strategies as st
from support import traced

H100 = load("h100_sxm").gpu
REACHED = derating(H100)


def tensor_seconds(m: int, n: int, k: int, batch: int = 1) -> float:
    gemm = Gemm(batch=batch, m=m, n=n, k=k)
    cost = Cost(matmul={"bfloat16": 2.0 * batch * m * n * k}, gemms=(gemm,))
    return busy(cost, 0, 0, 2 * batch * (m * k + n * k + m * n), H100, REACHED).lanes.tensor


def ideal_seconds(m: int, n: int, k: int) -> float:
    return 2.0 * m * n * k / (H100.tensor["bfloat16"] * REACHED.matmul["bfloat16"].value)


def test_a_product_that_fills_every_wave_runs_at_the_peak_that_is_reached() -> None:
    m, n, k = 256 * 12, 128 * 11 * 4, 4096  # 132 blocks a wave of 256 x 128
    assert tensor_seconds(m, n, k) == pytest.approx(ideal_seconds(m, n, k))


def test_one_block_more_than_a_wave_costs_most_of_another() -> None:
    full, over = tensor_seconds(256 * 12, 128 * 11, 1024), tensor_seconds(256 * 12, 128 * 11 + 1, 1024)
    assert 1.05 * full < over <= 2 * full


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 4096), n=st.integers(1, 4096), k=st.integers(16, 8192), batch=st.integers(1, 16))
def test_no_product_beats_the_peak_and_more_of_it_is_never_faster(m: int, n: int, k: int, batch: int) -> None:
    took = tensor_seconds(m, n, k, batch)
    assert took >= batch * ideal_seconds(m, n, k) * (1 - 1e-9)
    assert tensor_seconds(m, n, 2 * k, batch) >= took * (1 - 1e-9)


@pytest.mark.parametrize(("m", "n", "k"), [(512, 4096, 4096), (2048, 1024, 4096), (4096, 4096, 4096)])
def test_waves_are_those_of_blocks_handed_out_one_by_one(m: int, n: int, k: int) -> None:
    # every tile and split that a library offers, its blocks given to the multiprocessor that is free first
    best = float("inf")
    peak = H100.tensor["bfloat16"] * REACHED.matmul["bfloat16"].value / (H100.sm_count or 1)
    for rows, columns in ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64), (32, 128), (16, 128)):
        for split in (1, 2, 4, 8, 16):
            if split > 1 and k / split < 256:
                continue
            free = [0.0] * (H100.sm_count or 1)
            for _ in range(ceil(m / rows) * ceil(n / columns) * split):
                first = free.index(min(free))
                free[first] += 2.0 * rows * columns * ceil(k / split) / peak
            best = min(best, max(free))
    # the planner weighs what tiles load too, so that it may take a slower tile, never a faster one
    assert best * (1 - 1e-9) <= tensor_seconds(m, n, k) <= 2 * best


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 10)), max_size=12))
def test_launches_wait_for_the_host_and_for_each_other(steps: list[tuple[float, float]]) -> None:
    launches = [Launch(busy=b, host=h) for b, h in steps]
    clock = host = 0.0
    for b, h in steps:
        host += h
        clock = max(clock, host) + b
    assert sum(queued(launches)) == pytest.approx(clock)
    assert all(seconds >= b - 1e-9 for seconds, (b, _) in zip(queued(launches), steps, strict=True))


def test_a_loop_takes_as_long_as_its_turns_one_by_one() -> None:
    for b, h in ((5.0, 1.0), (1.0, 5.0)):
        assert sum(queued([Launch(busy=b, host=h, repeat=7)])) == pytest.approx(sum(queued([Launch(b, h)] * 7)))


@pytest.mark.parametrize("gpu", all_gpus(), ids=lambda gpu: gpu.key)
def test_no_part_is_said_to_exceed_its_peaks_and_every_figure_has_a_source(gpu: object) -> None:
    reached = derating(gpu)  # type: ignore[arg-type]
    for figure in reached.figures:
        assert figure.source
        assert figure.unit or 0 < figure.value <= 1
    assert reached.l2_bytes.value <= (gpu.cache_bytes or 0)  # type: ignore[attr-defined]


def test_the_decode_of_a_7b_is_estimated_as_it_is_measured() -> None:
    # worked example 3: 7 B in fp16 on an H100, about 5.9 ms, 170 tokens/s, measured in the field with compiled graphs
    graph = traced("llama-3-8b", Scenario(input_len=128, output_len=128), whole=True).graphs["decode"]
    phase, _ = analyze_phase(graph, H100)
    weights = 14e9 / phase.floor.weight_bytes  # this one has 8 B
    assert phase.executions.compiled.estimate * weights == pytest.approx(5.9e-3, rel=0.2)
    assert phase.executions.eager.estimate > phase.executions.compiled.estimate


def test_decode_waits_for_launches_in_eager_mode_and_says_so() -> None:
    graph = traced("llama-3-8b", Scenario()).graphs["decode"]
    phase, _ = analyze_phase(graph, H100)
    eager, compiled = phase.executions.eager, phase.executions.compiled
    assert eager.estimate_share["latency"] > compiled.estimate_share.get("latency", 0)
    assert len(compiled.kernels) < len(eager.kernels)
    slower = dataclasses.replace(H100, kernel_latency=1e-4)
    assert analyze_phase(graph, slower)[0].executions.compiled.estimate_share["latency"] > 0.9


def test_packed_weights_pass_the_cache_as_they_are_stored() -> None:
    m, n, k = 1, 14336, 4096
    cost = Cost(matmul={"bfloat16": 2.0 * m * n * k}, gemms=(Gemm(batch=1, m=m, n=n, k=k),))
    wide, narrow = (busy(cost, moved, 0, moved, H100, REACHED).lanes for moved in (2 * n * k, n * k // 2))
    assert narrow.l2 < 0.3 * wide.l2
    assert narrow.memory == pytest.approx(wide.memory / 4)
