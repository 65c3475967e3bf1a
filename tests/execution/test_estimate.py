"""Estimates against brute force: blocks handed to multiprocessors one by one, launches queued one by one."""

import dataclasses
import random
from collections import Counter
from collections.abc import Iterator
from math import ceil

import pytest
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.cost import Attended, Cost, Gemm
from fxroof.analyzer.estimate import Busy, Launch, busy, derating, queued
from fxroof.analyzer.scenario import Scenario
from fxroof.hardware.catalog import all_gpus, load
from fxroof.hardware.gpu import Gpu
from fxroof.hardware.units import BytesPerSecond
from hypothesis import given, settings
from hypothesis import strategies as st
from support import traced

H100 = load("h100_sxm").gpu
REACHED = derating(H100)


def product(m: int, n: int, k: int, batch: int = 1, gpu: Gpu = H100) -> Busy:
    """Of a product whose operands are in the cache."""
    gemm = Gemm(batch=batch, m=m, n=n, k=k)
    cost = Cost(matmul={"bfloat16": 2.0 * batch * m * n * k}, gemms=(gemm,))
    return busy(cost, 0, 0, 2 * batch * (m * k + n * k + m * n), gpu, derating(gpu))


def tensor_seconds(m: int, n: int, k: int, batch: int = 1) -> float:
    return product(m, n, k, batch).lanes.tensor


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
    took = product(m, n, k, batch).working
    assert took >= batch * ideal_seconds(m, n, k) * (1 - 1e-9)
    assert product(m, n, 2 * k, batch).working >= took * (1 - 1e-9)


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


def test_a_product_takes_longer_than_each_of_its_lanes_and_less_than_all_in_turn() -> None:
    for m in (1, 64, 300, 2000):
        gemm = Gemm(batch=1, m=m, n=4096, k=4096)
        moved = 2.0 * 4096 * (2 * m + 4096)
        took = busy(Cost(matmul={"bfloat16": 2.0 * m * 4096**2}, gemms=(gemm,)), moved, 0, moved, H100, REACHED)
        lanes = (took.lanes.tensor, took.lanes.memory, took.lanes.l2)
        assert max(lanes) < took.working < sum(lanes) + REACHED.products.split.value
        assert took.seconds == pytest.approx(took.working + REACHED.products.latency.value)


def test_narrow_products_run_in_larger_tiles_the_more_rows_they_have() -> None:
    # 64 x 64, 128 x 64, 128 x 128: the result has 64 columns, so that the last computes half for nothing
    def of(m: int) -> float:
        cost = Cost(matmul={"float8_e4m3fn": 2.0 * m * 64 * 4096}, gemms=(Gemm(batch=1, m=m, n=64, k=4096),))
        return busy(cost, 0, 0, 4096.0 * (m + 64), H100, REACHED).lanes.tensor

    assert [of(m) / of(64) for m in (1, 65, 128, 129)] == pytest.approx([1, 2, 2, 4])


def grouped(rows: int, experts: int, n: int, k: int, gpu: Gpu = H100) -> Busy:
    """Of rows dealt out to experts, all of which have some; operands in the cache."""
    gemm = Gemm(batch=1, m=rows, n=n, k=k, groups=experts)
    cost = Cost(matmul={"bfloat16": 2.0 * rows * n * k}, gemms=(gemm,))
    return busy(cost, 0, 0, 2 * (rows * k + experts * n * k + rows * n), gpu, derating(gpu))


