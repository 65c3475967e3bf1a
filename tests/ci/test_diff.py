"""Two reports of one model: what moved, what is new, what fails, and what is doubtful."""

import json
from dataclasses import replace

import pytest
from click.testing import CliRunner
from fxroof.analyzer.budgets import from_texts
from fxroof.analyzer.cli import main
from fxroof.analyzer.diff import diff
from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.render import _diff
from fxroof.analyzer.report import to_json
from fxroof.analyzer.scenario import Scenario
from render.hostile import hostile
from render.sample import report
from support import ROOT

pytestmark = [pytest.mark.xdist_group("diff"), pytest.mark.usefixtures("unboxed")]

LAYERS = 4
MODEL = (ROOT / "examples" / "mymodel.py").read_text().replace("n_layers: int = 24", f"n_layers: int = {LAYERS}")
SLOWER = MODEL.replace(
    "return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))",
    "return self.down_proj((F.silu(self.gate_proj(x)) * self.up_proj(x)).float().to(x.dtype))",
)
FASTER = MODEL.replace(f"n_layers: int = {LAYERS}", "n_layers: int = 3").replace(
    "KV = tuple", "# a comment\n\nKV = tuple"
)


@pytest.fixture(scope="module")
def reports(tmp_path_factory, unboxed):
    folder = tmp_path_factory.mktemp("models")
    found = {}
    for name, source in (("base", MODEL), ("slower", SLOWER), ("faster", FASTER)):
        (folder / name).mkdir()
        file = folder / name / "mymodel.py"
        file.write_text(source)
        found[name] = analyze(str(file), gpu="b200", scenario=Scenario(input_len=512, output_len=64))
    return found


def test_a_report_against_itself_passes(reports):
    same = diff(reports["base"], reports["base"])
    assert not same.failing
    assert not same.new
    assert not same.gone
    assert not any(phase.modules for phase in same.phases)
    assert {phase.change for phase in same.phases} == {0.0}
    assert _diff.verdict(same) == "passes: no phase takes longer or shorter"


def test_a_slower_change_fails_and_is_explained(reports):
    found = diff(reports["base"], reports["slower"])
    assert {reason.split()[0] for reason in found.failing} == {"prefill.time", "decode.time"}
    assert [(c.finding.code, c.finding.severity.value) for c in found.new] == [("FUS006", "warning")]
    assert not found.gone
    for phase in found.phases:
        # of other modules, only how long they wait for the host may differ
        (moved,) = (m for m in phase.modules if (m.head.bytes, m.head.kernels) != (m.base.bytes, m.base.kernels))
        assert moved.module == "blocks.*.mlp"
        tokens = 512 if phase.phase == "prefill" else 1
        # a cast up and a cast down: 2 bytes read and 4 written, then 4 and 2, of each of 5,632 columns in each layer
        assert moved.head.bytes - moved.base.bytes == LAYERS * tokens * 5632 * 12
        assert moved.head.kernels - moved.base.kernels == 2 * LAYERS
        assert phase.change > 0.02
    text = _diff.markdown(found)
    assert text.startswith("<!-- fxroof -->\n")
    assert "FUS006" in text
    assert "bytes +" in text


def test_fewer_layers_and_moved_lines_are_no_new_findings(reports):
    found = diff(reports["base"], reports["faster"])
    assert not found.failing
    assert not found.new
    assert not found.gone
    assert all(phase.change < -0.1 for phase in found.phases)
    assert all(m.module.startswith(("blocks.*", "")) for phase in found.phases for m in phase.modules)
    assert _diff.verdict(found).startswith("passes: ")


@pytest.mark.parametrize(
    ("limits", "fails"),
    [
        (["decode.tpot=1 s"], False),
        (["decode.tpot=1 ms"], True),
        (["decode.time=+50%"], False),
        (["decode.time=+1%", "memory.total=80 GB"], True),
        (["decode.bytes=+0%"], True),
        (["decode.flops=+0%", "decode.tokens_per_second=10"], False),
        (["decode.tokens_per_second=1000000"], True),
    ],
)
def test_budgets_decide(reports, limits, fails):
    assert bool(diff(reports["base"], reports["slower"], budgets=from_texts(limits)).failing) is fails


@pytest.mark.parametrize(("fail_on", "fails"), [("error", False), ("warning", True), ("info", True), ("never", False)])
def test_new_findings_fail_by_severity(reports, fail_on, fails):
    found = diff(reports["base"], reports["slower"], budgets=from_texts(["coverage=90%"]), fail_on=fail_on)
    assert bool(found.failing) is fails


def test_what_makes_a_comparison_doubtful_is_said():
    base = report()
    run = base.runs[0]
    slower = replace(run, gpu=replace(run.gpu, memory_bandwidth=1e12))
    other = replace(base, torch_version="2.99", runs=(slower, *report(several=True).runs[1:]))
    warnings = " ".join(diff(base, other).warnings)
    assert "torch differs, 2.13.0 and 2.99" in warnings
    assert "the figures of x100 differ" in warnings
    assert "the base has no run on y50_sxm" in warnings
    assert "the head has no run on y50_sxm" in " ".join(diff(other, base).warnings)


def test_a_phase_that_is_lost_fails():
    from render.sample import partial

    assert "decode can no longer be analysed" in " ".join(diff(report(), partial()).failing)
    assert not [r for r in diff(partial(), report()).failing if "no longer" in r]


def test_the_command(reports, tmp_path):
    files = {}
    for name, found in reports.items():
        files[name] = tmp_path / f"{name}.json"
        files[name].write_text(to_json(found))

    def run(*args):
        return CliRunner().invoke(main, ["diff", *map(str, args)])

    assert run(files["base"], files["base"]).exit_code == 0
    slower = run(files["base"], files["slower"])
    assert slower.exit_code == 1
    assert slower.stdout.splitlines()[0].startswith("fails: decode +")
    assert all(len(line) <= 100 for line in slower.stdout.splitlines())
    assert run(files["base"], files["slower"], "--exit-zero").exit_code == 0
    out = tmp_path / "comment.md"
    assert run(files["base"], files["slower"], "-f", "markdown", "-o", out).exit_code == 1
    assert out.read_text().startswith("<!-- fxroof -->")
    assert json.loads(run(files["base"], files["slower"], "-f", "json").stdout)["failing"]
    for args, said in (
        ((files["base"], tmp_path / "none.json"), "cannot be read"),
        ((files["base"], files["base"], "--budget", "decode.tpto=1 ms"), "no figure that a budget can limit"),
        ((files["base"], files["base"], "--budget", "decode.tpot"), "is no budget"),
        ((files["base"], files["base"], "--budget", "decode.tpot=12"), "is not in seconds"),
    ):
        refused = run(*args)
        assert refused.exit_code == 2
        assert said in " ".join(refused.stderr.split())


def test_hostile_names_break_nothing():
    found = diff(report(), hostile())
    text = _diff.markdown(found)
    assert "<script" not in text
    assert "\x1b" not in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in table} <= {4, 6}
