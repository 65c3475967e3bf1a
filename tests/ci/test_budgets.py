"""Limits as people write them."""

from dataclasses import replace

import pytest
from fxroof.analyzer.budgets import METRICS, BudgetError, budgets, from_texts, judge
from hypothesis import given
from hypothesis import strategies as st
from render.sample import report


@pytest.mark.parametrize(
    ("text", "metric", "limit", "kind"),
    [
        ("decode.tpot=12 ms", "decode.tpot", 0.012, "absolute"),
        ("prefill.ttft = 1.5s", "prefill.ttft", 1.5, "absolute"),
        ("decode.time=300us", "decode.time", 300e-6, "absolute"),
        ("memory.total=80 GB", "memory.total", 80e9, "absolute"),
        ("memory.total=80GiB", "memory.total", 80 * 2**30, "absolute"),
        ("decode.bytes=1,500 MB", "decode.bytes", 1.5e9, "absolute"),
        ("prefill.flops=2 TFLOP", "prefill.flops", 2e12, "absolute"),
        ("coverage=99%", "coverage", 0.99, "absolute"),
        ("decode.kernels=300", "decode.kernels", 300, "absolute"),
        ("decode.tokens_per_second=1000 tokens/s", "decode.tokens_per_second", 1000, "absolute"),
        ("decode.bytes=+2%", "decode.bytes", 0.02, "share"),
        ("decode.time=-5%", "decode.time", -0.05, "share"),
        ("decode.time=+2 ms", "decode.time", 0.002, "change"),
        ("coverage=-1%", "coverage", -0.01, "change"),
        ("decode.tpot=crossing 12 ms", "decode.tpot", 0.012, "crossing"),
    ],
)
def test_texts(text, metric, limit, kind):
    (found,) = from_texts([text])
    assert (found.metric, found.kind) == (metric, kind)
    assert found.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    "text",
    ["decode.tpot=12", "decode.tpot=12 GB", "memory.total=3 ms", "coverage=99 ms", "decode.tpot=", "decode.tpot=fast",
     "decode.tpot=+2", "nothing=3", "decode=3 ms", "decode.tpot=crossing", "decode.tpot=crossing +2%",
     f"decode.kernels={'9' * 400}"],
)  # fmt: skip
def test_what_is_no_limit_is_refused_with_an_example(text):
    with pytest.raises(BudgetError) as caught:
        from_texts([text])
    assert caught.value.hint


def test_tables():
    found = budgets(
        {
            "decode": {"tpot": ["12 ms", {"limit": "+2%", "of": "bound", "gpu": "b200"}]},
            "memory.total": {"limit": "80 GB", "scenario": "chat"},
        }
    )
    assert [(b.metric, b.of, b.gpu, b.scenario, b.kind) for b in found] == [
        ("decode.tpot", "estimate", "", "", "absolute"),
        ("decode.tpot", "bound", "b200", "", "share"),
        ("memory.total", "estimate", "", "chat", "absolute"),
    ]


@pytest.mark.parametrize(
    "wrong",
    [{"memory.total": {"limit": "80 GB", "of": "bound"}}, {"decode.tpot": {"limits": "1 ms"}}, {"decode.tpot": 12}],
)
def test_tables_that_mean_nothing(wrong):
    with pytest.raises(BudgetError):
        budgets(wrong)


@given(st.floats(min_value=0.5, max_value=2.0))
def test_a_limit_is_kept_from_the_value_on(factor):
    found = report()
    (run,) = found.runs
    for name, metric in METRICS.items():
        value = metric.read(run, "estimate")
        if not value or metric.unit not in ("seconds", "bytes"):
            continue
        unit = "s" if metric.unit == "seconds" else "B"
        (verdict,) = judge(found, from_texts([f"{name}={value * factor:.20f} {unit}"]))
        assert verdict.kept is (factor >= 1.0 if not metric.at_least else factor <= 1.0)


def test_relative_limits_need_a_base():
    found = report()
    limits = from_texts(["decode.time=+2%"])
    (alone,) = judge(found, limits)
    assert alone.kept is None
    assert "no base" in alone.why
    (beside,) = judge(found, limits, dict(enumerate(found.runs)))
    assert beside.kept is True
    assert beside.base == beside.value


def _slower(found, factor):
    (run,) = found.runs
    phases = tuple(replace(p, seconds=replace(p.seconds, estimate=p.seconds.estimate * factor)) for p in run.phases)
    return replace(found, runs=(replace(run, phases=phases),))


def test_a_growth_in_the_units_of_the_figure():
    found = report()
    (run,) = found.runs
    milliseconds = METRICS["decode.time"].read(run, "estimate") * 1e3
    slower = _slower(found, 1.5)
    for added, kept in ((0.4, False), (0.6, True)):
        (verdict,) = judge(slower, from_texts([f"decode.time=+{milliseconds * added:.9f} ms"]), {0: run})
        assert verdict.kept is kept


def test_a_crossing_limit_is_broken_only_by_what_crosses_it():
    found = report()
    (run,) = found.runs
    milliseconds = METRICS["decode.time"].read(run, "estimate") * 1e3
    (beyond,) = _slower(found, 1.5).runs
    limits = from_texts([f"decode.time=crossing {milliseconds * 1.2:.9f} ms"])
    for head, base, kept in ((1.1, run, True), (1.5, run, False), (1.6, beyond, True), (1.1, beyond, True)):
        (verdict,) = judge(_slower(found, head), limits, {0: base})
        assert verdict.kept is kept
    (alone,) = judge(_slower(found, 1.5), limits)
    assert alone.kept is None