@pytest.mark.parametrize(("rows", "experts"), [(64, 8), (512, 64), (4096, 32), (20000, 8)])
def test_tiles_of_experts_are_those_of_rows_dealt_out_one_by_one(rows: int, experts: int) -> None:
    n = k = 4096
    sms, drawn = H100.sm_count or 1, random.Random(1)  # noqa: S311  # no secret
    counts = Counter(drawn.randrange(experts) for _ in range(rows))
    peak = H100.tensor["bfloat16"] * REACHED.matmul["bfloat16"].value * REACHED.products.grouped.value / sms
    best = float("inf")
    for tile_rows, columns in (
        (256, 128),
        (128, 256),
        (128, 128),
        (128, 64),
        (64, 128),
        (64, 64),
        (32, 128),
        (16, 128),
    ):
        free = [0.0] * sms
        for count in counts.values():
            for _ in range(ceil(count / tile_rows) * ceil(n / columns)):
                free[free.index(min(free))] += 2.0 * tile_rows * columns * k / peak
        best = min(best, max(free))
    # the planner weighs what tiles load too, so that it may take a slower tile
    assert 0.8 * best <= grouped(rows, len(counts), n, k).lanes.tensor <= 2 * best


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 4096), experts=st.integers(1, 256), n=st.integers(64, 4096), k=st.integers(64, 4096))
def test_the_more_experts_share_rows_the_longer_it_takes(rows: int, experts: int, n: int, k: int) -> None:
    took = grouped(max(rows, experts), experts, n, k)
    assert took.working >= product(max(rows, experts), n, k).lanes.tensor * (1 - 1e-9)
    assert grouped(max(rows, experts + 1), experts + 1, n, k).working >= took.working * (1 - 1e-9)
    assert took.seconds == pytest.approx(took.working + REACHED.products.grouped_latency.value)


def test_a_kernel_that_quantises_reaches_less_of_the_memory() -> None:
    def of(*, quantises: bool) -> float:
        return busy(Cost(quantises=quantises), 2e9, 1e9, 3e9, H100, REACHED).working

    assert of(quantises=True) * REACHED.quantising.value == pytest.approx(of(quantises=False))


def test_8_bit_attention_over_prompts_is_faster_by_less_than_its_peak() -> None:
    def of(dtype: str) -> float:
        shape = Attended(heads=64, group=1, queries=8192, keys=8192, pairs=8192 * 8193 // 2, edges=1, size=128)
        cost = Cost(matmul={dtype: 4.0 * 64 * shape.pairs * 128}, attended=shape)
        return busy(cost, 0, 0, 0, H100, REACHED).lanes.tensor

    # FlashAttention-3 (arXiv 2407.08608): up to 740 TFLOP/s in 16 bits, close to 1,200 in 8, of 989 and 1,979
    assert 1.1 < of("bfloat16") / of("float8_e4m3fn") < 1200 / 740


def attention(
    heads: int, group: int, queries: int, keys: int, size: int, gpu: Gpu = H100, *, causal: bool = True
) -> Busy:
    """Of queries that are the last of as many keys, which are in memory; bfloat16."""
    rows = heads * group
    pairs = sum(keys - queries + i + 1 for i in range(queries)) if causal else queries * keys
    cost = Cost(
        matmul={"bfloat16": 4.0 * rows * pairs * size},
        backend="flash",
        attended=Attended(
            heads=heads, group=group, queries=queries, keys=keys, pairs=pairs, edges=int(causal), size=size
        ),
    )
    read, written = 2.0 * size * (2 * heads * keys + rows * queries), 2.0 * size * rows * queries
    return busy(cost, read, written, read + written, gpu, derating(gpu))


def blocks_of_attention(queries: int, keys: int) -> Iterator[int]:
    """Pairs of each block of 64 queries over tiles of 128 keys, those skipped that the mask hides altogether."""
    for first in range(0, queries, 64):
        last = keys - queries + min(first + 64, queries)
        yield 64 * 128 * ceil(last / 128)


@pytest.mark.parametrize(("heads", "queries", "keys"), [(8, 2048, 2048), (24, 1000, 1000), (4, 512, 4096), (1, 64, 64)])
def test_attention_over_prompts_is_that_of_blocks_handed_out_one_by_one(heads: int, queries: int, keys: int) -> None:
    peak = H100.tensor["bfloat16"] * REACHED.matmul["bfloat16"].value * REACHED.attention.value
    sms = H100.sm_count or 1
    free = [0.0] * sms
    for _ in range(heads):
        for pairs in blocks_of_attention(queries, keys):
            free[free.index(min(free))] += 4.0 * pairs * 128 * sms / peak
    took = attention(heads, 1, queries, keys, 128).lanes.tensor
    assert took == pytest.approx(max(free), rel=0.35)
    assert took >= sum(free) / sms * (1 - 1e-9), "no faster than all multiprocessors busy all the time"


def test_queries_of_a_step_share_a_block_with_those_of_heads_that_share_keys() -> None:
    alone, grouped = attention(8, 1, 1, 4096, 128), attention(8, 8, 1, 4096, 128)
    assert grouped.seconds == pytest.approx(alone.seconds, rel=0.01)
    assert attention(133, 1, 1, 64, 128).working > 1.5 * attention(132, 1, 1, 64, 128).working, "a second wave"
    split = attention(8, 1, 1, 128, 128).seconds - attention(8, 1, 1, 127, 128).seconds
    assert REACHED.attending is not None
    assert split == pytest.approx(REACHED.attending.cache_split.value, rel=0.01)


def larger(factor: float) -> Iterator[Gpu]:
    """More bandwidth; faster tensor units; more multiprocessors, each as fast and with as much L2 as before."""
    tensor = {dtype: rate * factor for dtype, rate in H100.tensor.items()}
    yield dataclasses.replace(H100, memory_bandwidth=BytesPerSecond(H100.memory_bandwidth * factor))
    yield dataclasses.replace(H100, tensor=tensor)
    sms = round((H100.sm_count or 0) * factor)
    more = sms / (H100.sm_count or 1)
    yield dataclasses.replace(
        H100,
        sm_count=sms,
        tensor={dtype: rate * more for dtype, rate in H100.tensor.items()},
        l2_bandwidth_measured=BytesPerSecond((H100.l2_bandwidth_measured or 0) * more),
    )


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 300),
    group=st.sampled_from([1, 4, 16, 128]),
    queries=st.sampled_from([1, 7, 33, 100, 1000]),
    more=st.integers(0, 5000),
    size=st.sampled_from([64, 128]),
    factor=st.floats(1.01, 8),
)
def test_more_of_anything_never_slows_attention_or_products(
    heads: int, group: int, queries: int, more: int, size: int, factor: float
) -> None:
    attended = attention(heads, group, queries, queries + more, size).seconds
    multiplied = product(queries, heads * size, more + 16).seconds
    for gpu in larger(factor):
        assert attention(heads, group, queries, queries + more, size, gpu).seconds <= attended * (1 + 1e-9)
        assert product(queries, heads * size, more + 16, gpu=gpu).seconds <= multiplied * (1 + 1e-9)


