"""Which phases a model has, and that each is the one that runs."""

import pytest
import torch
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.calls import Call, some_tokens
from fxroof.analyzer.errors import TraceError, WorkloadError
from fxroof.analyzer.graph import Graph, Role
from fxroof.analyzer.load import from_module, load
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.trace import trace
from fxroof.analyzer.workload import plan
from fxroof.hardware.catalog import load as load_gpu
from support import LAYERS, SHORT, TARGETS, cut, trace_program, traced
from torch import nn

H100 = load_gpu("h100_sxm").gpu
PAIR = ["prefill", "decode"]


@pytest.mark.parametrize(
    ("name", "phases"),
    [
        ("llama-3-8b", PAIR),
        ("mingpt", PAIR),
        ("mamba2-2.7b", PAIR),
        ("jamba-1.5-mini", PAIR),
        ("bert-base", ["forward"]),
        ("vit-base-patch16-224", ["forward"]),
        ("clip-vit-l14", ["forward"]),
        ("flan-t5-xl", ["encoder", *PAIR]),
        ("whisper-large-v3", ["encoder", *PAIR]),
        ("llava-1.5-7b", ["encoder", *PAIR]),  # the prompt of the tests is too short for an image
        ("qwen2-vl-7b", PAIR),
    ],
)
def test_phases(name: str, phases: list[str]) -> None:
    assert list(traced(name).graphs) == phases


def cache_shapes(graph: Graph) -> list[tuple[int, ...]]:
    return [graph.tensors[i].shape for i in graph.inputs if graph.role(i) is Role.KV_CACHE]


def test_an_encoder_pushes_every_token_through_once_and_decodes_nothing() -> None:
    model = traced("bert-base")
    (program,) = model.workload.programs
    assert (program.phase.tokens, program.phase.new_tokens) == (2 * 96, 0)
    assert model.workload.cache_kind == "none"
    with pytest.raises(WorkloadError, match="no decode phase"):
        plan(model.model, SHORT, "decode")
    long = plan(model.model, Scenario()).programs[0]
    assert long.phase.tokens == 512


def test_an_encoder_by_hand_is_known_by_what_it_returns() -> None:
    class Encoder(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 16)
            self.head = nn.Linear(16, outputs)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(tokens))

    def names(outputs: int) -> list[str]:
        return [p.phase.name for p in plan(from_module(Encoder(outputs)), SHORT).programs]

    assert names(2) == ["forward"]
    assert names(100) == PAIR


def test_the_decoder_of_whisper_attends_to_30_seconds_and_to_itself() -> None:
    model = traced("whisper-large-v3")
    assert model.workload.scenario.source_len == 1500
    encoder, prefill, decode = (model.program(p) for p in ("encoder", *PAIR))
    assert encoder.args[0].shape == (2, 128, 3000)
    assert encoder.phase.tokens == 2 * 1500
    assert [a.shape for a in prefill.args] == [(2, 1), (2, 1500, 1280)]
    shapes = cache_shapes(model.graphs["decode"])
    assert shapes.count((2, 20, 1500, 64)) == 2 * LAYERS
    assert shapes.count((2, 20, model.workload.scenario.context_len, 64)) == 2 * LAYERS
    assert len(shapes) == 4 * LAYERS
    assert decode.phase.new_tokens == 2


@pytest.mark.parametrize("name", ["flan-t5-xl", "whisper-large-v3"])
def test_keys_of_the_encoders_output_are_made_once(name: str) -> None:
    # the decoder step must not project the encoder's states again: 2 d^2 multiply-adds a position a layer
    model = traced(name)
    prefill, decode = (analyze_phase(model.graphs[p], H100)[0].flops.matmul for p in PAIR)
    states = model.program("prefill").args[1]
    inner = model.graphs["decode"].tensors[model.graphs["decode"].inputs[2]].shape
    projected = 2 * 2 * states.shape[0] * states.shape[1] * states.shape[2] * inner[1] * inner[3] * LAYERS
    assert prefill > projected
    assert decode < prefill - projected * 0.9


@pytest.mark.parametrize(("name", "tokens"), [("llava-1.5-7b", 576), ("gemma-3-27b", 256), ("llama-4-scout", 144)])
def test_prompts_hold_an_image_where_they_are_long_enough(name: str, tokens: int) -> None:
    model = load(cut(TARGETS[name], 2))
    scenario = Scenario(batch_size=2, input_len=tokens + 32, output_len=32)
    workload = plan(model, scenario)
    assert [p.phase.name for p in workload.programs] == PAIR
    graphs = {p.phase.name: trace_program(p) for p in workload.programs}
    assert any(op.target.startswith("aten.masked_scatter") for op in graphs["prefill"].ops)
    text = Call(model.module, fixed={"use_cache": True, "logits_to_keep": 1})
    image = plan(model, Scenario(batch_size=2, input_len=tokens, output_len=32), "encoder").programs[0]
    seeing, reading, vision = (
        analyze_phase(graph, H100)[0]
        for graph in (
            graphs["prefill"],
            trace(text, (some_tokens(2, scenario.input_len),)),
            trace_program(image),
        )
    )
    projection = 2 * (2 * tokens) * 4096 * 5120 if name == "llama-4-scout" else 0  # in its forward, not its encoder
    assert seeing.flops.matmul == reading.flops.matmul + vision.flops.matmul + projection
    assert not [op for op in seeing.ops if op.status == "unpriced"]


