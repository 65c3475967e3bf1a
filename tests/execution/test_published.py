"""Whole models on real GPUs, as others measured and published them: bounds are never beaten, estimates are close."""

from statistics import median

import pytest
from fxroof.analyzer.analysis import Times
from survey.published import DATA, ROWS, Row, predicted

# the others, which docs/method.md sums up, take half an hour to trace
QUICK = {
    ("gpt-fast", "llama-3-8b", "decode", 5, 1): 0.15,
    ("gpt-fast", "mixtral-8x7b", "decode", 5, 2): 0.2,
    ("llama.cpp", "llama-3-8b", "decode", 1, 1): 0.4,  # on seven parts, see the median below
    ("silybench", "qwen3-8b", "prefill", 1024, 1): 0.4,
}
"""Rows by source, model, kind, prompt and GPUs, and how far off the estimate may be, of what was measured."""


def key(row: Row) -> tuple[str, str, str, int, int]:
    return row.source, row.model, row.kind, row.input, row.gpus


@pytest.fixture(scope="module")
def quick() -> list[tuple[Row, Times]]:
    return list(predicted(row for row in ROWS if key(row) in QUICK and not row.weights))


def test_no_run_beats_the_bound(quick: list[tuple[Row, Times]]) -> None:
    assert {key(row) for row, _ in quick} == QUICK.keys()
    for row, times in quick:
        assert times.floor <= times.bound < row.measured, row


def test_estimates_are_close(quick: list[tuple[Row, Times]]) -> None:
    for row, times in quick:
        assert times.estimate == pytest.approx(row.measured, rel=QUICK[key(row)]), row
    errors = [abs(times.estimate / row.measured - 1) for row, times in quick if row.source == "llama.cpp"]
    assert len(errors) == 7
    assert median(errors) < 0.15


def test_every_row_says_where_it_is_from() -> None:
    assert {row.source for row in ROWS} == set(DATA["sources"])
    assert all(source["url"].startswith("https://") for source in DATA["sources"].values())
    assert all(reason["why"] for reason in DATA["left_out"])


@pytest.mark.parametrize(
    ("source", "value", "unit", "seconds"),
    [
        ("gpt-fast", 93.83, "tokens/s", 0.010658),  # 10.658 ms a token
        ("trt-llm-0.5", 133, "ms", 0.133),
        ("trt-llm-0.5", 3486, "tokens/s", 2.34997),  # 64 x 128 tokens
        ("trt-llm-0.6", 525, "tokens/s/GPU", 234.057),  # 240 x 2,048 tokens on 4 GPUs
        ("qwen3", 414.17, "tokens/s with the prompt", 4.94724),  # 2,049 tokens
        ("llama.cpp", 10815.51, "tokens/s", 0.0473394),  # a prompt of 512
    ],
)
def test_units(source: str, value: float, unit: str, seconds: float) -> None:
    (row,) = (row for row in ROWS if (row.source, row.value, row.unit) == (source, value, unit))
    assert row.measured == pytest.approx(seconds, rel=1e-4)
