"""WGT004: drafts verified in one step, as a function of how often they are accepted."""

import random
from dataclasses import replace

import pytest
from findings.situations import retracing, situation
from fxroof.analyzer.finding import Confidence, registered
from fxroof.analyzer.scenario import Scenario
from fxroof.rules import decode_without_speculation
from support import traced

(RULE,) = (r for r in registered() if r.code == "WGT004")
ONE = Scenario(batch_size=1, input_len=2048, output_len=256)


@pytest.fixture(scope="module")
def model():
    return traced("llama-3-8b", ONE)


def found(model, **given):
    place = situation(model.graphs["decode"], **{"scenario": ONE, "retraced": retracing(model.model.module), **given})
    return place, list(RULE.check(place))


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_it_never_saves_more_than_the_tokens_it_yields(model, execution):
    place, (match,) = found(model, execution=execution)
    assert match.confidence is Confidence.MEDIUM
    assert match.per_token
    offers = {0.7: match.saving} | {float(name.split()[-1]): s for name, s in match.alternatives.items()}
    assert sorted(offers) == [0.5, 0.6, 0.7, 0.8, 0.9]
    times = place.analysis.seconds
    for acceptance, (bound, estimate) in offers.items():
        yielded = decode_without_speculation.tokens_gained(acceptance, 4)
        assert 0 < estimate <= times.estimate * (1 - 1 / yielded) * (1 + 1e-9)
        assert 0 < bound <= times.bound * (1 - 1 / yielded) * (1 + 1e-9)
    ordered = [offers[a] for a in sorted(offers)]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.7, 0.95, 1.0])
def test_tokens_gained_are_those_of_many_tries(acceptance):
    rng = random.Random(0)  # noqa: S311  # a draw, no secret
    tries = 40_000
    total = 0
    for _ in range(tries):
        total += 1
        for _ in range(4):
            if rng.random() >= acceptance:
                break
            total += 1
    assert decode_without_speculation.tokens_gained(acceptance, 4) == pytest.approx(total / tries, rel=0.01)


def test_the_longer_step_is_traced(model):
    place, (match,) = found(model)
    longer = place.retraced(replace(ONE, step_len=5), "decode")
    assert longer.tokens == 5
    assert longer.new_tokens == 1
    assert match.evidence["seconds_per_longer_step"] >= match.evidence["seconds_per_step"]
    # all five see the whole cache and those of the five before them
    assert {longer.tensors[i].shape[1] for op in longer.ops[:1] for i in op.inputs if op.target.startswith("aten.emb")}


def test_large_batches_prompts_and_models_without_a_cache_are_left_alone(model):
    assert not found(model, scenario=replace(ONE, batch_size=16))[1]
    prefill = situation(model.graphs["prefill"], scenario=ONE, retraced=retracing(model.model.module))
    assert not list(RULE.check(prefill))
    other = traced("nanogpt")
    place = situation(other.graphs["decode"], scenario=ONE, retraced=retracing(other.model.module))
    assert not list(RULE.check(place))
