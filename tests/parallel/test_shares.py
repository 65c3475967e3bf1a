"""What one GPU of several holds, computes and sends, against the whole model's graph."""

import functools
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from fxroof.analyzer.capture import from_live, from_model
from fxroof.analyzer.cli import main
from fxroof.analyzer.errors import FxroofError, WorkloadError
from fxroof.analyzer.graph import Graph, TensorRef
from fxroof.analyzer.handover import collect
from fxroof.analyzer.load import load
from fxroof.analyzer.memory import Memory, memory
from fxroof.analyzer.pipeline import analyze, reprice
from fxroof.analyzer.pricing import price
from fxroof.analyzer.report import Traced, from_json, to_json
from fxroof.analyzer.scenario import Scenario
from fxroof.hardware.catalog import load as load_gpu
from support import CONFIGS, INPUTS, MODELS, TARGETS, cut
from torch import nn

pytestmark = [pytest.mark.xdist_group("shares"), pytest.mark.usefixtures("unboxed")]  # traces serve several tests

H200 = load_gpu("h200").gpu
LENGTHS: dict[str, Any] = {"batch_size": 2, "input_len": 96, "output_len": 32}
LINEARS = ("aten.linear.default", "fxroof.linear_scaled.default", "fxroof.linear_packed.default")


@functools.cache
def shared(name: str, tp: int = 1, ep: int = 1) -> Traced:
    target = TARGETS.get(name) or str(CONFIGS / name)
    layers = 4 if name == "deepseek-v3" else 2  # the first three of that have no experts
    model = load(cut(target, layers) if Path(target).is_dir() else target)
    scenario = Scenario(tp=tp, ep=ep, **LENGTHS)
    return collect(from_model(model, scenario, inputs=INPUTS.get(name, ())), lambda _: None).traced


def flops_by_module(graph: Graph) -> Counter[str]:
    found: Counter[str] = Counter()
    for op, cost in zip(graph.ops, price(graph, H200), strict=True):
        found[op.module] += cost.executed_matmul_flops
    return +found


def exchanges(graph: Graph) -> Counter[tuple[str, int]]:
    return Counter((c.exchange.kind, c.exchange.nbytes) for c in price(graph, H200) if c.exchange)


def needed(traced: Traced) -> Memory:
    return memory(
        traced.graphs,
        {name: price(graph, H200) for name, graph in traced.graphs.items()},
        H200,
        traced.scenario,
        parameter_bytes=traced.model.parameter_bytes,
        growth=traced.model.cache,
    )


@pytest.mark.parametrize(
    ("name", "tp", "ep", "everywhere"),
    [
        ("llama-3-8b", 2, 1, "nothing"),
        ("llama-3-8b", 8, 1, "nothing"),
        ("gptfast", 4, 1, "nothing"),
        ("mixtral-8x7b", 4, 1, "gate$"),
        ("mixtral-8x7b", 4, 4, "gate$"),
        ("qwen3-30b-a3b", 2, 2, "gate$"),
        ("deepseek-v3", 4, 4, "self_attn|gate$"),
        ("gpt-oss-20b", 2, 1, "mlp$"),  # the router's product is its parent's
        ("nanogpt", 2, 1, "attn"),
    ],
)
def test_flops_of_all_gpus_are_those_of_the_model_and_of_what_each_repeats(
    name: str, tp: int, ep: int, everywhere: str
) -> None:
    whole, share = shared(name), shared(name, tp, ep)
    for phase, graph in share.graphs.items():
        expected = flops_by_module(whole.graphs[phase])
        found = flops_by_module(graph)
        assert found.keys() == expected.keys()
        for module, flops in found.items():
            repeated = re.search(everywhere, module) or "rotary" in module
            assert flops * (1 if repeated else tp) == pytest.approx(expected[module], rel=1e-3), (phase, module)


@pytest.mark.parametrize("name", ["llama-3-8b", "gptfast", "deepseek-v3", "gpt-oss-20b", "gpt2", "mixtral-8x7b"])
def test_weights_of_all_gpus_are_those_of_the_model_and_of_what_each_repeats(name: str) -> None:
    share = shared(name, 2).model
    note = next(n for n in share.notes if n.startswith("held in full"))
    number, unit = note.split(":")[1].split()[:2]
    repeated = float(number) * {"GB": 1e9, "MB": 1e6}[unit]
    assert share.parameter_bytes_per_gpu is not None
    assert share.parameters == shared(name).model.parameters
    assert share.parameter_bytes == shared(name).model.parameter_bytes
    assert 2 * share.parameter_bytes_per_gpu == pytest.approx(share.parameter_bytes + repeated, rel=5e-3)
    assert needed(shared(name, 2)).weights_bytes == pytest.approx(share.parameter_bytes_per_gpu, rel=5e-3)


@pytest.mark.parametrize("name", ["llama-3-8b", "gptfast", "mixtral-8x7b"])
def test_more_gpus_never_hold_more_each(name: str) -> None:
    each = [needed(shared(name, tp)) for tp in (1, 2, 4)]
    for more, fewer in zip(each[1:], each, strict=False):
        assert more.weights_bytes < fewer.weights_bytes
        assert more.kv_cache_bytes <= fewer.kv_cache_bytes
        assert more.total_bytes < fewer.total_bytes
        if name != "gptfast":  # which makes logits of the whole prompt, and gathers them into another tensor
            assert more.activations_bytes <= fewer.activations_bytes


