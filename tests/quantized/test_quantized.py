"""Quantised transformers configs: published checkpoint sizes, and the unquantised trace of a config as oracle."""

import functools
import json
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from fxroof.analyzer.analysis import PhaseAnalysis
from fxroof.analyzer.errors import TargetError
from fxroof.analyzer.graph import Role
from fxroof.analyzer.load import load
from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.pricing import price
from fxroof.analyzer.report import Report
from fxroof.analyzer.scenario import Scenario
from fxroof.hardware.catalog import load as load_gpu
from support import CONFIGS, NO_RULES

SCENARIO = Scenario(batch_size=1, input_len=256, output_len=64)

pytestmark = pytest.mark.xdist_group("quantized")  # traces serve several tests


def scheme(bits, kind, strategy, inputs=None, **more):
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "ignore": ["lm_head"], "config_groups": {"group_0": group}}


TOKENWISE = {"type": "float", "num_bits": 8, "strategy": "token", "dynamic": True}
METHODS = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    "fp8-vllm": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    "fbgemm": {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "gptq-ordered": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False},
    "gptq-8bit": {"quant_method": "gptq", "bits": 8, "group_size": 128, "sym": True},
    "ct-int4": scheme(4, "int", "group", group_size=128),
    "ct-fp8": scheme(8, "float", "channel", TOKENWISE),
    "ct-fp8-block": scheme(8, "float", "block", TOKENWISE, block_structure=[128, 128]),
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}
MULTIPLIED_IN = {
    "fp8": "float8_e4m3fn",
    "fp8-tensor": "float8_e4m3fn",
    "fp8-vllm": "float8_e4m3fn",
    "fbgemm": "float8_e4m3fn",
    "ct-fp8": "float8_e4m3fn",
    "ct-fp8-block": "float8_e4m3fn",
    "awq": "float16",
    "int8": "int8",
}
BITS = {"awq": 4, "gptq": 4, "gptq-ordered": 4, "ct-int4": 4, "nf4": 4}


def folder(name: str, quantization: object = "as published", layers: int | None = None, **changes: object) -> str:
    config = json.loads((CONFIGS / name / "config.json").read_text())
    if layers:
        config["num_hidden_layers"] = layers
        config.pop("layer_types", None)
    if quantization is None:
        config.pop("quantization_config", None)
    elif quantization != "as published":
        config["quantization_config"] = quantization
    made = Path(tempfile.mkdtemp()) / name
    made.mkdir()
    (made / "config.json").write_text(json.dumps(config | changes))
    return str(made)


@functools.cache
def report(name: str, method: str | None, layers: int) -> Report:
    return analyze(
        folder(name, METHODS.get(method, method), layers),
        gpus=["h100"],
        scenario=SCENARIO,
        selection=NO_RULES,
        in_process=True,
    )


def phases(one: Report) -> dict[str, PhaseAnalysis]:
    return {phase.name: phase for phase in one.runs[0].phases}


def matmul_by_dtype(one: Report, phase: str, gpu: str = "h100") -> Counter:
    total = Counter()
    for cost in price(one.graphs[phase], load_gpu(gpu).gpu):
        total.update(cost.matmul)
    return total


def weight_bytes_of(name: str, quantization: object, layers: int | None = None) -> int:
    return load(folder(name, quantization, layers)).parameter_bytes


# published checkpoints


def test_deepseek_v3_has_671_billion_parameters_in_the_published_bytes() -> None:
    model = load(folder("deepseek-v3"))
    assert model.parameters == pytest.approx(671.0e9, rel=1e-4)
    # the 688.587 GB of the published files hold one more layer for multi-token prediction, with a projection, an
    # embedding and a head of its own in bfloat16 (README_WEIGHTS.md of the checkpoint)
    layer = weight_bytes_of("deepseek-v3", "as published", 5) - weight_bytes_of("deepseek-v3", "as published", 4)
    own = 2 * (2 * 7168 * 7168 + 2 * 129280 * 7168)
    assert model.parameter_bytes + layer + own == pytest.approx(688.587e9, rel=1e-4)
    assert model.dtypes["float8_e4m3fn"] / model.parameters > 0.99


