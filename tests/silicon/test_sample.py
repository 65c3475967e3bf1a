"""Kernels as they were measured on seven GPUs: no bound exceeds a measurement, and graphs are what was timed."""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from benchmarks.silicon_graphs import BUILDERS, Load, Measured, NotPricedError, Predicted, load_of, part, predict
from fxroof.analyzer.cost import Attended, bytes_by_role
from fxroof.analyzer.graph import Graph
from fxroof.analyzer.pricing import price
from silicon_tables import excluded

DATA = Path(__file__).parent.parent / "data" / "silicon_sample.json"
SAMPLE = json.loads(DATA.read_text())
ROWS, TYPICAL = (
    tuple(Measured(**{k: v for k, v in row.items() if k != "us"}, seconds=row["us"] * 1e-6) for row in SAMPLE[key])
    for key in ("rows", "typical")
)
TUNED = {"a100_sxm_80gb", "h100_sxm"}


@pytest.fixture(scope="module")
def predicted() -> list[tuple[Measured, Predicted]]:
    return [(row, predict(row)) for row in ROWS]


def test_no_bound_exceeds_a_measurement(predicted: list[tuple[Measured, Predicted]]) -> None:
    beaten = [(row, seconds.bound / row.seconds) for row, seconds in predicted if seconds.bound > row.seconds]
    assert not beaten


def test_bounds_are_no_slack_ones(predicted: list[tuple[Measured, Predicted]]) -> None:
    # the closest rows of each kind were chosen: where a bound has lost a part of the work, all of its kind fall off
    closest: dict[str, float] = {}
    for row, seconds in predicted:
        closest[row.operator] = max(closest.get(row.operator, 0.0), seconds.bound / row.seconds)
    assert {operator for operator, share in closest.items() if share > 0.65} == set(BUILDERS)


def test_some_rows_are_faster_than_device_memory_alone() -> None:
    # so that the first test cannot pass with a bound that knows of no cache
    def from_memory(row: Measured) -> float:
        gpu, _ = part(row.gpu)
        timed = BUILDERS[row.operator](row, gpu)
        moved = [bytes_by_role(timed.graph, cost).values() for cost in price(timed.graph, gpu)]
        return sum(sum(map(sum, roles)) for roles in moved) / gpu.memory_bandwidth / timed.repeated

    assert sum(from_memory(row) > row.seconds for row in ROWS) >= 10


def test_estimates_are_no_faster_than_bounds(predicted: list[tuple[Measured, Predicted]]) -> None:
    assert all(seconds.estimate >= seconds.bound for _, seconds in predicted)


@pytest.mark.parametrize(
    ("operator", "dtype", "tuned", "unseen"),
    # what docs/silicon.md has for all rows, and a half of it more, since these are few
    [
        ("gemm", "bfloat16", 0.12, 0.18),
        ("gemm", "fp8", 0.23, 0.27),
        ("decode attention", "bfloat16", 0.2, 0.3),
        ("prefill attention", "bfloat16", 0.21, 0.29),
        ("moe", "bfloat16", 0.26, 0.31),
    ],
)
def test_estimates_of_rows_taken_at_random_are_close(operator: str, dtype: str, tuned: float, unseen: float) -> None:
    errors: dict[bool, list[float]] = {True: [], False: []}
    for row in TYPICAL:
        if (row.operator, row.dtype) == (operator, dtype):
            errors[row.gpu in TUNED].append(abs(predict(row).estimate / row.seconds - 1))
    assert len(errors[True]) >= 12
    assert len(errors[False]) >= 60
    assert statistics.median(errors[True]) <= tuned
    assert statistics.median(errors[False]) <= unseen


def test_the_sample_says_where_it_is_from_and_covers_every_part_and_operator() -> None:
    assert {"package", "version", "licence", "repository"} <= SAMPLE["source"].keys()
    assert {row.operator for row in ROWS} == set(BUILDERS)
    assert {row.gpu for row in ROWS} == {"a100_sxm_80gb", "h100_sxm", "h200_sxm", "b200", "gb200", "b300", "l40s"}


def made(operator: str, shape: Mapping[str, int | str], backend: str = "vllm", **rest: Any) -> tuple[Graph, int]:
    row = {"gpu": "h100_sxm", "version": "", "kernel": "", "dtype": "bfloat16", "seconds": 1.0} | rest
    timed = BUILDERS[operator](Measured(operator=operator, backend=backend, shape=shape, **row), part("h100_sxm")[0])
    return timed.graph, timed.repeated


