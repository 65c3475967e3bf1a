"""Published numbers of four public explanations of the memory wall, reproduced from real traces.

The inputs and expected values are those of the explanations; "about" there is a tolerance here.
"""

import dataclasses

import pytest
import torch
from fxroof.analyzer.analysis import PhaseAnalysis, analyze_phase
from fxroof.analyzer.cost import Status
from fxroof.analyzer.graph import Graph
from fxroof.analyzer.load import from_module
from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.pricing import price
from fxroof.analyzer.roofline import Bound
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.trace import trace
from fxroof.hardware.catalog import load
from support import NO_RULES, traced
from torch import nn
from torch.nn import functional as F

H100, A100, B200, M2_ULTRA = (load(n).gpu for n in ("h100_sxm", "a100_sxm_80gb", "b200", "m2_ultra"))
WIDTH = 8192


class Dense(nn.Module):
    """Nothing but square linears of 67.1 M parameters: a decode step without attention."""

    def __init__(self, parameters: float) -> None:
        super().__init__()
        count = round(parameters / WIDTH**2)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def dense(billions: float, gpu: str, batch_size: int = 1) -> PhaseAnalysis:
    with torch.device("meta"):
        model = Dense(billions * 1e9).half()
    report = analyze(model, gpus=[gpu], scenario=Scenario(batch_size=batch_size), selection=NO_RULES)
    return report.runs[0].phases[0]


def graph_of(function: object, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float16) -> Graph:
    class Module(nn.Module):
        def forward(self, *args: torch.Tensor) -> torch.Tensor:
            return function(*args)  # type: ignore[operator, no-any-return]  # any op

    return trace(Module(), tuple(torch.empty(s, dtype=dtype, device="meta") for s in shapes))


def test_1_ridge_point_of_the_h100() -> None:
    assert H100.ridge("bfloat16") == pytest.approx(295, abs=1)


def test_2_and_3_a_decoded_token_of_7b_on_an_h100() -> None:
    phase = dense(7, "h100_sxm")
    assert phase.floor.compute_seconds == pytest.approx(14e-6, rel=0.02)
    assert phase.floor.memory_seconds == pytest.approx(4.2e-3, rel=0.02)
    assert 1 / phase.seconds.floor == pytest.approx(240, rel=0.02)
    assert phase.seconds.floor <= phase.seconds.bound < 5.9e-3, "5.9 ms were measured in the field"


def test_4_70b_on_one_h100() -> None:
    phase = dense(70, "h100_sxm")
    assert 1 / phase.seconds.floor == pytest.approx(24, rel=0.02)
    assert phase.bytes.weight > H100.memory_usable_bytes, "and it does not fit"


def test_5_the_same_on_a_b200() -> None:
    assert dense(70, "b200").seconds.floor == pytest.approx(18e-3, rel=0.02)
    assert round(dense(7, "b200").seconds.floor * 1e3) == 2


def test_6_the_floor_does_not_move_with_a_few_more_sequences_or_with_more_flops() -> None:
    alone, few = dense(7, "h100_sxm"), dense(7, "h100_sxm", batch_size=8)
    assert few.seconds.floor == pytest.approx(alone.seconds.floor, rel=1e-3)
    faster = dataclasses.replace(H100, tensor={k: 2 * v for k, v in H100.tensor.items()})
    graph = traced("llama-3-8b").graphs["decode"]
    before, after = analyze_phase(graph, H100)[0].seconds, analyze_phase(graph, faster)[0].seconds
    assert after.floor == before.floor
    assert after.bound == pytest.approx(before.bound, rel=1e-4)
    for phase in (alone, few, dense(7, "h100_sxm", batch_size=4096)):
        assert phase.seconds.floor == max(phase.floor.memory_seconds, phase.floor.compute_seconds)
        for op in phase.ops:
            assert op.seconds == max(op.lanes.tensor, op.lanes.vector, op.lanes.special, op.lanes.memory)


def test_7_relu_has_a_quarter_of_a_flop_per_byte() -> None:
    (op,) = analyze_phase(graph_of(F.relu, (4096, 4096)), H100)[0].ops
    assert op.intensity == 0.25


def test_8_decode_has_about_one_flop_per_byte_and_32_with_32_sequences() -> None:
    assert dense(7, "h100_sxm").intensity == pytest.approx(1, rel=0.01)
    weights_only = dense(7, "h100_sxm", batch_size=32)
    assert weights_only.flops.matmul / weights_only.bytes.weight == pytest.approx(32)
    alone = analyze_phase(traced("llama-3-8b", Scenario()).graphs["decode"], H100)[0]
    assert alone.intensity == pytest.approx(1, rel=0.15)
    many = analyze_phase(traced("llama-3-8b", Scenario(batch_size=32)).graphs["decode"], H100)[0]
    assert 5 < many.intensity < 32, "less than 32 with the KV cache"


