"""MOE001: experts that are read for a handful of rows."""

from dataclasses import replace

import pytest
from findings.situations import retracing, rewritten, situation
from findings.test_wgt003 import room_for
from fxroof.analyzer.finding import registered
from fxroof.analyzer.pricing import price
from fxroof.analyzer.scenario import Scenario
from fxroof.rules import cold_experts  # noqa: F401  # registers it
from support import traced

(RULE,) = (r for r in registered() if r.code == "MOE001")
ONE = Scenario(batch_size=1, input_len=512, output_len=64)


def found(name, scenario, **given):
    model = traced(name, scenario)
    place = situation(
        model.graphs["decode"], scenario=scenario, retraced=retracing(model.model.module), memory=room_for(64), **given
    )
    return place, list(RULE.check(place))


@pytest.mark.parametrize(("name", "products"), [("mixtral-8x7b", 8), ("qwen3-30b-a3b", 8)])
def test_mixtures_at_a_small_batch(name, products):
    place, matches = found(name, ONE)
    assert len(matches) == products
    for match in matches:
        assert match.evidence["dtype"] == "bfloat16"
        weights = [a for a in place.costs[match.op].traffic if place.graph.role(a.tensor).value == "weight"]
        assert match.evidence["expert_bytes"] == sum(a.expected_read or a.read for a in weights)


def test_one_token_reads_just_the_experts_it_chose():
    _, matches = found("mixtral-8x7b", ONE)
    assert "of 8 experts some 2 are read, each for about 1.0 rows" in matches[0].message


def test_narrower_experts_move_half_the_bytes_and_their_scales():
    place, _ = found("mixtral-8x7b", ONE)
    before, after = (
        sum(a.read for cost in price(g, place.gpu) for a in cost.traffic if g.role(a.tensor).value == "weight")
        for g in (place.graph, rewritten(place.graph, RULE))
    )
    experts = sum(
        a.read
        for op, cost in zip(place.graph.ops, place.costs, strict=True)
        for a in cost.traffic
        if op.target == "aten._grouped_mm.default" and place.graph.role(a.tensor).value == "weight"
    )
    assert before - after == pytest.approx(experts / 2, rel=0.002)
    assert before - after < experts / 2


def test_a_larger_batch_is_an_alternative_for_as_many_tokens():
    place, matches = found("mixtral-8x7b", ONE)
    offers = [name for m in matches for name in m.alternatives if name.startswith("batch")]
    assert len(offers) == 1  # said once, for all products
    bound, estimate = matches[0].alternatives[offers[0]]
    assert 0 < bound < place.analysis.seconds.bound
    assert 0 < estimate < place.analysis.seconds.estimate


def test_many_rows_an_expert_and_dense_models_are_left_alone():
    prefill = situation(traced("mixtral-8x7b", replace(ONE, input_len=8192)).graphs["prefill"])
    assert not list(RULE.check(prefill))
    assert not list(RULE.check(situation(traced("llama-3-8b").graphs["decode"])))
