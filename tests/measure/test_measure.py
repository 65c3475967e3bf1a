import dataclasses
import gc
import json
import math
from pathlib import Path

import pytest
import torch
from fxroof.analyzer import clock
from fxroof.analyzer.clock import Bench
from fxroof.analyzer.clocked import MeasureError, Order
from fxroof.analyzer.errors import FxroofError, ReportFileError
from fxroof.analyzer.handover import PhaseFailed
from fxroof.analyzer.load import load
from fxroof.analyzer.materialize import RealMemory, vocabulary_of
from fxroof.analyzer.measure import measure
from fxroof.analyzer.measured import Measured, MeasuredPhase, read, to_json
from fxroof.analyzer.meta import keeping
from fxroof.analyzer.request import Request
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.workload import plan

pytestmark = pytest.mark.xdist_group("measure")

HERE = Path(__file__).parent
MODELS = HERE / "models.py"
PART = str(HERE / "machine.toml")
ORDER = Order(device="cpu", gpu=PART, runs=3, seconds=0.2, threads=1)
SHORT = Scenario(input_len=12, output_len=4, lengths_given=True)
EXAMPLE = str(HERE.parent.parent / "examples" / "mymodel.py")
TWO_LAYERS = "GPT(GPTConfig(n_layers=2, dim=64, n_heads=4, n_kv_heads=2, hidden_dim=128, vocab_size=200))"
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "head_dim": 16,
}  # fmt: skip


def ran(target: str, order: Order = ORDER, *, in_process: bool = True, **request: object) -> Measured:
    return measure(Request(target=target, scenario=SHORT, **request), order, in_process=in_process)  # type: ignore[arg-type]  # options of a request