@pytest.mark.parametrize(
    ("name", "parameters", "checkpoint"),
    [("gpt-oss-20b", 20.91e9, 13_761_264_768), ("gpt-oss-120b", 116.83e9, 65_248_815_744)],
)
def test_gpt_oss_has_the_published_parameters_and_bytes(name: str, parameters: float, checkpoint: int) -> None:
    model = load(folder(name))
    assert model.parameters == pytest.approx(parameters, rel=1e-3)
    # transformers widens the experts' biases from the checkpoint's bfloat16 to float32
    biases = 2 * model.dtypes["float32"]
    assert model.parameter_bytes - biases == checkpoint


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_llama_3_8b_in_four_bits_has_the_size_of_its_checkpoints(method: str) -> None:
    model = load(folder("llama-3-8b", METHODS[method]))
    assert model.parameter_bytes == pytest.approx(5.73e9, rel=2e-3)
    assert model.parameters == load(folder("llama-3-8b", None)).parameters
    assert sum(model.dtypes.values()) == model.parameters


# against the unquantised trace


@pytest.mark.parametrize(
    ("name", "method"),
    [("llama-3-8b", m) for m in METHODS] + [("qwen3-30b-a3b", m) for m in ("fp8", "awq", "nf4")],
)
def test_every_method_does_the_matmul_flops_of_the_plain_model(name: str, method: str) -> None:
    plain, packed = report(name, None, 2), report(name, method, 2)
    assert packed.runs[0].coverage.fraction == 1
    assert set(phases(packed)) == {"prefill", "decode"}
    for phase, analysed in phases(plain).items():
        assert phases(packed)[phase].flops.matmul == analysed.flops.matmul
    assert packed.model.parameters == plain.model.parameters
    assert packed.model.parameter_bytes < plain.model.parameter_bytes


@pytest.mark.parametrize("method", METHODS)
def test_products_are_filed_under_the_type_that_matrix_units_multiply(method: str) -> None:
    plain = matmul_by_dtype(report("llama-3-8b", None, 2), "decode")
    packed = matmul_by_dtype(report("llama-3-8b", method, 2), "decode")
    wanted = MULTIPLIED_IN.get(method, "bfloat16")
    layers = 2 * 2 * 218_103_808
    assert packed[wanted] >= layers
    assert sum(packed.values()) == sum(plain.values())


@pytest.mark.parametrize("method", METHODS)
def test_a_decoded_token_reads_the_packed_bytes(method: str) -> None:
    plain = phases(report("llama-3-8b", None, 2))["decode"].bytes.weight
    packed = phases(report("llama-3-8b", method, 2))["decode"].bytes.weight
    layers = 2 * 218_103_808
    bits = BITS.get(method, 8)
    saved = plain - packed
    scales = 2 * layers - saved - layers * bits // 8
    # a 16-bit scale for 128 weights is 1/64 byte each; nf4's 32-bit scale for 64 is 1/16; zero points add 1/256
    assert 0 <= scales <= layers * (1 / 16 if method == "nf4" else 1 / 64 + 1 / 256 + 1 / 1000)


def test_experts_are_read_packed_and_only_those_chosen() -> None:
    plain, packed = (phases(report("qwen3-30b-a3b", m, 2))["decode"] for m in (None, "gptq"))
    experts = 2 * 8 * 3 * 2048 * 768
    attention = 2 * (2 * 2048 * 4096 + 2 * 2048 * 512)
    assert plain.bytes.weight - packed.bytes.weight == pytest.approx(
        (experts + attention) * (2 - 0.5 - 1 / 64), rel=1e-3
    )


