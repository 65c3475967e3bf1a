"""Inputs that the user gives, as `--input` and as the hook `example_inputs`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fxroof.analyzer.errors import WorkloadError
from fxroof.analyzer.graph import Role
from fxroof.analyzer.load import Model, from_module, load
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.workload import plan
from support import MODELS, SHORT, trace_program
from torch import nn


class Step(nn.Module):
    """A decoder whose cache is a list of pairs and whose position is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.head = nn.Linear(8, 32)

    def forward(
        self, idx: torch.Tensor, pasts: list[tuple[torch.Tensor, torch.Tensor]] | None = None, start: int = 0
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        x = self.embed(idx) + start
        grown = []
        for k, v in pasts or [(x[:, :0], x[:, :0])]:
            k, v = torch.cat([k, x], 1), torch.cat([v, x], 1)
            x = torch.softmax(x @ k.mT, -1) @ v
            grown.append((k, v))
        return self.head(x), grown


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, *, mask: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.l(x) * mask * scale


class Positional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(4, 4)

    def forward(self, *parts: torch.Tensor) -> torch.Tensor:
        return self.l(parts[0]) + parts[1]


def hooked(module: nn.Module, hook: Callable[..., Any]) -> Model:
    model = from_module(module)
    return Model(name=model.name, source="", module=model.module, example_inputs=hook)


def refused(model: Model, inputs: tuple[str, ...] = (), phase: str = "all") -> str:
    with pytest.raises(WorkloadError) as caught:
        plan(model, SHORT, phase, inputs)
    return f"{caught.value.message}\n{caught.value.hint}"


def given(model: Model, *inputs: str) -> dict[str, tuple[tuple[int, ...], str]]:
    (program,) = plan(model, SHORT, inputs=inputs).programs
    graph = trace_program(program)
    tensors = [graph.tensors[i] for i in graph.inputs]
    return {str(n): (t.shape, t.dtype) for n, t in enumerate(tensors)}


def test_a_diffusion_transformer_says_what_it_wants_and_takes_it() -> None:
    model = load(f"{MODELS / 'dit_like.py'}:DiT_B_4")
    text = refused(model)
    assert "forward(x, t, y)" in text
    assert "--input" in text
    assert given(model, "x=2x4x32x32", "t=2:int64", "y=2") == {
        "0": ((2, 4, 32, 32), "float32"),
        "1": ((2,), "int64"),
        "2": ((2,), "int64"),
    }
    assert "no decode phase" in refused(model, ("x=2x4x32x32", "t=2", "y=2"), "decode")


def test_types_follow_the_model_and_the_name() -> None:
    model = from_module(Two().to(torch.bfloat16))
    assert given(model, "x=2x4", "mask=2x4", "scale=float:0.5") == {
        "0": ((2, 4), "bfloat16"),
        "1": ((2, 4), "int64"),
    }
    assert given(model, "x=2x4:fp32", "mask=scalar:bool") == {"0": ((2, 4), "float32"), "1": ((), "bool")}


def test_arguments_without_names_go_by_position() -> None:
    model = from_module(Positional())
    assert "forward(*parts" in refused(model)
    assert given(model, "3x4", "4") == {"0": ((3, 4), "float32"), "1": ((4,), "float32")}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (("x=2x4x",), "is no shape"),
        (("x=2,4",), "is no shape"),
        (("x=",), "is no shape"),
        (("",), "is empty"),
        (("x=0x4",), "size is 0"),
        (("x=-1x4",), "is no shape"),
        (("x=2x4:bf61",), "Did you mean"),
        (("x=2x4:text", "mask=4"), "unknown type"),
        (("x=999999999999x999999999999",), "too large"),
        (("x=2x4", "x=2x4"), "given twice"),
        (("x=2x4",), "missing a required argument: 'mask'"),
        (("x=2x4", "maks=4"), "Did you mean mask?"),
        (("x=2x4", "mask=4", "scale=float:wide"), "is no float"),
        (("x=int:3", "mask=bool:true"), "names no tensor"),
    ],
)
def test_inputs_that_cannot_be_are_refused(inputs: tuple[str, ...], expected: str) -> None:
    assert expected in refused(from_module(Two()), inputs)