def likely_graph(operator: str, shape: Mapping[str, int | str], backend: str, **rest: Any) -> Graph:
    row = {"gpu": "h100_sxm", "version": "", "kernel": "", "dtype": "bfloat16", "seconds": 1.0} | rest
    timed = BUILDERS[operator](Measured(operator=operator, backend=backend, shape=shape, **row), part("h100_sxm")[0])
    assert timed.likely is not None
    return timed.likely


def matmul_flops(graph: Graph) -> float:
    return sum(cost.executed_matmul_flops for cost in price(graph, part("h100_sxm")[0]))


HEADS = {
    "num_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "window_size": 0,
    "attn_dtype": "bfloat16", "kv_cache_dtype": "bfloat16",
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["bfloat16", "fp8", "fp8_block", "nvfp4"])
@pytest.mark.parametrize(
    ("backend", "version"), [("vllm", ""), ("sglang", "0.5.14"), ("sglang", "0.5.6"), ("trtllm", "")]
)
def test_products_are_those_of_the_row(backend: str, version: str, dtype: str) -> None:
    graph, repeated = made("gemm", {"m": 48, "n": 256, "k": 512}, backend, version=version, dtype=dtype)
    assert matmul_flops(graph) == repeated * 2 * 48 * 256 * 512
    weights = [s.nbytes for s in graph.storages if s.role == "weight" and s.nbytes >= 256 * 512 // 2]
    assert len(weights) == repeated, "each repetition has a weight of its own"


@pytest.mark.parametrize("backend", ["vllm", "sglang", "trtllm"])
@pytest.mark.parametrize("window", [0, 100, 8192])
def test_prompts_attend_to_what_their_mask_leaves(backend: str, window: int) -> None:
    length, batch = (9000, 2) if window == 8192 else (300, 2)
    shape = HEADS | {"batch_size": batch, "isl": length, "step": 0, "window_size": window}
    if window == 8192:  # chunks
        pairs = sum(query % window + 1 for query in range(length))
    else:
        pairs = sum(min(query + 1, window or length) for query in range(length))
    graph, _ = made("prefill attention", shape, backend)
    assert matmul_flops(graph) == batch * 8 * pairs * 2 * (64 + 64)


@pytest.mark.parametrize("window", [0, 100])
def test_attention_says_what_its_blocks_are_cut_from(window: int) -> None:
    gpu = part("h100_sxm")[0]
    prompts, _ = made("prefill attention", HEADS | {"batch_size": 2, "isl": 300, "step": 0, "window_size": window})
    seen = [min(query + 1, window or 300) for query in range(300)]
    assert price(prompts, gpu)[-1].attended == Attended(
        heads=4, group=4, queries=300, keys=max(seen), pairs=sum(seen), edges=2 if window else 1, size=64
    )
    step, _ = made("decode attention", HEADS | {"batch_size": 3, "isl": 1, "step": 1000, "window_size": window})
    keys = window or 1000
    found = price(step, gpu)[-1].attended
    assert found is not None
    assert (found.heads, found.group, found.queries, found.keys, found.pairs) == (6, 4, 1, keys, keys)


def test_decode_reads_the_cache_once_and_a_window_of_it() -> None:
    shape = HEADS | {"batch_size": 3, "isl": 1, "step": 999}
    for window, seen in ((0, 1000), (128, 128)):
        graph, _ = made("decode attention", shape | {"window_size": window}, "sglang")
        attention = price(graph, part("h100_sxm")[0])[-1]
        caches = {i for i in range(len(graph.tensors)) if graph.role(i) == "kv_cache"}
        assert sum(a.read for a in attention.traffic if a.tensor in caches) == 3 * seen * 2 * 64 * 2 * 2


def test_experts_of_one_gpu_have_its_share_of_the_products() -> None:
    shape = {
        "num_tokens": 64, "hidden_size": 256, "inter_size": 512, "topk": 4, "num_experts": 32, "moe_tp_size": 2,
        "moe_ep_size": 8, "distribution": "balanced",
    }  # fmt: skip
    graph, _ = made("moe", shape)
    assert matmul_flops(graph) == 64 * 4 / 8 * 3 * 2 * 256 * (512 / 2)
    # every eighth token meets each of the four experts here, and TensorRT-LLM permutes those rows alone
    likely = likely_graph("moe", shape, "trtllm", kernel="moe_torch_flow_cutlass")
    assert matmul_flops(likely) == matmul_flops(graph)
    assert [g.groups for cost in price(likely, part("h100_sxm")[0]) for g in cost.gemms] == [4, 4]
    # SGLang 0.5.10 sent all rows of its tokens to them: 8 rows of 32 tokens each hold one of its experts, 4 rows each
    sent = likely_graph("moe", shape, "sglang", version="0.5.10", kernel="sglang_fused_moe_triton")
    assert matmul_flops(sent) == 4 * matmul_flops(graph)


@pytest.mark.parametrize(
    ("tokens", "top", "experts"), [(1, 8, 128), (5, 6, 64), (64, 4, 32), (1000, 8, 256), (7, 2, 8)]
)
@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_a_balanced_load_is_that_of_tokens_one_by_one(tokens: int, top: int, experts: int, gpus: int) -> None:
    stride = -(-experts // top)
    mine = set(range(experts // gpus))
    rows, met, have = 0, set(), 0
    for token in range(tokens):
        first = token if tokens >= stride else token * stride / tokens
        here = mine & {int(first + k * stride) % experts for k in range(top)}
        rows, met, have = rows + len(here), met | here, have + bool(here)
    assert load_of(tokens, top, experts, gpus, "balanced") == Load(rows=rows, experts=len(met), tokens=have)


@pytest.mark.parametrize(("tokens", "top", "experts"), [(1, 8, 128), (16, 8, 128), (300, 6, 64), (4096, 2, 8)])
def test_a_power_law_gives_the_busiest_gpu_more_than_its_share(tokens: int, top: int, experts: int) -> None:
    alone = load_of(tokens, top, experts, 1, "power_law_1.2")
    assert (alone.rows, alone.tokens) == (tokens * top, tokens)
    assert top <= alone.experts <= experts
    for gpus in (2, 8):
        load = load_of(tokens, top, experts, gpus, "power_law_1.2")
        assert tokens * top / gpus <= load.rows <= min(tokens * top, tokens * experts / gpus)
        assert load.rows / top <= load.tokens <= min(tokens, load.rows)
        assert load.experts <= experts / gpus


def test_prompts_of_latents_are_attended_to_as_each_engine_does() -> None:
    shape = {"batch_size": 2, "isl": 300, "step": 0, "num_heads": 16, "kv_cache_dtype": "bfloat16"}
    pairs = 2 * 16 * 300 * 301 // 2
    written_out = likely_graph("mla prefill", shape, "trtllm", kernel="default")
    latents = likely_graph("mla prefill", shape, "sglang", kernel="flash_attention")
    assert matmul_flops(written_out) == pairs * 2 * (192 + 128)
    assert matmul_flops(latents) == pairs * 2 * (576 + 512)
    narrow = price(likely_graph("mla prefill", shape | {"kv_cache_dtype": "fp8"}, "trtllm"), part("h100_sxm")[0])
    assert [cost.quantises for cost in narrow] == [False, True, False]
    assert set(narrow[-1].matmul) == {"float8_e4m3fn"}


def test_an_8_bit_cache_of_latents_is_widened_where_the_kernel_wants_16() -> None:
    shape = {"batch_size": 4, "isl": 1, "step": 1000, "num_heads": 16, "kv_cache_dtype": "fp8"}
    graph = likely_graph("mla decode", shape, "sglang", kernel="flash_attention")
    *_, widened, attention = price(graph, part("h100_sxm")[0])
    assert sum(access.read for access in widened.traffic) == 4 * 1000 * 576
    assert sum(access.written for access in widened.traffic) == 2 * 4 * 1000 * 576
    assert set(attention.matmul) == {"bfloat16"}


def test_what_fxroof_has_no_op_for_is_refused() -> None:
    with pytest.raises(NotPricedError, match="int4_wo"):
        made("gemm", {"m": 1, "n": 64, "k": 64}, dtype="int4_wo")


def test_only_rows_that_cannot_be_what_they_say_are_left_out() -> None:
    shape = {"batch_size": 8, "isl": 12288, "num_heads": 96, "head_dim": 256}
    kind = {"operator": "prefill attention", "backend": "trtllm", "version": "1.3.0rc20", "dtype": "bfloat16/fp8"}

    def row(gpu: str, **changes: int) -> Measured:
        return Measured(gpu=gpu, kernel="", seconds=1.0, shape=shape | changes, **kind)

    assert "2^31" in excluded(row("h100_sxm"))
    assert not excluded(row("h100_sxm", batch_size=4))
    assert not excluded(row("b200"))
    assert not any(map(excluded, (*ROWS, *TYPICAL)))