def test_what_is_left_out_of_a_model_that_sees_is_said() -> None:
    assert any("image encoder" in note for note in traced("qwen2-vl-7b").workload.notes)
    assert any("phase encoder" in note for note in traced("llava-1.5-7b").workload.notes)


@pytest.mark.parametrize("name", ["mamba2-2.7b", "jamba-1.5-mini", "qwen3-next-80b-a3b"])
def test_recurrent_state_does_not_grow_with_the_context(name: str) -> None:
    def state(context: int) -> int:
        graph = traced(name, Scenario(batch_size=2, input_len=context, output_len=8)).graphs["decode"]
        tensors = [graph.tensors[i] for i in graph.inputs if graph.role(i) is Role.KV_CACHE]
        return sum(t.numel for t in tensors if context + 4 not in t.shape)

    assert state(24) == state(40) > 0


class Loops(nn.Module):
    """A recurrence over tokens, with or without the state that it could hand on."""

    def __init__(self, cached: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.cell = nn.Linear(8, 8)
        self.head = nn.Linear(8, 32)
        self.forward = self.step if cached else self.whole  # type: ignore[method-assign]  # what the test is about

    def step(self, tokens: torch.Tensor, state: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(tokens)
        state = torch.zeros_like(x[:, 0]) if state is None else state
        for i in range(x.shape[1]):
            state = torch.tanh(self.cell(x[:, i] + state))
        return self.head(state), state

    def whole(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.step(tokens)[0]


@pytest.mark.parametrize("cached", [True, False])
def test_a_loop_over_tokens_shortens_the_prompt_and_says_so(monkeypatch: pytest.MonkeyPatch, cached: bool) -> None:
    monkeypatch.setattr("fxroof.analyzer.loops._TOO_MANY", 2000)
    monkeypatch.setattr("fxroof.analyzer.loops._ENOUGH", 1000)
    workload = plan(from_module(Loops(cached)), Scenario(output_len=32))
    assert [p.phase.name for p in workload.programs] == PAIR
    assert 16 < workload.scenario.input_len < 200
    assert any(f"shortened to {workload.scenario.input_len} tokens" in note for note in workload.notes)
    assert all(len(trace_program(p).ops) <= 1000 for p in workload.programs)


def test_lengths_that_were_asked_for_are_refused_rather_than_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxroof.analyzer.loops.NODE_LIMIT", 2000)
    monkeypatch.setattr("fxroof.analyzer.loops._TOO_MANY", 2000)
    with pytest.raises(WorkloadError) as caught:
        plan(from_module(Loops(True)), Scenario(lengths_given=True))
    assert "loops over tokens" in caught.value.message
    assert "--input-len" in caught.value.hint


def test_a_loop_over_tokens_is_stopped_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxroof.analyzer.trace.NODE_LIMIT", 1000)
    model = load(TARGETS["mamba_minimal"])
    with pytest.raises(TraceError) as caught:
        trace_program(plan(model, SHORT).programs[0])
    assert "--input-len" in caught.value.hint
    short = plan(model, Scenario(batch_size=2, input_len=8, output_len=8)).programs[0]
    assert len(trace_program(short).ops) < 1000


def test_exported_programs_are_one_forward_in_their_own_shapes(tmp_path: object) -> None:
    module = nn.Sequential(nn.Linear(16, 32), nn.Unflatten(1, (4, 8)), nn.Flatten())
    path = f"{tmp_path}/net.pt2"
    batch = torch.export.Dim("batch", min=2)
    torch.export.save(torch.export.export(module, (torch.randn(4, 16),), dynamic_shapes=({0: batch},)), path)
    workload = plan(load(path), SHORT)
    graph = trace_program(workload.programs[0])
    direct = trace(module.to("meta"), (torch.empty(4, 16, device="meta"),))
    assert [p.phase.name for p in workload.programs] == ["forward"]
    assert [op.target for op in graph.ops] == [op.target for op in direct.ops]
    assert analyze_phase(graph, H100)[0].bytes == analyze_phase(direct, H100)[0].bytes
    assert all(graph.is_view(op) for op in graph.ops[1:])  # aliasing, which saving loses
    with pytest.raises(WorkloadError, match="own inputs"):
        plan(load(path), SHORT, inputs=("x=4x16",))
