"""Whole models on real GPUs, as others measured and published them: bounds are never beaten, estimates are close."""

import pytest
from survey.published_decode import ROWS, Row

# the others, which docs/method.md lists, take minutes to trace
QUICK = [row for row in ROWS if (row.model, row.tp) in {("llama-3-8b", 1), ("mixtral-8x7b", 2)}]


@pytest.mark.parametrize("row", QUICK, ids=lambda row: f"{row.model}-tp{row.tp}")
def test_decode_of_whole_models(row: Row) -> None:
    seconds = row.predicted()
    assert 1 / seconds.bound > row.tokens_per_second, "no run beats the bound"
    assert 1 / seconds.estimate == pytest.approx(row.tokens_per_second, rel=0.15)
