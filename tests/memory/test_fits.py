"""What fits: published cases, and properties of the limits. Graphs are of cut models, weights and caches whole."""

import dataclasses

import pytest
import torch
from fxroof.analyzer.caches import cache_growth
from fxroof.analyzer.load import load
from fxroof.analyzer.memory import CacheGrowth, CachePart, Memory, memory, overhead_bytes
from fxroof.analyzer.pipeline import analyze, reprice
from fxroof.analyzer.pricing import price
from fxroof.analyzer.report import from_json, to_json
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.workload import plan
from fxroof.hardware.catalog import load as load_gpu
from support import CONFIGS, NO_RULES, SHORT, TARGETS, traced
from torch import nn

pytestmark = pytest.mark.usefixtures("unboxed")

H100 = load_gpu("h100_sxm").gpu
KV = CacheGrowth(parts=(CachePart(count=64, fixed_bytes=0, bytes_per_token=2048.0),), measured_to=10000)


def needed(scenario: Scenario = SHORT, *, parameter_bytes: int, growth: CacheGrowth | None, gpu=H100) -> Memory:
    graphs = traced("llama-3-8b", scenario).graphs
    costs = {name: price(graph, gpu) for name, graph in graphs.items()}
    return memory(graphs, costs, gpu, scenario, parameter_bytes=parameter_bytes, growth=growth)


def whole(config: str) -> tuple[int, CacheGrowth]:
    model = load(str(CONFIGS / config))
    growth = cache_growth(model, plan(model, SHORT, "decode"))
    assert growth is not None
    return model.parameter_bytes, growth


def test_18_a_model_of_80_gb_on_a_card_of_80_gb() -> None:
    with torch.device("meta"):
        layers = [nn.Linear(32768, 32768, bias=False) for _ in range(round(80e9 / 2 / 32768**2))]
        model = nn.Sequential(nn.Embedding(1000, 32768), *layers, nn.Linear(32768, 1000)).half()
    found = analyze(model, (torch.zeros(1, 8, dtype=torch.long),), gpu="h100").runs[0].memory
    assert found is not None
    assert found.weights_bytes == pytest.approx(80e9, rel=0.01)
    card = dataclasses.replace(H100, memory_usable_bytes=80_000_000_000)
    alone = needed(parameter_bytes=79_900_000_000, growth=KV, gpu=card)
    assert alone.weights_bytes < card.memory_usable_bytes < alone.total_bytes
    assert not alone.fits
    assert (alone.max_batch_size, alone.min_gpus) == (0, 2)
    # the part that is sold as 80 GB has 84.9, which a few sequences of this 70B-like cache use up
    busy = needed(
        dataclasses.replace(SHORT, batch_size=16), parameter_bytes=80_000_000_000, growth=whole("llama-3-70b")[1]
    )
    assert busy.fits
    assert busy.max_batch_size is not None
    assert 16 <= busy.max_batch_size < 100


def test_70b_needs_two_of_80_gb_and_8b_one() -> None:
    parameters, growth = whole("llama-3-70b")
    large = needed(parameter_bytes=parameters, growth=growth)
    assert large.weights_bytes == pytest.approx(141.1e9, rel=0.001)
    assert not large.fits
    assert large.headroom_bytes == H100.memory_usable_bytes - large.total_bytes < 0
    assert (large.max_batch_size, large.max_context_len, large.min_gpus) == (0, 0, 2)
    parameters, growth = whole("llama-3-8b")
    small = needed(parameter_bytes=parameters, growth=growth)
    assert small.fits
    assert small.min_gpus == 1
    assert small.kv_cache_bytes == 2 * 128 * 32 * 2 * 8 * 128 * 2


