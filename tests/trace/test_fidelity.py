"""The traced program is the program that runs.

Oracle: the same model run eagerly on meta, without any of fxroof's tracing, its attention calls watched.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fxroof.analyzer.graph import Graph, TensorRef
from support import LAYERS, TARGETS, TOKEN_MODELS, traced

ATTENTION = torch.nn.functional.scaled_dot_product_attention
EAGER_ON_META = [n for n in TARGETS if n not in ("llama_reference",)]


@contextlib.contextmanager
def watched() -> Iterator[list[dict[str, Any]]]:
    calls: list[dict[str, Any]] = []

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        calls.append(
            {
                **{n: _layout(given[n]) for n in ("query", "key", "value")},
                "mask": None if given.get("attn_mask") is None else tuple(given["attn_mask"].shape),
                "is_causal": bool(given.get("is_causal", False)),
                "enable_gqa": bool(given.get("enable_gqa", False)),
            }
        )
        return ATTENTION(*args, **kwargs)

    # not a TorchFunctionMode: that one does not see what nn.MultiheadAttention calls inside
    torch.nn.functional.scaled_dot_product_attention = attention  # type: ignore[assignment]  # put back below
    try:
        yield calls
    finally:
        torch.nn.functional.scaled_dot_product_attention = ATTENTION


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), str(tensor.dtype).removeprefix("torch.")


def _attention_in(graph: Graph) -> list[dict[str, Any]]:
    calls = []
    for op in graph.ops:
        if op.target == "aten.scaled_dot_product_attention.default":
            tensors = {}
            for name in ("query", "key", "value"):
                ref = op.args[name]
                assert isinstance(ref, TensorRef)
                t = graph.tensors[ref.tensor]
                tensors[name] = (t.shape, t.stride, t.dtype)
            mask = op.args["attn_mask"]
            calls.append(
                {
                    **tensors,
                    "mask": graph.tensors[mask.tensor].shape if isinstance(mask, TensorRef) else None,
                    "is_causal": op.args["is_causal"],
                    "enable_gqa": op.args["enable_gqa"],
                }
            )
    return calls


@pytest.mark.parametrize("name", EAGER_ON_META)
def test_attention_in_the_graph_is_the_attention_that_runs(name: str) -> None:
    model = traced(name)
    for phase, graph in model.graphs.items():
        program = model.program(phase)
        with torch.no_grad(), watched() as calls:
            program.module(*program.args)
        assert _attention_in(graph) == calls


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_transformers_run_without_mask_and_without_repeated_heads(phase: str) -> None:
    calls = _attention_in(traced("llama-3-8b").graphs[phase])
    assert len(calls) == LAYERS
    for call in calls:
        assert call["mask"] is None
        assert call["enable_gqa"]
        assert call["key"][0][1] == 8
        assert call["is_causal"] is (phase == "prefill")


def test_decode_reads_a_cache_of_the_mean_context() -> None:
    graph = traced("llama-3-8b").graphs["decode"]
    cache = [graph.tensors[i] for i in graph.inputs if graph.role(i).value == "kv_cache"]
    assert len(cache) == 2 * LAYERS
    assert {t.shape for t in cache} == {(2, 8, 96 + 32 // 2, 128)}


def test_attention_output_has_the_layout_of_the_fused_kernel() -> None:
    graph = traced("llama-3-8b").graphs["prefill"]
    for op in graph.ops:
        if op.target == "aten.contiguous.default":
            assert graph.is_view(op), "a copy that the GPU does not make"


@pytest.mark.parametrize("name", ["gptfast", "llama_reference"])
def test_models_that_own_their_cache_have_it_as_kv_cache(name: str) -> None:
    for graph in traced(name).graphs.values():
        caches = [s for s in graph.storages if s.role.value == "kv_cache"]
        assert len(caches) == 2 * 4  # K and V of four layers
        assert not [s for s in caches if "cache" not in s.name]


def test_tied_weights_are_one_storage() -> None:
    for name in ("nanogpt", "gpt2"):
        graph = traced(name).graphs["prefill"]
        vocabulary = [s for s in graph.storages if s.role.value == "weight" and s.nbytes >= 50257 * 768 * 2]
        assert len(vocabulary) == 1


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_every_op_has_a_line_and_the_users_own_comes_first(name: str) -> None:
    library = "-" in name or name == "gpt2"
    for graph in traced(name).graphs.values():
        for op in graph.ops:
            assert op.anchor is not None, op
            assert op.anchor.library is library, op
            assert op.anchor.file.startswith("transformers/" if library else ("examples/", "tests/")), op


def test_lines_are_those_of_the_helper_that_did_the_work() -> None:
    graph = traced("mymodel").graphs["prefill"]
    source = Path(TARGETS["mymodel"]).read_text().splitlines()
    negations = [op for op in graph.ops if op.target == "aten.neg.default"]
    assert negations
    for op in negations:
        assert op.anchor is not None
        assert "-" in source[op.anchor.line - 1]
        assert op.anchor.function == "rotate_half"
