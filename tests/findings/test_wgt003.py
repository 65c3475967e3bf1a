"""WGT003: a larger batch, as far as weights set the pace and memory lasts."""

from dataclasses import replace

import pytest
from findings.situations import retracing, situation
from fxroof.analyzer.finding import registered
from fxroof.analyzer.memory import Memory
from fxroof.analyzer.savings import timed
from fxroof.analyzer.scenario import Scenario
from fxroof.rules import batch_below_ridge  # noqa: F401  # registers it
from support import traced

(RULE,) = (r for r in registered() if r.code == "WGT003")
ONE = Scenario(batch_size=1, input_len=2048, output_len=256)


def room_for(batch: int, *, fits: bool = True) -> Memory:
    return Memory(
        weights_bytes=1, kv_cache_bytes=1, activations_bytes=1, overhead_bytes=1, total_bytes=4, usable_bytes=8,
        fits=fits, headroom_bytes=4, max_batch_size=batch, max_context_len=None, min_gpus=1, context_len=2304,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return traced("llama-3-8b", ONE)


def found(model, **given):
    place = situation(
        model.graphs["decode"],
        scenario=given.pop("scenario", ONE),
        retraced=retracing(model.model.module),
        memory=given.pop("memory", room_for(64)),
        **given,
    )
    return place, list(RULE.check(place))


@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_the_saving_is_that_of_a_step_at_the_larger_batch(model, execution):
    place, (match,) = found(model, execution=execution)
    wanted = match.evidence["batch_wanted"]
    assert wanted >= 16
    assert wanted & (wanted - 1) == 0
    wide = timed(traced("llama-3-8b", replace(ONE, batch_size=wanted)).graphs["decode"], place.gpu, execution)
    times = place.analysis.seconds
    assert match.saving == pytest.approx((times.bound - wide.bound / wanted, times.estimate - wide.estimate / wanted))
    assert match.per_token
    # a step of more sequences takes longer, and yields more tokens a second
    assert match.evidence["seconds_per_step_wanted"] >= match.evidence["seconds_per_step"]
    assert match.evidence["tokens_per_second_wanted"] > match.evidence["tokens_per_second"]


def test_memory_limits_it(model):
    _, (match,) = found(model, memory=room_for(11))
    assert match.evidence["batch_wanted"] == 8
    assert match.evidence["limit"] == "memory"


@pytest.mark.parametrize(
    "given",
    [
        {"memory": room_for(1)},
        {"memory": room_for(64, fits=False)},
        {"memory": None},
        {"retraced": lambda scenario, phase: None},
    ],
    ids=["full", "does not fit", "unknown", "cannot be traced again"],
)
def test_it_is_silent(model, given):
    place = situation(model.graphs["decode"], **{"scenario": ONE, "retraced": retracing(model.model.module), **given})
    assert not list(RULE.check(place))


def test_prompts_have_nothing_to_gain(model):
    place = situation(
        model.graphs["prefill"], scenario=ONE, memory=room_for(64), retraced=retracing(model.model.module)
    )
    assert not list(RULE.check(place))