def test_9_intensity_of_prefill_grows_until_it_is_compute_bound() -> None:
    lengths = (64, 256, 1024, 4096)
    phases = [
        analyze_phase(traced("llama-3-8b", Scenario(input_len=n, output_len=32)).graphs["prefill"], H100)[0]
        for n in lengths
    ]
    intensities = [phase.intensity for phase in phases]
    assert intensities == sorted(intensities)
    assert phases[0].bound == "memory"
    assert phases[-1].bound == "compute"


@pytest.mark.parametrize("n", [1500, 2048, 4096])
def test_10_a_large_square_gemm_has_500_flops_per_byte(n: int) -> None:
    (op,) = analyze_phase(graph_of(torch.mm, (n, n), (n, n)), H100)[0].ops
    assert op.intensity >= 500
    assert op.bound == "compute"


def test_11_sequences_share_one_weight_read_until_the_cache_takes_over() -> None:
    phases = {
        n: analyze_phase(traced("llama-3-8b", Scenario(batch_size=n)).graphs["decode"], H100)[0] for n in (1, 32, 256)
    }
    embedding_rows = 31 * 4096 * 2
    assert phases[32].bytes.weight - phases[1].bytes.weight == embedding_rows
    assert phases[32].flops.matmul == 32 * phases[1].flops.matmul
    assert phases[1].bytes.kv_cache < phases[1].bytes.weight
    assert phases[256].bytes.kv_cache > phases[256].bytes.weight


