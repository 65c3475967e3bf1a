"""Kernels are named by what they do."""

from collections import Counter

import pytest
from fxroof.analyzer.fusion import compiled_kernels
from fxroof.analyzer.pricing import price
from fxroof.hardware import catalog
from support import LAYERS, traced

H100 = catalog.load("h100_sxm").gpu


def names(model: str, phase: str) -> Counter[str]:
    graph = traced(model).graphs[phase]
    return Counter(k.name for k in compiled_kernels(graph, price(graph, H100)))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_llama(phase: str) -> None:
    assert names("llama-3-8b", phase) == {
        "matmul": 7 * LAYERS + 1,
        "attention (cudnn)": LAYERS,
        "swiglu": LAYERS,
        "rope": LAYERS,
        "rope + cache update": LAYERS,
        "cache update": LAYERS,
        "embedding + rms_norm": 1,
        # the residual is added up again from its terms until they are too many to read
        "embedding + residual + rms_norm": 3,
        "residual + rms_norm": 2 * LAYERS - 3,
    }


@pytest.mark.parametrize(
    ("model", "phase", "expected"),
    [
        ("gpt2", "prefill", {"residual + layer_norm", "gelu", "cache update", "attention (cudnn)"}),
        ("qwen3-8b", "prefill", {"rms_norm + rope"}),
        ("mixtral-8x7b", "decode", {"topk", "swiglu"}),
        ("resnet18", "forward", {"convolution", "batch_norm", "max_pool2d"}),
    ],
)
def test_others(model: str, phase: str, expected: set[str]) -> None:
    assert expected <= names(model, phase).keys()
