"""The example: every defect in it is found at its line, and its remedied twin computes the same and is clean."""

import importlib.util
import sys

import pytest
import torch
from findings.situations import situation
from fxroof.analyzer.load import load
from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.review import Selection, load_rules, review
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.workload import plan
from support import ROOT, trace_program

DEFECTS = {
    "ATT001": ["scores = torch.matmul(q"],  # with the keys and values repeated for it
    "FUS001": ["return self.down_proj(F.silu("],
    "FUS002": ["return self.weight * h.to(x.dtype)"],
    "FUS003": ["return x * cos + rotate_half(x) * sin"],
    "FUS007": ["scores = scores.masked_fill(~causal"],
    "KVC001": ["k = torch.cat((past[0]", "v = torch.cat((past[1]"],
    "WGT005": ["logits = self.lm_head("],
    "WGT006": ["q = self.q_proj(x)", "return self.down_proj(F.silu("],
}
ADVICE = {"LCH001", "WGT001", "WGT003", "WGT004", "KVC003", "SHP001", "SHP002"}
"""About how the program is run, on what, and how wide its numbers are: no defect of its source."""
RETRACING = ("WGT003", "WGT004")
"""Of these, those that have the model traced again, which takes as long as all else."""


pytestmark = pytest.mark.xdist_group("example")  # one worker analyses it


@pytest.fixture(scope="module")
def as_written():
    report = analyze(
        str(ROOT / "examples" / "mymodel.py"),
        gpu="b200",
        execution="eager",
        scenario=Scenario(),
        selection=Selection(ignore=RETRACING),
        in_process=True,
    )
    (run,) = report.runs
    assert not run.rule_failures
    return run


@pytest.fixture(scope="module")
def remedied():
    programs = plan(load(str(ROOT / "examples" / "mymodel_remedied.py")), Scenario()).programs
    return {program.phase.name: trace_program(program) for program in programs}


def test_every_defect_is_found_at_its_line(as_written):
    lines = (ROOT / "examples" / "mymodel.py").read_text().splitlines()
    wanted = {
        (code, next(i for i, line in enumerate(lines, 1) if snippet in line))
        for code, snippets in DEFECTS.items()
        for snippet in snippets
    }
    found = {(f.code, f.line) for f in as_written.findings if f.code not in ADVICE}
    assert found == wanted


def test_the_waterfalls_end_at_the_floor_of_what_is_left(as_written):
    for phase in as_written.phases:
        *_, last, floor = as_written.waterfall[phase.name]
        assert floor.bound <= last.bound * (1 + 1e-9)
        assert last.bound <= 1.05 * floor.bound


@pytest.mark.parametrize(
    ("execution", "left"), [("compiled", ADVICE - {"LCH001"}), ("eager", ADVICE | {"FUS001", "FUS003"})]
)
def test_the_remedied_twin_is_clean(remedied, execution, left):
    """Run op by op, what only compiling fuses is still reported."""
    phases = {
        name: situation(graph, execution=execution, gpu="b200", scenario=Scenario()) for name, graph in remedied.items()
    }
    found = review(phases, load_rules()[0])
    assert not found.failures
    assert {f.code for f in found.findings} <= left


def example(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_remedied_twin_computes_the_same():
    torch.manual_seed(0)
    before, after = example("mymodel"), example("mymodel_remedied")
    sizes = {"vocab_size": 97, "dim": 64, "n_layers": 2, "n_heads": 8, "n_kv_heads": 2, "hidden_dim": 96}
    one = before.GPT(before.GPTConfig(**sizes, dtype=torch.float32)).eval()
    other = after.GPT(after.GPTConfig(**sizes, max_batch=3, max_len=32, dtype=torch.float32)).eval()
    weights = one.state_dict()
    joined = {}
    for name in list(weights):
        head, _, last = name.rpartition("_proj")
        if head.endswith((".q", ".k", ".v")):
            joined.setdefault(f"{head[:-1]}qkv_proj{last}", []).append(weights.pop(name))
        elif head.endswith((".gate", ".up")):
            joined.setdefault(f"{head.rpartition('.')[0]}.gate_up_proj{last}", []).append(weights.pop(name))
    other.load_state_dict(weights | {name: torch.cat(parts) for name, parts in joined.items()})
    tokens = torch.randint(97, (3, 11))
    with torch.no_grad():
        logits, cache = one(tokens)
        assert torch.allclose(logits[:, -1:], other(tokens, 0), atol=1e-5)
        for position in range(11, 15):
            token = logits[:, -1:].argmax(-1)
            logits, cache = one(token, cache)
            assert torch.allclose(logits, other(token, position), atol=1e-5)
        several = torch.randint(97, (3, 4))  # tokens that are verified together, or a chunk of a prompt
        assert torch.allclose(one(several, cache)[0][:, -1:], other(several, 15), atol=1e-5)