@pytest.mark.parametrize(
    ("config", "gigabytes", "gpus"),
    [("deepseek-v3", 673, 8), ("gpt-oss-120b", 65, 1), ("gpt-oss-20b", 13.8, 1)],
)
def test_packed_weights_count_as_packed(config: str, gigabytes: float, gpus: int) -> None:
    parameters, growth = whole(config)
    found = needed(parameter_bytes=parameters, growth=growth)
    assert found.weights_bytes == pytest.approx(gigabytes * 1e9, rel=0.03)
    assert found.min_gpus == gpus


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    parameters, growth = whole("llama-3-8b")
    found = needed(Scenario(batch_size=1, input_len=96, output_len=32), parameter_bytes=parameters, growth=growth)
    assert found.max_batch_size is not None
    free = found.usable_bytes - found.weights_bytes - found.overhead_bytes
    each = found.kv_cache_bytes + found.activations_bytes
    assert found.max_batch_size * each <= free < (found.max_batch_size + 1) * each


def test_the_longest_context_fits_when_it_is_traced() -> None:
    """The limit is found on one graph; a graph of that length says whether it is one."""
    usable = dataclasses.replace(H100, memory_usable_bytes=20_000_000_000)
    short = Scenario(batch_size=1, input_len=1024, output_len=64)
    growth = cache_growth(traced("llama-3-8b", short).model, traced("llama-3-8b", short).workload)
    found = needed(short, parameter_bytes=10**10, growth=growth, gpu=usable)
    assert found.max_context_len is not None
    prompt = found.max_context_len * 1024 // 1088
    longer = Scenario(batch_size=1, input_len=prompt, output_len=found.max_context_len - prompt, lengths_given=True)
    again = needed(longer, parameter_bytes=10**10, growth=growth, gpu=usable)
    assert again.total_bytes == pytest.approx(usable.memory_usable_bytes, rel=0.01)


def test_scores_that_are_written_out_grow_with_the_square() -> None:
    short = Scenario(batch_size=1, input_len=960, output_len=64)
    found = traced("mymodel", short)
    growth = cache_growth(found.model, found.workload)
    limits = []
    for gigabytes in (20, 80):
        gpu = dataclasses.replace(H100, memory_usable_bytes=gigabytes * 10**9)
        costs = {name: price(graph, gpu) for name, graph in found.graphs.items()}
        limit = memory(found.graphs, costs, gpu, short, parameter_bytes=0, growth=growth).max_context_len
        assert limit is not None
        limits.append(limit)
    assert limits[1] / limits[0] == pytest.approx(2, rel=0.15), "four times the memory, twice the length"


def test_what_is_unknown_is_null() -> None:
    unknown = needed(parameter_bytes=10**9, growth=KV, gpu=dataclasses.replace(H100, memory_usable_bytes=None))
    for value in (unknown.usable_bytes, unknown.fits, unknown.headroom_bytes, unknown.max_batch_size):
        assert value is None
    assert unknown.max_context_len is None
    assert unknown.min_gpus is None
    fixed = needed(parameter_bytes=10**9, growth=None)
    assert fixed.max_batch_size is None
    assert fixed.fits


def test_no_number_of_cards_helps_where_activations_alone_are_too_large() -> None:
    tiny = dataclasses.replace(H100, memory_usable_bytes=overhead_bytes(H100) + 1000)
    assert needed(parameter_bytes=10**9, growth=KV, gpu=tiny).min_gpus is None


def test_a_saved_report_answers_for_another_gpu() -> None:
    report = analyze(TARGETS["moe"], gpus=["h100"], scenario=SHORT, selection=NO_RULES)
    again = reprice(from_json(to_json(report)), gpus=["a100_sxm_80gb"], selection=NO_RULES)
    direct = analyze(TARGETS["moe"], gpus=["a100_sxm_80gb"], scenario=SHORT, selection=NO_RULES)
    assert again.runs[0].memory == direct.runs[0].memory
    assert report.runs[0].memory is not None
    assert report.runs[0].memory.total_bytes == sum(
        getattr(report.runs[0].memory, f"{part}_bytes") for part in ("weights", "kv_cache", "activations", "overhead")
    )
