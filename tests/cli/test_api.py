"""The call from Python: what the caller has -> a Report that shows itself."""

import subprocess
import sys

import pytest
import torch
from fxroof.analyzer.errors import FxroofError, WorkloadError
from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.report import Report
from fxroof.hardware.catalog import CatalogError
from render.sample import partial, renamed, report
from torch import nn


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left = nn.Linear(32, 16)
        self.right = nn.Linear(8, 16)

    def forward(self, x, *, y):
        return torch.relu(self.left(x) + self.right(y))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 16), nn.ReLU())

    def forward(self, x):
        return self.layers(x)


X = torch.zeros(4, 32)
OPS = ["aten.linear.default", "aten.relu.default"]


def ops(found: Report) -> list[str]:
    assert list(found.graphs) == ["forward"]
    assert [run.gpu.key for run in found.runs] == ["b200"]
    return [op.target for op in found.graphs["forward"].ops]


def test_a_module_with_example_inputs():
    module = Stack()
    found = analyze(module, (X,), gpu="b200")
    assert ops(found) == OPS
    assert found.model.parameters == 32 * 16 + 16
    assert not next(module.parameters()).is_meta
    weight = 4 * (32 * 16 + 16)
    assert found.runs[0].phases[0].bytes.weight == weight


def test_example_inputs_by_name():
    found = analyze(Pair(), {"x": X, "y": torch.zeros(4, 8)}, gpu="b200")
    assert ops(found).count("aten.linear.default") == 2


def test_a_graph_module_is_exported_again():
    whole = torch.export.export(Stack(), (X,)).module()
    assert isinstance(whole, torch.fx.GraphModule)
    plain = torch.fx.symbolic_trace(Stack())
    assert ops(analyze(plain, (X,), gpu="b200")) == ops(analyze(Stack(), (X,), gpu="b200"))
    with pytest.raises(WorkloadError, match="does not record its inputs"):
        analyze(plain, gpu="b200")


def test_an_exported_program_is_one_forward():
    found = analyze(torch.export.export(Stack(), (X,)), gpu="b200")
    assert ops(found) == OPS
    assert found.model.parameters == 32 * 16 + 16
    with pytest.raises(WorkloadError):
        analyze(torch.export.export(Stack(), (X,)), gpu="b200", dtype="bf16")


def test_gpus_are_named_one_or_several():
    found = analyze(Stack(), (X,), gpu="b200", gpus=["l4", "b200"])
    assert [run.gpu.key for run in found.runs] == ["b200", "l4"]
    with pytest.raises(FxroofError, match="No GPU is named"):
        analyze(Stack(), (X,))
    with pytest.raises(CatalogError):
        analyze(Stack(), (X,), gpu="b200x")


def test_example_inputs_do_not_go_with_a_name():
    with pytest.raises(FxroofError, match="go with a module"):
        analyze("mymodel.py", (X,), gpu="b200")


def test_a_report_shows_itself():
    assert repr(report()) == "<fxroof report of SmallGPT: x100 prefill 281 µs, x100 decode 47.9 µs>"
    assert repr(partial()).endswith("decode failed>")
    assert str(report()).startswith("model      SmallGPT")
    assert "decode     The model's control flow" in str(partial())


def test_a_report_in_a_notebook_is_text_and_not_markup():
    page = renamed(report(), "<script>alert(1)</script>")._repr_html_()
    assert page.startswith("<pre")
    assert "<script>" not in page
    assert "&lt;script&gt;" in page


def test_a_report_that_is_imported_alone_shows_itself():
    code = (
        "from fxroof.analyzer.report import Report, ModelInfo, Traced\nfrom fxroof.analyzer.scenario import Scenario\n"
        "m = ModelInfo(name='m', source='', parameters=0, parameter_bytes=0, dtypes={}, cache_kind='')\n"
        "print(Report(fxroof_version='', torch_version='', catalog_version='',"
        " traces=(Traced(model=m, scenario=Scenario(), graphs={}),), runs=()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("model      m")