@pytest.mark.parametrize("key", ["mi300x", "m4_max", "tpu_v5e"])
def test_parts_of_other_vendors_take_nothing_over_that_is_counted_in_cycles(key: str) -> None:
    gpu = load(key).gpu
    reached = derating(gpu)
    assert reached.attending is None
    assert reached.products.split.value == 0
    assert not any("cycles" in figure.source for figure in reached.figures)
    assert product(64, 4096, 4096, gpu=gpu).seconds > product(64, 4096, 4096, gpu=gpu).working > 0


def test_fitted_figures_say_on_what_they_were_fitted_and_where_they_are_taken_over() -> None:
    own, other = derating(H100).products.split, derating(load("b200").gpu).products.split
    assert "A100 SXM and the H100 SXM" in own.source
    assert other.source.startswith(f"{own.source}, taken over from h100_sxm")
    assert (own.fitted_on, other.fitted_on) == ("h100_sxm", "h100_sxm")


def test_what_was_fitted_is_told_from_what_a_data_sheet_or_a_calibration_says() -> None:
    reached = derating(load("b200").gpu)
    assert {figure.fitted_on for figure in reached.figures} == {"", "h100_sxm"}
    assert sum(bool(figure.fitted_on) for figure in reached.figures) == 19
    assert {reached.reading.fitted_on, reached.launch.fitted_on} == {""}
    slow = dataclasses.replace(H100, kernel_latency=1e-4)  # a latency of its own holds where it is the longer one
    assert (derating(slow).latency.value, derating(slow).latency.fitted_on) == (1e-4, "")


# 5,700 and 3,000 cycles of the A100 and the H100 at the clocks of others; 1.3 us where a kernel's would be less
@pytest.mark.parametrize(("key", "product", "kernel"), [("b200", 2.901e-6, 1.527e-6), ("l40s", 2.262e-6, 1.3e-6)])
def test_cycles_are_of_the_parts_own_clock(key: str, product: float, kernel: float) -> None:
    reached = derating(load(key).gpu)
    assert reached.products.latency.value == pytest.approx(product, rel=1e-3)
    assert reached.latency.value == pytest.approx(kernel, rel=1e-3)


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
