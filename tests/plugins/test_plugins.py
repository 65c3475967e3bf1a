"""Formulas that installed packages bring, through the entry point group `fxroof.formulas`.

Each test installs a small package beside a model that calls an operator of its own, and runs the command line.
"""

from pathlib import Path

import pytest
import torch
from fxroof.analyzer.pricing import PLUGINS
from fxroof.analyzer.trace import trace
from plugins.installed import Installed
from torch import nn

MODEL = """
import torch
from torch import nn

@torch.library.custom_op("acme::product", mutates_args=())
def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left @ right

@product.register_fake
def _(left, right):
    return left.new_empty(left.shape[0], right.shape[1])

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(8, 8))

    def forward(self, x):
        y = product(x, self.weight)
        for _ in range(20):
            y = y + 1
        return y

def example_inputs(phase, batch_size, input_len, context_len):
    return (torch.empty(8, 8),) if phase == "forward" else None
"""

FORMULA = """
from fxroof.analyzer.cost import formula

@formula("acme.product")
def product(call):
    left, right = call.tensor("left"), call.tensor("right")
    return call.cost(matmul={left.dtype: 2 * left.numel * right.shape[1]})
"""


@pytest.fixture
def installed(tmp_path: Path) -> Installed:
    return Installed(tmp_path, PLUGINS, MODEL)


def test_a_custom_op_is_unpriced_named_and_charged_its_inputs_and_outputs(installed: Installed) -> None:
    run = installed.run()
    (unpriced,) = run["coverage"]["unpriced"]
    assert (unpriced["target"], unpriced["count"], unpriced["bytes"]) == ("acme.product.default", 1, 3 * 8 * 8 * 4)
    assert unpriced["example"].endswith("model.py:19")
    assert run["coverage"]["fraction"] < 1
    assert run["phases"][0]["flops"]["matmul"] == 0


def test_a_package_prices_its_operators(installed: Installed) -> None:
    installed.add("acme_formulas", FORMULA)
    run = installed.run()
    assert run["coverage"]["unpriced"] == []
    assert run["coverage"]["fraction"] == 1
    # torch.utils.flop_counter gives 0 for a custom op
    assert run["phases"][0]["flops"]["matmul"] == 1024
    op = next(op for op in run["phases"][0]["ops"] if op["target"] == "acme.product.default")
    assert (op["bytes_read"], op["bytes_written"]) == (512, 256)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import a_module_that_is_not_there", "No module named 'a_module_that_is_not_there'"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("def (", "SyntaxError"),
        (
            FORMULA.replace("acme.product", "aten.mm"),
            "two formulas for aten.mm: fxroof.analyzer.formulas.matmul.matmul",
        ),
    ],
)
def test_a_package_that_cannot_be_used_is_named_and_ends_the_analysis(
    installed: Installed, source: str, reason: str
) -> None:
    installed.add("acme_broken", source)
    done = installed.analyze("-f", "json")
    assert done.returncode == 2
    message = " ".join(done.stderr.split())
    assert "installed package acme_broken (entry point acme_broken = acme_broken) cannot be loaded" in message
    assert reason in message
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_two_packages_for_one_operator_are_refused_and_both_named(installed: Installed) -> None:
    installed.add("acme_formulas", FORMULA)
    installed.add("other_formulas", FORMULA)
    done = installed.analyze("-f", "json")
    assert done.returncode == 2
    assert "two formulas for acme.product: acme_formulas.product and other_formulas.product" in " ".join(
        done.stderr.split()
    )


def test_a_captured_triton_kernel_is_named_by_its_function() -> None:
    triton = pytest.importorskip("triton", reason="comes with torch for CUDA")

    @triton.jit
    def copy_kernel(source, target, size):  # type: ignore[no-untyped-def]  # as Triton has it
        pass

    class Copies(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result = torch.empty_like(x)
            torch.library.wrap_triton(copy_kernel)[(4,)](x, result, x.numel())
            return result + 1

    graph = trace(Copies(), (torch.empty(512, device="meta"),))
    (op,) = (op for op in graph.ops if op.target.startswith("triton."))
    assert op.target == "triton.copy_kernel"
    assert op.args["size"] == 512
    assert {graph.tensors[i].shape for i in op.inputs} == {(512,)}
