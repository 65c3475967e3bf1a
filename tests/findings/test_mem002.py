"""MEM002: batches that memory has no room for, where a smaller one has; MEM001 where not even one sequence has."""

import dataclasses

import pytest
from findings.situations import situation
from fxroof.analyzer.finding import Severity, registered
from fxroof.analyzer.memory import CacheGrowth, CachePart, memory
from fxroof.analyzer.scenario import Scenario
from fxroof.hardware.catalog import load
from fxroof.rules import does_not_fit, no_room_for_batch  # noqa: F401  # register them
from support import SHORT, traced

RULES = {rule.code: rule for rule in registered() if rule.code in ("MEM001", "MEM002")}
RULE = RULES["MEM002"]
GIGA = 10**9


def asked(batch, *, weights=16 * GIGA, cache_a_token=2**20, usable=40 * GIGA, phase=None, name="llama-3-8b"):
    """A model with so many bytes of weights and cache, and the activations of a small one."""
    graphs = traced(name).graphs
    phases = {n: situation(g) for n, g in graphs.items()}
    scenario = dataclasses.replace(SHORT, batch_size=batch)
    growth = CacheGrowth(parts=(CachePart(count=1, fixed_bytes=0, bytes_per_token=cache_a_token),))
    gpu = dataclasses.replace(load("h100_sxm").gpu, memory_usable_bytes=usable)
    known = memory(
        graphs, {n: s.costs for n, s in phases.items()}, gpu, scenario, parameter_bytes=weights, growth=growth
    )
    found = phases[phase or known.activations_phase]
    return dataclasses.replace(found, scenario=scenario, memory=known, gpu=gpu)


def codes(situation):
    return [code for code, rule in RULES.items() for _ in rule.check(situation)]


def test_each_shortage_is_said_once():
    assert codes(asked(2)) == []
    assert codes(asked(4000)) == ["MEM002"]
    assert codes(asked(4000, weights=39_900_000_000)) == ["MEM001"]
    assert codes(asked(1, weights=80 * GIGA)) == ["MEM001"]
    other = "decode" if asked(4000).memory.activations_phase == "prefill" else "prefill"
    assert codes(asked(4000, phase=other)) == []


def test_it_is_silent_where_memory_is_not_known():
    found = asked(4000)
    assert codes(dataclasses.replace(found, memory=None)) == []
    unknown = dataclasses.replace(found.memory, fits=None, usable_bytes=None)
    assert codes(dataclasses.replace(found, memory=unknown)) == []
    no_growth = dataclasses.replace(found.memory, max_batch_size=None)
    assert codes(dataclasses.replace(found, memory=no_growth)) == ["MEM001"]


def test_what_it_says_is_arithmetic_on_memory():
    found = asked(4000)
    (match,) = RULE.check(found)
    known = found.memory
    each = (known.kv_cache_bytes + known.activations_bytes) / 4000
    left = known.usable_bytes - known.overhead_bytes
    assert RULE.severity is Severity.ERROR
    assert match.always
    assert match.evidence["largest_batch"] == known.max_batch_size == int((left - known.weights_bytes) // each)
    assert match.evidence["kv_cache_bytes_a_sequence"] == 2**20 * (SHORT.input_len + SHORT.output_len)
    narrower = (known.kv_cache_bytes / 2 + known.activations_bytes) / 4000
    rooms = {
        "8-bit weights": (left - known.weights_bytes / 2) // each,
        "4-bit weights": (left - known.weights_bytes * 4.125 / 16) // each,
        "an 8-bit cache": (left - known.weights_bytes) // narrower,
        "4-bit weights and an 8-bit cache": (left - known.weights_bytes * 4.125 / 16) // narrower,
    }
    for name, room in rooms.items():
        assert f"{name}: {int(room):,}" in match.remedy.text
    assert f"context of {known.max_context_len:,} tokens instead of {known.context_len:,}" in match.remedy.text
    assert f"Run {known.max_batch_size:,} sequences at a time" in match.remedy.text
    assert f"--tp {known.min_gpus}" in match.remedy.text


def test_what_makes_room_for_all_is_said_so():
    found = asked(130)
    largest = found.memory.max_batch_size
    (match,) = RULE.check(asked(largest + 5))
    assert "8-bit weights: all" in match.remedy.text


def test_a_batch_that_is_found_to_fit_fits():
    largest = next(iter(RULE.check(asked(4000)))).evidence["largest_batch"]
    assert asked(largest).memory.fits
    assert codes(asked(largest)) == []
    assert codes(asked(largest + 1)) == ["MEM002"]


@pytest.mark.parametrize(("name", "batch"), [("vit", 1_000_000), ("gpt2", 100_000)])
def test_on_models_as_they_are(name, batch):
    graphs = traced(name).graphs
    phases = {n: situation(g) for n, g in graphs.items()}
    costs = {n: s.costs for n, s in phases.items()}
    small = Scenario(batch_size=2)
    known = memory(graphs, costs, load("h100_sxm").gpu, small, parameter_bytes=10**8, growth=CacheGrowth())
    assert known.fits
    tight = dataclasses.replace(load("h100_sxm").gpu, memory_usable_bytes=known.total_bytes - 1)
    known = memory(graphs, costs, tight, small, parameter_bytes=10**8, growth=CacheGrowth())
    one = dataclasses.replace(phases[known.activations_phase], scenario=small, memory=known)
    (match,) = RULE.check(one)
    assert "there is room for 1 sequence of the 2" in match.message