def config(folder: Path, **content: object) -> str:
    (folder / "config.json").write_text(json.dumps({"dtype": "bfloat16", **content}), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def example() -> Measured:
    return ran(EXAMPLE, init=TWO_LAYERS)


@pytest.fixture(scope="module")
def mlp() -> MeasuredPhase:
    (phase,) = ran(f"{MODELS}:Mlp").phases
    return phase


def assert_sound(phase: MeasuredPhase) -> None:
    """Every op was seen to run, and took some time, but not much more than all together."""
    assert phase.kernels_failure == ""
    assert [call.target for call in phase.calls if not call.seen] == []
    assert all(call.seconds > 0 for call in phase.calls if call.ran)
    assert all(0 < call.least <= call.seconds for call in phase.calls if call.ran)
    assert 0 < phase.eager.least <= phase.eager.median
    assert sum(call.least for call in phase.calls) < 10 * phase.eager.median + 0.05
    assert phase.too_fast == ()
    assert all(stray.seconds >= 0 and stray.calls > 0 for stray in phase.strays)


def test_every_op_of_the_example_is_seen_to_run(example: Measured) -> None:
    assert [phase.name for phase in example.phases] == ["prefill", "decode"]
    for phase in example.phases:
        assert_sound(phase)
        assert phase.strays == ()
        linears = [call for call in phase.calls if call.target == "aten.linear.default"]
        assert len(linears) == 2 * 7 + 1
        assert {call.module for call in linears} >= {"lm_head", "blocks.0.attn.q_proj", "blocks.1.mlp.down_proj"}
        assert all(call.ran for call in linears)


def test_ops_stand_beside_the_bounds_of_the_analysis(mlp: MeasuredPhase) -> None:
    assert_sound(mlp)
    assert [call.target for call in mlp.calls] == [
        "aten.linear.default", "aten.relu.default", "aten.linear.default", "aten.mul.Tensor",
    ]  # fmt: skip
    assert math.isclose(sum(call.bound for call in mlp.calls), mlp.bound)
    assert sum(call.estimate for call in mlp.calls) > mlp.bound
    assert [call.module for call in mlp.calls] == ["up", "", "down", ""]


def test_a_fused_op_that_the_device_lacks_says_what_ran_for_it() -> None:
    (phase,) = ran(f"{MODELS}:Norm", inputs=("x=4x64",)).phases
    norm = next(call for call in phase.calls if call.target.startswith("aten.rms_norm"))
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        torch.nn.functional.rms_norm(torch.ones(4, 64), (64,), torch.ones(64))
    by_the_profiler = {event.name for event in seen.events() or ()}
    assert len(norm.ran) > 1
    assert {name.split(".")[1] for name in norm.ran} <= {name.removeprefix("aten::") for name in by_the_profiler}
    assert any(reason.startswith(f"ran as {len(norm.ran)} ops: ") for reason in norm.because)


def test_a_transformers_model_and_its_cache(tmp_path: Path) -> None:
    found = ran(config(tmp_path, model_type="llama", architectures=["LlamaForCausalLM"], **SMALL))
    for phase in found.phases:
        assert_sound(phase)
        assert sum(call.target.startswith("aten.scaled_dot_product_attention") for call in phase.calls) == 2
    strays = {stray.target for phase in found.phases for stray in phase.strays}
    assert strays <= {"aten.lift_fresh.default", "aten.detach_.default", "aten.to"}


def test_a_mixture_of_experts_whose_ops_are_others_on_a_cpu(tmp_path: Path) -> None:
    small = {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}
    folder = config(tmp_path, model_type="mixtral", architectures=["MixtralForCausalLM"], **small)
    (phase,) = ran(folder, phase="prefill").phases
    seen = [call for call in phase.calls if call.seen]
    assert len(seen) > 0.95 * len(phase.calls)
    assert {"blocks", "model.layers.1.mlp.experts"} & {call.module for call in seen}


def test_an_exported_program_runs_as_it_is(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.GELU(), torch.nn.Linear(64, 8))
    torch.export.save(torch.export.export(model, (torch.randn(4, 32),)), tmp_path / "model.pt2")
    (phase,) = ran(str(tmp_path / "model.pt2"), dataclasses.replace(ORDER, compile=True)).phases
    assert_sound(phase)
    assert [call.target.split(".")[1] for call in phase.calls] == ["linear", "gelu", "linear"]
    assert phase.compiled is None
    assert "exported program" in phase.compiled_failure


def test_a_model_on_memory_computes_what_its_graph_computes() -> None:
    with keeping() as kept:
        model = load(EXAMPLE, init=TWO_LAYERS)
        decode = plan(model, SHORT, "decode").programs[0]
        exported = clock.export(decode.module, decode.args)
    memory = RealMemory(torch.device("cpu"), kept)
    before = {name: id(p) for name, p in model.module.named_parameters()}
    with torch.inference_mode(), memory.inside(model.module):
        assert all(p.device.type == "cpu" for p in model.module.parameters())
        args = memory.inputs(decode.args, vocabulary_of(model.module))
        logits, cache = clock._prepared(decode.module, args, memory)()
        steps = clock._Steps(exported, args, memory).run()
    assert logits.shape == (1, 1, 200)
    assert logits.isfinite().all()
    assert 1e-3 < logits.float().std() < 1e3
    torch.testing.assert_close(steps[0], logits)
    torch.testing.assert_close(steps[1], cache[0][0])
    assert {name: id(p) for name, p in model.module.named_parameters()} == before
    assert all(p.is_meta for p in model.module.parameters())


def test_small_buffers_have_the_values_that_they_were_built_with() -> None:
    with keeping() as kept:
        model = load(f"{MODELS}:Mlp")
    memory = RealMemory(torch.device("cpu"), kept)
    with memory.inside(model.module):
        assert model.module.scale.tolist() == [3.0]
        assert model.module.up.bias.abs().max() == 0
        assert model.module.up.weight.std().item() == pytest.approx(1 / math.sqrt(64), rel=0.05)
    assert model.module.scale.is_meta


def test_tied_weights_are_one_piece_of_memory() -> None:
    module = torch.nn.Module()
    module.first = torch.nn.Embedding(10, 4, device="meta")
    module.second = torch.nn.Linear(4, 10, bias=False, device="meta")
    module.second.weight = module.first.weight
    memory = RealMemory(torch.device("cpu"), {})
    with memory.inside(module):
        assert module.first.weight is module.second.weight
    assert memory.held_bytes == 10 * 4 * 4


def test_tokens_are_in_the_vocabulary_and_known_values_stay() -> None:
    with keeping():
        model = load(EXAMPLE, init=TWO_LAYERS.replace("200", "50"))
        decode = plan(model, SHORT, "decode").programs[0]
    tokens, *cache = RealMemory(torch.device("cpu"), {}).inputs(decode.args, 50)
    assert 0 <= tokens.min() <= tokens.max() < 50
    assert all(part.shape == (1, 2, SHORT.context_len, 16) and part.isfinite().all() for part in cache)


def test_json_round_trip(example: Measured, tmp_path: Path) -> None:
    file = tmp_path / "measured.json"
    file.write_text(to_json(example), encoding="utf-8")
    assert read(file) == example
    machine = json.loads(to_json(example))["machine"]
    assert machine["torch_version"] == torch.__version__
    assert (machine["device"], machine["driver"], machine["threads"]) == ("cpu", "", 1)
    file.write_text('{"measured_version": 1}', encoding="utf-8")
    with pytest.raises(ReportFileError, match="no measurement"):
        read(file)


def test_memory_is_counted_as_the_analysis_counts_it(example: Measured) -> None:
    prefill = example.phases[0]
    weights = example.model.parameter_bytes
    assert weights < prefill.needed_bytes < 3 * weights
    assert prefill.peak_bytes is None


@pytest.mark.parametrize(
    ("device", "said"),
    [("cuda", "cuda: .*torch"), ("tpu9", "no device"), ("mps", "CUDA devices and on the CPU")],
)
def test_a_device_that_is_not_there(device: str, said: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(MeasureError, match=said) as failure:
        ran(f"{MODELS}:Mlp", dataclasses.replace(ORDER, device=device))
    assert failure.value.hint


def test_too_little_memory_is_said_before_any_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "free_bytes", lambda _: 1000)
    monkeypatch.setattr(Bench, "_clocked", lambda *_: pytest.fail("it ran"))
    with pytest.raises(MeasureError, match=r"needs about .* GB of memory on cpu, of which 1e-06 GB are free"):
        ran(f"{MODELS}:Mlp")


def test_shares_of_a_model_are_refused() -> None:
    with pytest.raises(MeasureError, match="on one"):
        measure(Request(target=EXAMPLE, scenario=Scenario(tp=2)), ORDER, in_process=True)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    small = {**SMALL, "hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    quantised = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
    folder = config(
        tmp_path, model_type="llama", architectures=["LlamaForCausalLM"], quantization_config=quantised, **small
    )
    with pytest.raises(MeasureError, match="quantised"):
        ran(folder, phase="decode")


def test_a_model_for_another_device_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("it runs here")
    with pytest.raises(MeasureError, match="does not run on cpu"):
        ran(f"{MODELS}:OnCuda")


def test_a_gpu_that_does_not_let_us_in_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("it does")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("auto", "cuda"):
        with pytest.raises(MeasureError, match="CUDA does not start: "):
            clock.device_of(name)


def test_each_run_counts_from_where_the_first_began() -> None:
    (phase,) = ran(f"{MODELS}:Counting", dataclasses.replace(ORDER, runs=5)).phases
    assert phase.eager.runs == 5
    assert phase.kernels_failure == ""
    assert "aten.add_.Tensor" in {call.target for call in phase.calls}


def test_a_phase_that_failed_leaves_no_tensors_to_the_next() -> None:
    frames, _ = clock.from_order(Request(target=f"{MODELS}:Failing", scenario=SHORT), ORDER)
    for frame in frames:
        if isinstance(frame, PhaseFailed):
            assert "made 12345 numbers" in frame.failure.message
            break
    else:
        pytest.fail("it ran")
    assert not [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.shape == (12345,)]


def test_operators_that_change_from_run_to_run_leave_the_whole_measured() -> None:
    (phase,) = ran(f"{MODELS}:Moody").phases
    assert phase.eager.runs == 3
    assert phase.kernels_failure == "the operators that it runs differ from run to run"
    assert phase.calls == ()


def test_code_that_ends_the_program_ends_only_its_box() -> None:
    with pytest.raises(FxroofError, match=r"ended the program \(exit 0\)"):
        ran(f"{MODELS}:Leaving", in_process=False)


def test_marks_are_found_again_in_what_a_profiler_saw() -> None:
    marker = clock._Marker()
    x = torch.randn(8, 8)
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu]) as profiled, torch.inference_mode(), marker:
        torch.nn.functional.linear(x, x).relu().softmax(-1)
    events = list(profiled.events() or ())
    assert [target for target, _ in marker.signatures] == [
        "aten.linear.default", "aten.relu.default", "aten.softmax.int",
    ]  # fmt: skip
    assert [event.name for event in events if event.name.startswith("fxroof:")] == ["fxroof:0", "fxroof:1", "fxroof:2"]
    inner = next(event for event in events if event.name == "aten::addmm" or event.name == "aten::mm")
    inner.append_kernel("gemm", 0, 7)  # as torch does with what the device reports
    inner.append_kernel("split", 0, 5)
    inner.append_kernel(inner.name, 0, 99)  # as it does without CUPTI, or of a range of the model's own
    mark = next(event for event in events if event.name == "fxroof:0")
    mark.append_kernel("fxroof:0", 0, 99)  # the device's own copy of the mark
    seconds, kernels = clock._by_mark(events, 3)
    assert seconds == pytest.approx([12e-6, 0, 0])
    assert kernels == [2, 0, 0]