def test_12_four_bit_weights_are_a_quarter_of_the_bytes_and_the_same_flops() -> None:
    rows, inner, columns, group = 16, 4096, 4096, 128

    class Quantised(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            packed = torch.empty(columns // 8, inner // 64, 32, 2, dtype=torch.int32, device="meta")
            scales = torch.empty(inner // group, columns, 2, dtype=torch.bfloat16, device="meta")
            self.register_buffer("packed", packed)
            self.register_buffer("scales", scales)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten._weight_int4pack_mm(x, self.packed, group, self.scales)  # type: ignore[no-any-return]  # ops are untyped

    x = torch.empty(rows, inner, dtype=torch.bfloat16, device="meta")
    narrow, _ = analyze_phase(trace(Quantised(), (x,)), H100)
    with torch.device("meta"):
        wide, _ = analyze_phase(trace(nn.Linear(inner, columns, bias=False).bfloat16(), (x,)), H100)
    scale_bytes = inner // group * columns * 2 * 2
    assert narrow.bytes.weight == wide.bytes.weight // 4 + scale_bytes
    assert narrow.flops.matmul == wide.flops.matmul


def test_13_k_tokens_are_verified_by_one_weight_read() -> None:
    k, context = 8, 2176
    step = traced("llama-3-8b", Scenario()).graphs["decode"]
    pass_over = traced("llama-3-8b", Scenario(input_len=context + k, prefix_len=context)).graphs["prefill"]
    one, verify = analyze_phase(step, H100)[0], analyze_phase(pass_over, H100)[0]
    rows = (k - 1) * 4096 * 2  # the embedding of each token is a row of its own
    assert verify.bytes.weight == pytest.approx(one.bytes.weight + rows, rel=1e-4)
    assert verify.flops.matmul > 5 * one.flops.matmul
    assert verify.seconds.bound < 1.1 * one.seconds.bound
    assert verify.seconds.estimate < 1.3 * one.seconds.estimate


def test_14_flash_attention_turns_from_memory_to_compute_where_scores_are_not_written() -> None:
    class Naive(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.softmax(q @ k.transpose(-1, -2) / 128**0.5, dim=-1) @ v

    class Flash(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, v)

    qkv = tuple(torch.empty(1, 32, 8192, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
    naive, flash = (analyze_phase(trace(module, qkv), A100)[0] for module in (Naive(), Flash()))
    assert naive.flops.matmul == flash.flops.matmul
    assert (naive.bound, flash.bound) == (Bound.MEMORY, Bound.COMPUTE)
    assert 2 <= naive.seconds.bound / flash.seconds.bound <= 10
    assert 2 <= naive.seconds.estimate / flash.seconds.estimate <= 10


def test_15_fewer_kv_heads_and_narrower_keys_cut_the_cache_in_proportion() -> None:
    def cache_bytes(heads: int, dtype: torch.dtype) -> int:
        query = torch.empty(1, 32, 1, 128, dtype=dtype, device="meta")
        key, value = (torch.empty(1, heads, 4096, 128, dtype=dtype, device="meta") for _ in range(2))

        class Attention(nn.Module):
            def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        graph = trace(Attention(), (query, key, value), cache=(key, value))
        return analyze_phase(graph, H100)[0].bytes.kv_cache

    assert cache_bytes(32, torch.bfloat16) == 4 * cache_bytes(8, torch.bfloat16)
    assert cache_bytes(8, torch.bfloat16) == 2 * 8 * 4096 * 128 * 2


def test_16_expert_bytes_follow_the_experts_touched() -> None:
    def expert_bytes(batch_size: int) -> tuple[int, int, int]:
        graph = traced("mixtral-8x7b", Scenario(batch_size=batch_size)).graphs["decode"]
        costs = price(graph, H100)
        grouped = [
            access
            for op, cost in zip(graph.ops, costs, strict=True)
            if op.target.startswith("aten._grouped_mm") and cost.status is Status.PRICED
            for access in cost.traffic
            if access.expected_read
        ]
        assert grouped
        stored = sum(graph.tensors[a.tensor].nbytes for a in grouped)
        return sum(a.read for a in grouped), sum(a.expected_read or 0 for a in grouped), stored

    read, expected, stored = expert_bytes(1)
    assert read == expected == stored * 2 // 8, "one token reads its two experts of eight"
    read, expected, stored = expert_bytes(4)
    assert read == stored * 2 // 8
    assert expected == pytest.approx(stored * (1 - (1 - 2 / 8) ** 4), rel=1e-3)
    read, expected, stored = expert_bytes(64)
    assert expected == pytest.approx(stored, rel=1e-3)


def test_17_mfu_of_decode_at_batch_1_is_under_one_percent() -> None:
    phase, _ = analyze_phase(traced("llama-3-8b", Scenario()).graphs["decode"], H100)
    assert 0 < phase.mfu < 0.01
    assert phase.mbu > 0.99


def test_19_an_h100_decodes_as_much_faster_than_an_a100_as_its_memory_is() -> None:
    graph = traced("llama-3-8b", Scenario()).graphs["decode"]
    ratio = analyze_phase(graph, A100)[0].seconds.bound / analyze_phase(graph, H100)[0].seconds.bound
    assert ratio == pytest.approx(1.64, rel=0.02)
    assert H100.tensor["bfloat16"] / A100.tensor["bfloat16"] > 3


def test_20_a_weight_of_a_projection_does_not_fit_on_chip_and_its_tile_does() -> None:
    graph = trace(
        nn.Linear(4096, 4096, bias=False, dtype=torch.float16, device="meta"),
        (torch.empty(1, 4096, dtype=torch.float16, device="meta"),),
    )
    assert analyze_phase(graph, H100)[0].bytes.weight == pytest.approx(33.5e6, rel=2e-3)
    shared, units = H100.shared_memory_per_sm_bytes, H100.sm_count
    assert shared == 228 * 1024
    assert units == 132
    assert shared > 2 * 128 * 128 * 2, "two tiles: room for double buffering"
    assert shared * units < analyze_phase(graph, H100)[0].bytes.weight < (H100.cache_bytes or 0)


def test_21_the_host_link_is_fifty_times_slower_than_device_memory() -> None:
    assert H100.host_bandwidth is not None
    assert H100.memory_bandwidth / H100.host_bandwidth == pytest.approx(50, rel=0.1)


def test_22_prefill_pays_for_the_new_tokens_only() -> None:
    whole, reused = (
        analyze_phase(traced("llama-3-8b", Scenario(prefix_len=n)).graphs["prefill"], H100)[0] for n in (0, 1536)
    )
    assert reused.tokens == whole.tokens / 4
    # all but attention, which still reads the prefix, and the head, which sees one row
    assert reused.flops.matmul == pytest.approx(whole.flops.matmul / 4, rel=0.1)
    assert reused.bytes.kv_cache > 0
    assert reused.seconds.bound < whole.seconds.bound / 2


def test_23_the_memory_pyramid_narrows_upwards_and_quickens() -> None:
    levels = {level.name: level for level in A100.memory_levels}
    order = ["L2", "device memory", "peer link", "host link"]
    speeds = [level.bandwidth for name in order if (level := levels[name]).bandwidth]
    assert speeds == sorted(speeds, reverse=True)
    assert len(speeds) == len(order)
    sizes = [level.size for level in A100.memory_levels if level.size and level.name != "registers"]
    assert sizes == sorted(sizes)


def test_24_a_unified_memory_of_800_gb_per_second_decodes_like_a_card_of_that_bandwidth() -> None:
    graph = traced("llama-3-8b", Scenario()).graphs["decode"]
    card = load("rtx_3090").gpu  # 936 GB/s
    unified, discrete = (analyze_phase(graph, gpu)[0].seconds for gpu in (M2_ULTRA, card))
    assert unified.floor / discrete.floor == pytest.approx(936 / 800, rel=0.01)
    assert unified.bound / discrete.bound < 1.5, "no L2 is published for it, and Metal repeats the KV heads"


def test_two_8b_layers_in_decode_cost_what_runs_not_what_export_invents() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    )
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    scenario = Scenario(batch_size=16, input_len=4064, output_len=64, lengths_given=True)
    report = analyze(module, gpus=["h100_sxm"], scenario=scenario, phase="decode", selection=NO_RULES)
    assert scenario.context_len == 4096
    assert report.runs[0].phases[0].bytes.total == pytest.approx(3.57e9, rel=0.01)
    assert from_module(module).parameters == report.model.parameters
