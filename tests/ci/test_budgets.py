"""Limits as people write them."""

import pytest
from fxroof.analyzer.budgets import METRICS, BudgetError, budgets, from_texts, judge
from hypothesis import given
from hypothesis import strategies as st
from render.sample import report


@pytest.mark.parametrize(
    ("text", "metric", "limit", "relative"),
    [
        ("decode.tpot=12 ms", "decode.tpot", 0.012, False),
        ("prefill.ttft = 1.5s", "prefill.ttft", 1.5, False),
        ("decode.time=300us", "decode.time", 300e-6, False),
        ("memory.total=80 GB", "memory.total", 80e9, False),
        ("memory.total=80GiB", "memory.total", 80 * 2**30, False),
        ("decode.bytes=1,500 MB", "decode.bytes", 1.5e9, False),
        ("prefill.flops=2 TFLOP", "prefill.flops", 2e12, False),
        ("coverage=99%", "coverage", 0.99, False),
        ("decode.kernels=300", "decode.kernels", 300, False),
        ("decode.tokens_per_second=1000 tokens/s", "decode.tokens_per_second", 1000, False),
        ("decode.bytes=+2%", "decode.bytes", 0.02, True),
        ("decode.time=-5%", "decode.time", -0.05, True),
    ],
)
def test_texts(text, metric, limit, relative):
    (found,) = from_texts([text])
    assert (found.metric, found.relative) == (metric, relative)
    assert found.limit == pytest.approx(limit)


@pytest.mark.parametrize(
    "text",
    ["decode.tpot=12", "decode.tpot=12 GB", "memory.total=3 ms", "coverage=99 ms", "decode.tpot=", "decode.tpot=fast",
     "decode.tpot=+2 ms", "nothing=3", "decode=3 ms"],
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
    assert [(b.metric, b.of, b.gpu, b.scenario, b.relative) for b in found] == [
        ("decode.tpot", "estimate", "", "", False),
        ("decode.tpot", "bound", "b200", "", True),
        ("memory.total", "estimate", "", "chat", False),
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
    (run,) = report().runs
    for name, metric in METRICS.items():
        value = metric.read(run, "estimate")
        if not value or metric.unit not in ("seconds", "bytes"):
            continue
        unit = "s" if metric.unit == "seconds" else "B"
        (verdict,) = judge([run], from_texts([f"{name}={value * factor:.20f} {unit}"]))
        assert verdict.kept is (factor >= 1.0 if not metric.at_least else factor <= 1.0)


def test_relative_limits_need_a_base():
    runs = report().runs
    limits = from_texts(["decode.time=+2%"])
    (alone,) = judge(runs, limits)
    assert alone.kept is None
    assert "no base" in alone.why
    (beside,) = judge(runs, limits, runs)
    assert beside.kept is True
    assert beside.base == beside.value