def test_a_layer_of_llama_adds_up_twice_what_its_tokens_are_wide() -> None:
    traced = shared("llama-3-8b", 8)
    hidden, layers, vocabulary = 4096, 2, 128256
    for phase, tokens in (("prefill", 2 * 96), ("decode", 2)):
        found = exchanges(traced.graphs[phase])
        # two a layer and the embedding's; the head's logits of the last token of each sequence
        assert found == {("all_reduce", tokens * hidden * 2): 2 * layers + 1, ("all_gather", 2 * vocabulary * 2): 1}


@pytest.mark.parametrize("shares", [{"tp": 4}, {"tp": 4, "ep": 4}], ids=str)
def test_collectives_follow_what_they_add_up_and_stand_where_it_stands(shares: dict[str, int]) -> None:
    graph = shared("mixtral-8x7b", **shares).graphs["prefill"]
    makers = {graph.tensors[t].storage: op for op in graph.ops for t in op.outputs if not graph.is_view(op)}
    for op in graph.ops:
        if op.target == "fxroof.all_reduce.default":
            given = op.args["x"]
            assert isinstance(given, TensorRef)
            maker = makers[graph.tensors[given.tensor].storage]
            assert op.module == maker.module
            assert op.span is not None
            assert op.span.library
            assert op.mutates == ("x",)
            assert graph.ops.index(maker) < graph.ops.index(op)


def test_what_the_growth_law_says_is_one_gpus_cache() -> None:
    whole, share, copies = (shared("llama-3-8b", tp).model.cache for tp in (1, 4, 16))
    assert whole is not None
    assert share is not None
    assert copies is not None
    assert share.nbytes(3, 5000) * 4 == whole.nbytes(3, 5000)
    assert copies.nbytes(3, 5000) * 8 == whole.nbytes(3, 5000)  # 8 KV heads: two GPUs hold each
    assert (whole.shards, share.shards, copies.shards) == (1, 4, 8)
    assert any("2 GPUs hold copies of each" in note for note in shared("llama-3-8b", 16).model.notes)


def test_rows_of_other_gpus_experts_cost_nothing_in_products() -> None:
    graph = shared("mixtral-8x7b", 4, 4).graphs["prefill"]
    assert graph.expert_ranks == 4
    products = [
        (op, cost)
        for op, cost in zip(graph.ops, price(graph, H200), strict=True)
        if op.target == "aten._grouped_mm.default"
    ]
    rows, hidden, inner = 2 * 96 * 2, 4096, 14336
    own = rows // 4
    for op, cost in products:
        out = graph.tensors[op.outputs[0]]
        assert out.shape[0] == rows
        assert cost.executed_matmul_flops == 2 * own * hidden * inner * (2 if out.shape[1] == 2 * inner else 1)
        traffic = {access.tensor: access for access in cost.traffic}
        assert traffic[op.outputs[0]].written == own * out.shape[1] * 2
        left, right = (op.args[key].tensor for key in ("self", "mat2"))
        assert traffic[left].read == own * graph.tensors[left].shape[1] * 2
        # every token may choose the same two experts, and one of them lies here; 2 are held, and all are used
        assert traffic[right].read * 2 == pytest.approx(traffic[right].expected_read)
        assert traffic[right].expected_read == graph.tensors[right].touched_bytes


def test_experts_used_on_a_gpu_are_its_part_of_those_used_at_all() -> None:
    for phase in ("prefill", "decode"):
        used = []
        for ep in (1, 2):
            graph = shared("qwen3-30b-a3b", ep, ep).graphs[phase]
            costs = price(graph, H200)
            op, cost = next((o, c) for o, c in zip(graph.ops, costs, strict=True) if "_grouped_mm" in o.target)
            used.append(next(a.expected_read for a in cost.traffic if a.tensor == op.args["mat2"].tensor))
        assert used[1] * 2 == pytest.approx(used[0], rel=1e-6)


def test_modules_that_do_not_run_on_a_share_stay_whole_and_are_named() -> None:
    notes = " ".join(shared("nanogpt", 2).model.notes)
    assert "left whole, because their forwards do not run on a share: CausalSelfAttention" in notes
    notes = " ".join(shared("vit_encoder", 2).model.notes)
    assert "encoder.layers.*.self_attn" in notes.split("held in full")[1]


def test_a_model_without_known_layers_is_refused() -> None:
    with pytest.raises(WorkloadError, match="none of its layers has a name"):
        shared("resnet18", 2)
    with pytest.raises(WorkloadError, match="forward of Attention does not run on a share"):
        shared("dit", 2)


def test_an_exported_program_is_refused() -> None:
    program = torch.export.export(nn.Sequential(nn.Linear(8, 8)), (torch.zeros(1, 8),))
    with pytest.raises(WorkloadError, match="exported program"):
        collect(from_live(program, None, Scenario(tp=2), "all", "as-is")[0], lambda _: None)