def test_mxfp4_reads_four_chosen_experts_at_four_and_a_quarter_bits() -> None:
    packed, plain = report("gpt-oss-20b", "as published", 2), report("gpt-oss-20b", None, 2)
    assert packed.runs[0].coverage.fraction == 1
    for phase in ("prefill", "decode"):
        assert phases(packed)[phase].flops.matmul == phases(plain)[phase].flops.matmul
    chosen = 2 * 4 * 3 * 2880 * 2880
    biases = 2 * 4 * (5760 + 2880) * 2
    saved = phases(plain)["decode"].bytes.weight - phases(packed)["decode"].bytes.weight
    assert saved == chosen * 2 - chosen * 17 // 32 - biases
    assert set(matmul_by_dtype(packed, "decode")) == {"bfloat16"}
    assert set(matmul_by_dtype(packed, "decode", "b200")) == {"bfloat16"}


def test_deepseek_v3_runs_both_phases_in_fp8() -> None:
    one = report("deepseek-v3", "as published", 4)
    plain = report("deepseek-v3", None, 4)
    assert one.runs[0].coverage.fraction == 1
    for phase in ("prefill", "decode"):
        assert phases(one)[phase].flops.matmul == phases(plain)[phase].flops.matmul
        flops = matmul_by_dtype(one, phase)
        assert flops["float8_e4m3fn"] > 0
        # the router stays in float32, attention and the head in bfloat16
        assert set(flops) == {"float8_e4m3fn", "bfloat16", "float32"}


def test_a_decoded_token_of_deepseek_v3_reads_its_active_parameters() -> None:
    # three layers without experts and the first with them, then one more: all others are like that one
    four, five = (phases(report("deepseek-v3", "as published", n))["decode"].bytes.weight for n in (4, 5))
    # 36.6 billion parameters are active for a token, its head among them in bfloat16 (README_WEIGHTS.md)
    head = 129280 * 7168
    assert four + (61 - 4) * (five - four) == pytest.approx(36.6e9 + head, rel=0.02)


# kernels


