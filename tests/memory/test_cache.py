"""The cache's formula against cache tensors that the model itself makes, at other batches and contexts."""

import pytest
import torch
from fxroof.analyzer.caches import cache_growth
from fxroof.analyzer.calls import cache_tensors, returned_cache
from fxroof.analyzer.load import Model, load
from fxroof.analyzer.memory import CacheGrowth
from fxroof.analyzer.meta import tracing
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.workload import plan
from support import CONFIGS, SHORT, traced

POINTS = ((1, 17), (4, 100), (2, 700), (1, 3000), (2, 5000))
PASSED = ("mymodel", "moe", "gpt2", "llama-3-8b", "mistral-7b", "gemma-2-9b", "phi-3-mini", "qwen3-30b-a3b")


def growth_of(name: str) -> tuple[Model, CacheGrowth]:
    found = traced(name)
    growth = cache_growth(found.model, found.workload)
    assert growth is not None
    return found.model, growth


def made_by(model: Model, batch_size: int, context_len: int) -> int:
    """Bytes of the cache after a prompt: what the model returns, run on meta."""
    argument = "cache" if "cache" in model.module.forward.__code__.co_varnames else "past_key_values"
    tokens = torch.empty((batch_size, context_len), dtype=torch.long, device="meta")
    with tracing():
        result = model.module(tokens)
    return sum(t.numel() * t.element_size() for t in cache_tensors(returned_cache(result, argument)))


@pytest.mark.parametrize("name", PASSED)
def test_formula_is_the_size_of_the_cache_that_the_model_makes(name: str) -> None:
    model, growth = growth_of(name)
    for batch_size, context_len in POINTS:
        assert growth.nbytes(batch_size, context_len) == made_by(model, batch_size, context_len)


def test_windows_show_as_windows() -> None:
    _, growth = growth_of("mistral-7b")
    assert {part.tokens_at_most for part in growth.parts if part.bytes_per_token} == {4095}
    _, growth = growth_of("gemma-2-9b")
    assert {part.tokens_at_most for part in growth.parts if part.bytes_per_token} == {4095, None}


@pytest.mark.parametrize(
    ("config", "bytes_per_token"),
    [
        ("llama-3-70b", 2 * 80 * 8 * 128 * 2),  # 80 layers, 8 heads of 128, keys and values, bfloat16
        ("deepseek-v3", 61 * (512 + 64) * 2),  # latent of 512 and rotary part of 64
        ("gpt-oss-20b", None),
    ],
)
def test_published_shapes(config: str, bytes_per_token: int | None) -> None:
    model = load(str(CONFIGS / config))
    growth = cache_growth(model, plan(model, SHORT, "decode"))
    assert growth is not None
    growing = growth.nbytes(1, 8001) - growth.nbytes(1, 8000)
    if bytes_per_token is None:  # 12 of 24 layers keep a window of 128
        bytes_per_token = 2 * 12 * 8 * 64 * 2
        assert growth.nbytes(1, 101) - growth.nbytes(1, 100) == 2 * bytes_per_token
    assert growing == bytes_per_token


def test_a_state_space_model_keeps_a_state_of_constant_size() -> None:
    model = load(str(CONFIGS / "jamba-1.5-mini"))
    growth = cache_growth(model, plan(model, Scenario(batch_size=1, input_len=48, output_len=8), "decode"))
    assert growth is not None
    # 28 of 32 layers: convolution 8192 x 4, state 8192 x 16 in float32; 4 layers: 8 heads of 128
    assert growth.nbytes(2, 1000) == 2 * (28 * 8192 * (4 * 2 + 16 * 4) + 4 * 2 * 8 * 128 * 1000 * 2)


def test_buffers_that_the_model_owns() -> None:
    found = traced("gptfast")
    growth = cache_growth(found.model, found.workload)
    assert growth is not None
    assert growth.nbytes(3, 4096) == 3 * 4096 * 4 * 2 * 8 * 128 * 2  # 4 layers, keys and values, 8 heads of 128


def test_none() -> None:
    for name in ("nanogpt", "resnet18"):
        found = traced(name)
        assert cache_growth(found.model, found.workload) == CacheGrowth()


def test_a_cache_of_fixed_size_has_no_known_growth() -> None:
    found = traced("llama_reference")
    assert cache_growth(found.model, found.workload) is None


def test_only_a_plain_container_is_held_by_the_caller() -> None:
    assert not growth_of("mymodel")[1].in_place
    assert growth_of("llama-3-8b")[1].in_place