def test_a_live_module_is_left_as_it_was() -> None:
    module = nn.ModuleDict({"fc1": nn.Linear(8, 32), "fc2": nn.Linear(32, 8)})

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = module

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers["fc2"](self.layers["fc1"](x))

    for device in ("cpu", "meta"):
        live = Mlp().to(device)
        report = analyze(live, (torch.zeros(4, 8),), gpu="h100", scenario=Scenario(tp=2))
        assert report.model.parameter_bytes_per_gpu < report.model.parameter_bytes
        assert live.layers["fc1"].weight.shape == (32, 8)
        assert type(live.layers["fc2"]) is nn.Linear


def test_one_gpu_of_a_saved_report_stays_one_of_as_many() -> None:
    report = analyze(
        cut(str(CONFIGS / "llama-3-8b"), 2), gpu="h100", scenario=Scenario(tp=4, **LENGTHS), in_process=True
    )
    again = reprice(from_json(to_json(report)), gpus=["h200"])
    assert again.traces[0].scenario.tp == 4
    assert again.model.parameter_bytes_per_gpu == report.model.parameter_bytes_per_gpu
    assert again.runs[0].memory.weights_bytes == report.runs[0].memory.weights_bytes


def test_the_fewest_gpus_are_those_of_the_whole_model() -> None:
    one, eight = (needed(shared("llama-3.1-405b", tp)) for tp in (1, 8))
    assert one.min_gpus == eight.min_gpus == 1
    small = {"memory_usable_bytes": one.weights_bytes // 3 + one.activations_bytes + one.overhead_bytes}

    def fewest(tp: int) -> int | None:
        traced = shared("llama-3.1-405b", tp)
        costs = {name: price(graph, H200) for name, graph in traced.graphs.items()}
        return memory(
            traced.graphs,
            costs,
            replace(H200, **small),
            traced.scenario,
            parameter_bytes=traced.model.parameter_bytes,
            growth=traced.model.cache,
        ).min_gpus

    assert fewest(1) == 4
    assert fewest(8) in (3, 4)  # activations of a share are smaller


def test_the_command_line_says_what_does_not_go() -> None:
    target = cut(str(CONFIGS / "llama-3-8b"), 1)
    done = CliRunner().invoke(main, ["analyze", target, "--gpu", "h100", "--tp", "3"])
    assert done.exit_code == 2
    assert "32 heads, which 3 GPUs cannot share evenly" in " ".join(done.stderr.split())
    done = CliRunner().invoke(main, ["analyze", cut(str(CONFIGS / "gpt-oss-20b"), 1), "--gpu", "h100", "--tp", "8"])
    assert done.exit_code == 2
    assert "--tp 8 --ep 8 deals out its experts whole" in " ".join(done.stderr.split())
    done = CliRunner().invoke(main, ["analyze", f"{MODELS / 'resnet.py'}:resnet18", "--gpu", "h100", "--ep", "2"])
    assert done.exit_code == 2
    assert "brings no plan to deal out its experts" in " ".join(done.stderr.split())


def test_a_saved_report_cannot_be_cut_again(tmp_path: Path) -> None:
    saved = tmp_path / "report.json"
    saved.write_text(to_json(analyze(cut(str(CONFIGS / "llama-3-8b"), 1), gpu="h100", scenario=Scenario(**LENGTHS))))
    done = CliRunner().invoke(main, ["analyze", str(saved), "--gpu", "h100", "--tp", "2"])
    assert done.exit_code == 2
    assert "--tp cannot change" in " ".join(done.stderr.split())


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
QUANTISED = {
    "fp8": FP8,
    "fp8-tensor": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    "fbgemm": {"quant_method": "fbgemm_fp8", "modules_to_not_convert": ["lm_head"]},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": False},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
}


def quantised(method: str, **changes: Any) -> Traced:
    folder = Path(cut(str(CONFIGS / "llama-3-8b"), 1))
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content | {"quantization_config": QUANTISED[method]}))
    tp = changes.get("tp", 4)
    return collect(from_model(load(str(folder)), Scenario(tp=tp, **LENGTHS)), lambda _: None).traced


@pytest.mark.parametrize("method", QUANTISED)
def test_packed_weights_are_cut_with_their_scales(method: str) -> None:
    traced = quantised(method)
    model, graph = traced.model, traced.graphs["prefill"]
    # what is not cut: norms, scales of whole tensors or of outputs where inputs are cut
    assert model.parameter_bytes < 4 * model.parameter_bytes_per_gpu < 1.001 * model.parameter_bytes
    for op in graph.ops:
        if op.target in LINEARS and op.module.endswith(("down_proj", "gate_proj")):
            out = graph.tensors[op.outputs[0]]
            assert out.shape[-1] == (4096 if op.module.endswith("down_proj") else 14336 // 4)


def test_a_cut_through_a_block_of_scales_is_refused() -> None:
    with pytest.raises(FxroofError, match=r"blocks of 128 features"):
        quantised("fp8", intermediate_size=14336 + 128)