def test_activations_are_quantised_apart_on_hopper_and_on_the_way_in_on_blackwell() -> None:
    graph = report("deepseek-v3", "as published", 4).graphs["prefill"]
    hopper, blackwell = (price(graph, load_gpu(g).gpu) for g in ("h100", "b200"))
    index = next(i for i, op in enumerate(graph.ops) if op.target.startswith("fxroof.quantize_activations"))
    tokens, width = 256, 7168
    read = sum(a.read for a in hopper[index].traffic)
    written = sum(a.written for a in hopper[index].traffic)
    assert (read, written) == (2 * tokens * width, tokens * width + 4 * tokens * width // 128)
    assert sum(a.written for a in blackwell[index].traffic) == 0
    follower = next(i for i in range(index, len(graph.ops)) if graph.ops[i].target.startswith("fxroof.linear_scaled"))
    roles = {graph.role(a.tensor) for a in blackwell[follower].traffic if a.read}
    assert roles == {Role.WEIGHT}


def test_bitsandbytes_unpacks_the_matrix_for_more_than_one_row() -> None:
    one = report("llama-3-8b", "nf4", 2)
    targets = {phase: Counter(op.target for op in graph.ops) for phase, graph in one.graphs.items()}
    assert targets["decode"]["fxroof.linear_packed.default"] == 14
    assert targets["decode"]["fxroof.dequantize_weight.default"] == 0
    assert targets["prefill"]["fxroof.dequantize_weight.default"] == 14
    plain = phases(report("llama-3-8b", None, 2))["prefill"].bytes
    unpacked = 2 * 218_103_808 * 2
    assert phases(one)["prefill"].bytes.activation == plain.activation + 2 * unpacked


def test_a_column_order_copies_the_activations() -> None:
    plain, ordered = (phases(report("llama-3-8b", m, 2))["prefill"].bytes for m in ("gptq", "gptq-ordered"))
    widths = 2 * (6 * 4096 + 14336)
    assert ordered.activation - plain.activation == 2 * 2 * 256 * widths


def test_reading_of_experts_lies_between_the_least_and_all() -> None:
    one = report("qwen3-30b-a3b", "fp8", 2)
    graph = one.graphs["prefill"]
    for op, cost in zip(graph.ops, price(graph, load_gpu("h100").gpu), strict=True):
        if op.target.startswith("fxroof.grouped_linear"):
            stacks = [a for a in cost.traffic if a.expected_read]
            assert len(stacks) == 2
            for access in stacks:
                whole = graph.tensors[access.tensor].nbytes
                assert access.read == whole * 8 // 128
                assert access.read < access.expected_read <= whole


# what is converted


def test_listed_modules_are_left_and_the_report_says_so() -> None:
    kept = METHODS["fp8"] | {"modules_to_not_convert": ["lm_head", "model.layers.0", "model.layers.*.self_attn.q_proj"]}
    model = load(folder("llama-3-8b", kept, 2))
    held = {n.removesuffix(".weight"): str(p.dtype) for n, p in model.module.named_parameters() if n.endswith("weight")}
    assert held["model.layers.0.mlp.up_proj"] == "torch.bfloat16"
    assert held["model.layers.1.self_attn.q_proj"] == "torch.bfloat16"
    assert held["model.layers.1.self_attn.k_proj"] == "torch.float8_e4m3fn"
    note = next(n for n in model.notes if n.startswith("quantised by fp8"))
    assert "6 linear layers" in note
    assert "lm_head (bfloat16)" in note


def test_without_a_list_the_head_is_left_and_with_one_only_the_list_counts() -> None:
    names = {
        listed: {n for n, p in load(folder("llama-3-8b", q, 1)).module.named_parameters() if "float8" in str(p.dtype)}
        for listed, q in ((False, METHODS["fp8"]), (True, METHODS["fp8"] | {"modules_to_not_convert": ["mlp"]}))
    }
    assert "lm_head.weight" not in names[False]
    assert "lm_head.weight" in names[True]


def test_ignored_patterns_of_compressed_tensors() -> None:
    quantization = METHODS["ct-int4"] | {"ignore": ["lm_head", "re:.*self_attn.*", "re:.*experts.*"]}
    with pytest.raises(TargetError, match="converts no layer"):
        load(folder("qwen3-30b-a3b", quantization, 1))
    model = load(folder("llama-3-8b", quantization, 1))
    assert any("3 linear layers" in note for note in model.notes)


def test_bitsandbytes_leaves_stacked_experts() -> None:
    model = load(folder("qwen3-30b-a3b", METHODS["nf4"], 1))
    assert any("model.layers.*.mlp.experts (bfloat16)" in note for note in model.notes)


def test_awq_is_loaded_in_float16() -> None:
    model = load(folder("llama-3-8b", METHODS["awq"], 1))
    assert "transformers loads awq models in float16, not bfloat16" in model.notes
    assert set(model.dtypes) == {"int4", "float16"}


def test_dequantize_is_priced_unpacked_and_said() -> None:
    model = load(folder("llama-3-8b", METHODS["fp8"] | {"dequantize": True}, 1))
    assert model.parameter_bytes == 2 * model.parameters
    assert any("dequantize" in note for note in model.notes)


# refusals


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "hqq"}, "'hqq' cannot be priced"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "'modelopt' cannot be priced"),
        ({"bits": 4}, "'unknown' cannot be priced"),
        (["fp8"], "is a list"),
        ({"quant_method": "gptq"}, "cannot be understood: KeyError"),
        ({"quant_method": "gptq", "bits": "four"}, "cannot be understood"),
        ({"quant_method": "fp8", "weight_block_size": [0, 0]}, "cannot be understood: ZeroDivisionError"),
        ({"quant_method": "fp8", "modules_to_not_convert": ["["]}, "cannot be understood"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*mlp.*": {"bits": 8}}}, "other bits"),
        ({"quant_method": "mxfp4"}, "converts no layer"),
        (scheme(4, "float", "tensor_group", group_size=16), "4-bit float"),
    ],
)
def test_what_cannot_be_priced_is_refused_by_name(quantization: object, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        load(folder("llama-3-8b", quantization, 1))
