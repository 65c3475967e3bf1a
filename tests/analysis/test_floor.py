"""The floor counts what a step cannot do without, not what the program happens to do."""

import pytest
from fxroof.analyzer.analysis import analyze_phase
from fxroof.analyzer.floor import Floor
from fxroof.analyzer.scenario import Scenario
from fxroof.hardware.catalog import load
from support import traced

H100 = load("h100_sxm").gpu
SCENARIO = Scenario(batch_size=2, input_len=96, output_len=32)
CONTEXT = 96 + 16


def floor_of(name: str, phase: str) -> Floor:
    return analyze_phase(traced(name, SCENARIO).graphs[phase], H100)[0].floor


def test_a_cache_grown_by_concatenation_costs_one_new_row() -> None:
    floor = floor_of("llama-3-8b", "decode")
    row = 2 * 4 * 8 * 128 * 2  # K and V of 4 layers, 8 heads of 128 in 16 bit
    assert floor.cache_written_bytes == 2 * row
    assert floor.cache_read_bytes == 2 * CONTEXT * row
    assert floor.output_bytes == 2 * 128256 * 2
    assert floor.input_bytes == 2 * 8


def test_prefill_writes_the_cache_and_reads_none() -> None:
    floor = floor_of("llama-3-8b", "prefill")
    assert floor.cache_read_bytes == 0
    assert floor.cache_written_bytes == 2 * 96 * 2 * 4 * 8 * 128 * 2


def test_a_static_cache_is_read_as_far_as_it_is_filled() -> None:
    floor = floor_of("gptfast", "decode")
    row = 2 * 4 * 8 * 128 * 2
    # 128 positions, of which 112 are filled
    assert floor.cache_written_bytes == 2 * row
    assert floor.cache_read_bytes == pytest.approx(2 * CONTEXT * row, rel=0.01)
    assert floor_of("gptfast", "prefill").cache_read_bytes == 0


def test_a_cache_indexed_by_position_is_read_where_it_is_sliced() -> None:
    floor = floor_of("llama_reference", "decode")
    row = 2 * 4 * 8 * 128 * 2
    assert floor.cache_read_bytes == 2 * CONTEXT * row
    assert floor.cache_written_bytes == 2 * row


def test_small_models_stay_on_chip() -> None:
    floor = analyze_phase(traced("resnet18").graphs["forward"], H100)[0].floor
    assert floor.kept_on_chip_bytes <= (H100.cache_bytes or 0)
    assert floor.memory_seconds * H100.memory_bandwidth == pytest.approx(floor.total_bytes)
