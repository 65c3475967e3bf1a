"""An operator nobody priced is charged its bytes, named, and lowers the coverage; it is never a silent zero."""

import pytest
import torch
from fxroof.analyzer.errors import CoverageError
from fxroof.analyzer.pipeline import analyze
from torch import nn


@torch.library.custom_op("fxroof_tests::mystery", mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@mystery.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


class Net(nn.Module):
    def __init__(self, known: int) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.known = known

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = mystery(self.first(x))
        for _ in range(self.known):
            x = x * 2
        return x


def test_an_unknown_operator_is_named_and_charged() -> None:
    (run,) = analyze(Net(30), gpus=["h100_sxm"]).runs
    (unknown,) = run.coverage.unpriced
    assert unknown.target == "fxroof_tests.mystery.default"
    assert unknown.count == 1
    assert unknown.bytes == 2 * 64 * 4
    assert unknown.example.startswith("tests/analysis/test_coverage.py:")
    assert run.coverage.fraction == 1 - 1 / len(run.phases[0].ops)


def test_a_graph_of_unknown_operators_is_refused() -> None:
    with pytest.raises(CoverageError, match=r"fxroof_tests\.mystery"):
        analyze(Net(2), gpus=["h100_sxm"])