def step_inputs(phase: str, batch: int, length: int, context: int) -> Any:
    if phase == "forward":
        raise AssertionError("a model with prefill and decode is not asked for a forward")
    if phase == "prefill":
        return (torch.zeros(batch, length, dtype=torch.int64),)
    pair = (torch.empty(batch, context, 8), torch.empty(batch, context, 8))
    return {"idx": torch.zeros(batch, 1, dtype=torch.int64), "pasts": [pair, pair], "start": context}


def test_the_hook_gives_both_phases_and_nested_tensors_are_the_cache() -> None:
    programs = plan(hooked(Step(), step_inputs), SHORT).programs
    assert [p.phase.name for p in programs] == ["prefill", "decode"]
    assert [p.phase.tokens for p in programs] == [2 * 96, 2]
    graph = trace_program(programs[1])
    cache = [graph.tensors[i].shape for i in graph.inputs if graph.role(i) is Role.KV_CACHE]
    assert cache == [(2, 112, 8), (2, 112, 8)]  # one pair, given twice
    kept = [s for s in graph.storages if s.role is Role.KV_CACHE and s.nbytes == 2 * 113 * 8 * 4]
    assert len(kept) == 4


def test_the_hook_may_leave_phases_out() -> None:
    def only_decode(phase: str, *lengths: int) -> Any:
        return step_inputs(phase, *lengths) if phase == "decode" else None

    model = hooked(Step(), only_decode)
    assert [p.phase.name for p in plan(model, SHORT).programs] == ["decode"]
    assert "None for every phase" in refused(model, phase="prefill")


@pytest.mark.parametrize(
    "returned",
    [
        torch.zeros(2, 4),
        (torch.zeros(2, 4),),
        [torch.zeros(2, 4)],
        {"input": torch.zeros(2, 4)},
        ((), {"input": torch.zeros(2, 4)}),
    ],
)
def test_the_hook_may_return_a_tensor_a_tuple_a_dict_or_both(returned: Any) -> None:
    model = hooked(nn.Linear(4, 4), lambda phase, *_: returned if phase == "forward" else None)
    (program,) = plan(model, SHORT).programs
    assert program.phase.name == "forward"
    graph = trace_program(program)
    assert [graph.tensors[i].shape for i in graph.inputs] == [(2, 4)]
    assert graph.role(graph.inputs[0]) is Role.INPUT


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (3, "returned a int"),
        ("x", "returned a str"),
        ((), "returned an empty tuple"),
        ({}, "returned an empty dict"),
        ({1: torch.zeros(2)}, "returned a dict"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), "too many positional arguments"),
        ({"x": torch.zeros(2, 4)}, "missing a required argument: 'input'"),
    ],
)
def test_the_hook_that_returns_something_else_is_told_what_forward_wants(returned: Any, expected: str) -> None:
    text = refused(hooked(nn.Linear(4, 4), lambda *_: returned))
    assert expected in text
    assert "(input: torch.Tensor)" in text


def test_the_hook_that_fails_is_named_with_its_line() -> None:
    def fails(*_: object) -> None:
        raise KeyError("prefil")

    text = refused(hooked(nn.Linear(4, 4), fails))
    assert "example_inputs('prefill', 2, 96, 112) failed" in text
    assert "test_inputs.py:" in text


def test_models_without_known_inputs_show_their_forward() -> None:
    text = refused(from_module(nn.Bilinear(3, 4, 5)))
    assert "forward(input1: torch.Tensor, input2: torch.Tensor)" in text


def test_lengths_of_the_hook_are_those_of_the_scenario() -> None:
    asked: list[tuple[Any, ...]] = []
    model = hooked(nn.Linear(4, 4), lambda *args: asked.append(args))
    with pytest.raises(WorkloadError):
        plan(model, Scenario(batch_size=3, input_len=10, output_len=8))
    assert asked == [("prefill", 3, 10, 14), ("decode", 3, 10, 14), ("forward", 3, 10, 14)]
