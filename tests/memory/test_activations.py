"""Peak activations by liveness against PyTorch's own lifetimes, within 1%."""

import pytest
import torch
from fxroof.analyzer import lifetimes
from fxroof.analyzer.caches import cache_growth
from fxroof.analyzer.cost import Cost
from fxroof.analyzer.graph import Graph, Op, Role, Storage, Tensor, TensorRef
from fxroof.analyzer.memory import moments
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.trace import trace
from memory.tracked import tracked
from support import traced
from torch import nn

SCENARIO = Scenario(batch_size=2, input_len=1024, output_len=64)

MODELS = (
    "mymodel", "nanogpt", "mingpt", "gptfast", "llama_reference", "moe", "gpt2", "llama-3-8b", "mistral-7b",
    "gemma-2-9b", "gemma-3-27b", "phi-3-mini", "qwen3-8b", "mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b",
    "mamba2-2.7b", "flan-t5-xl", "bert-base", "vit", "vit_mha", "vit_encoder", "dit", "resnet18", "resnet50",
)  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_peak_is_what_pytorch_keeps_alive(name: str) -> None:
    found = traced(name, SCENARIO)
    growth = cache_growth(found.model, found.workload)
    in_place = growth is None or growth.in_place
    for phase, graph in found.graphs.items():
        ours = max(moment.nbytes for moment in moments(graph, [Cost()] * len(graph.ops), in_place=in_place))
        theirs = tracked(found, phase).peak
        assert ours == pytest.approx(theirs, rel=0.01), (phase, ours / theirs - 1)


def peak_of(module: nn.Module, *shapes: tuple[int, ...]) -> int:
    graph = trace(module, tuple(torch.empty(s, device="meta") for s in shapes))
    return max(moment.nbytes for moment in moments(graph, [Cost()] * len(graph.ops)))


def test_a_chain_needs_two_links() -> None:
    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for _ in range(10):
                x = x.exp()
            return x

    assert peak_of(Chain(), (1024,)) == 3 * 4096  # the caller's, the old and the new


def test_views_keep_their_storage_and_writes_in_place_need_none() -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x.exp()
            row = y.view(32, 32)[0]
            z = x.exp()
            return z.add_(1).sum() + row.sum()

    assert peak_of(Views(), (1024,)) == 3 * 4096 + 3 * 512


def test_small_tensors_take_a_block() -> None:
    class Small(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

    assert peak_of(Small(), (3,)) == 2 * 512


def test_scratch_counts_while_its_op_runs() -> None:
    graph = Graph(
        phase="forward",
        storages=tuple(Storage(nbytes=1024, role=role, name="") for role in (Role.INPUT, Role.OUTPUT)),
        tensors=tuple(Tensor(storage=s, dtype="float32", shape=(256,), stride=(1,)) for s in (0, 1)),
        ops=(Op(name="op", target="x.y.default", args={"x": TensorRef(tensor=0)}, outputs=(1,)),),
        inputs=(0,),
        outputs=(1,),
    )
    (moment,) = moments(graph, [Cost(scratch_written=5000)])
    assert moment.nbytes == 1024 + 1024 + 5120


@pytest.mark.parametrize(
    ("ends_with", "alive"),
    [(None, [2, 3, 3]), ("op1", [2, 3, 3]), ("op2", [2, 3, 4]), ("", [2, 3, 4]), ("gone", [2, 3, 3])],
)
def test_a_storage_lives_until_the_program_lets_go_of_it(ends_with: str | None, alive: list[int]) -> None:
    roles = (Role.INPUT, Role.ACTIVATION, Role.ACTIVATION, Role.OUTPUT)
    ends = (None, ends_with, None, None)
    graph = Graph(
        phase="forward",
        storages=tuple(Storage(nbytes=512, role=r, name="", ends_with=e) for r, e in zip(roles, ends, strict=True)),
        tensors=tuple(Tensor(storage=s, dtype="float32", shape=(128,), stride=(1,)) for s in range(4)),
        ops=tuple(
            Op(name=f"op{i}", target="x.y.default", args={"x": TensorRef(tensor=i)}, outputs=(i + 1,)) for i in range(3)
        ),
        inputs=(0,),
        outputs=(3,),
    )
    assert [moment.nbytes // 512 for moment in moments(graph, [Cost()] * 3)] == alive


def test_a_softmax_to_a_wider_type_copies_its_input() -> None:
    class Softmax(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.softmax(-1, dtype=torch.float32)

    graph = trace(Softmax(), (torch.empty((4, 1024), dtype=torch.bfloat16, device="meta"),))
    assert max(m.nbytes for m in moments(graph, [Cost()] * len(graph.ops))) == 8192 + 2 * 16384


class Holds(nn.Module):
    """Makes a tensor, and holds it in some way, or not, while it makes another."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.kept: object = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = x.exp()
        total = made.sum()
        match self.how:
            case "variable":
                pass
            case "deleted":
                del made
            case "rebound":
                made = total
            case "view":
                made = made.view(32, 32)[0]
            case "attribute":
                self.kept = made
                made = total
            case "caller's variable":
                return self.added(made, total, x)
            case "argument":
                made = total
                return self.added(x.exp(), total, x)
        return total + x.sin().sum()

    def added(self, given: torch.Tensor, total: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        given = total
        return given + x.sin().sum()


@pytest.mark.parametrize(
    ("how", "tensors"),
    [
        ("variable", 3),
        ("deleted", 2),
        ("rebound", 2),
        ("view", 3),
        ("attribute", 3),
        ("caller's variable", 3),
        ("argument", 2),
    ],
)
def test_what_python_holds_is_alive(how: str, tensors: int) -> None:
    assert peak_of(Holds(how), (1024,)) // 4096 == tensors


def test_data_alone_decides_where_nothing_was_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetimes, "_TRACK", "what another torch does not have")
    assert peak_of(Holds("variable"), (1024,)) // 4096 == 2


def test_a_call_of_a_module_holds_its_arguments() -> None:
    class Inner(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.exp()
            return x.sin()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.cos())

    assert peak_of(Outer(), (1024,)) == 4 * 4096  # the caller's, the argument, the old and the new


def test_a_result_that_nobody_uses_lives_while_its_name_does() -> None:
    class Unused(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y, _ = x.split(512), x.exp()
            return y[0].sin().cos()

    assert peak_of(Unused(), (1024,)) == 4096 + 4096 + 2 * 2048
