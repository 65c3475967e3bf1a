"""The command line with settings: what it takes from them, what wins, what fails, and what `fxroof init` writes."""

import json
import re

import pytest
from click.testing import CliRunner
from fxroof.analyzer.cli import main
from fxroof.analyzer.config import read
from fxroof.analyzer.report import read_report, to_json
from fxroof.analyzer.starter import model_files
from render.sample import report
from support import ROOT

pytestmark = [pytest.mark.xdist_group("settings"), pytest.mark.usefixtures("unboxed")]

MODEL = (ROOT / "examples" / "mymodel.py").read_text().replace("n_layers: int = 24", "n_layers: int = 2")
TINY = """
import torch
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return torch.relu(self.layer(x))
"""
SETTINGS = """
targets = ["mymodel.py", "tiny.py"]
gpus = ["b200", "h100"]
select = ["KVC001", "FUS"]

[[scenarios]]
name = "chat"
input-len = 256
output-len = 32

[[scenarios]]
name = "batch"
batch-size = 4
input-len = 128
budgets.decode.tpot = "1 us"

[budgets]
memory.total = "80 GB"
forward.time = { limit = "1 s", gpu = "h100" }
"""


def fxroof(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("project")
    (path / "mymodel.py").write_text(MODEL)
    (path / "tiny.py").write_text(TINY)
    (path / "fxroof.toml").write_text(SETTINGS)
    return path


@pytest.fixture(scope="module")
def analysed(folder, unboxed):
    """`fxroof analyze` alone, in the folder of the settings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = fxroof("analyze", "-q", "-f", "json=report.json", "-f", "terminal", "-f", "concise=concise.txt")
    return result, read_report(folder / "report.json")


def test_all_targets_scenarios_and_gpus_are_in_one_report(analysed):
    _, found = analysed
    assert [(t.model.source, t.scenario.name, t.scenario.batch_size, t.scenario.input_len) for t in found.traces] == [
        ("mymodel.py", "chat", 1, 256),
        ("mymodel.py", "batch", 4, 128),
        ("tiny.py", "chat", 1, 256),
        ("tiny.py", "batch", 4, 128),
    ]
    assert [found.title(run) for run in found.runs] == [
        f"{model} {scenario} {gpu}"
        for model in ("GPT", "Tiny")
        for scenario in ("chat", "batch")
        for gpu in ("b200", "h100_sxm")
    ]
    assert {finding.code[:3] for run in found.runs for finding in run.findings} <= {"KVC", "FUS"}
    assert len({traced.scenario.output_len for traced in found.traces}) == 2  # 32, and the command line's default


def test_what_one_scenario_gives_is_what_it_gives_alone(analysed, folder, monkeypatch):
    monkeypatch.chdir(folder)
    _, found = analysed
    done = fxroof(
        *("analyze", "mymodel.py", "--isolated", "--gpu", "h100", "--select", "KVC001,FUS"),
        *("--batch-size", 4, "--input-len", 128, "-q", "-f", "json=alone.json"),
    )
    assert done.exit_code == 0
    (alone,) = read_report(folder / "alone.json").runs
    beside = next(run for run in found.runs if found.title(run) == "GPT batch h100_sxm")
    assert [phase.seconds for phase in alone.phases] == [phase.seconds for phase in beside.phases]
    assert [f.code for f in alone.findings] == [f.code for f in beside.findings]


def test_budgets_are_judged_shown_and_end_with_1(analysed, folder):
    result, found = analysed
    assert result.exit_code == 1
    broken = {(v.run, v.budget.metric) for v in found.verdicts if v.kept is False}
    assert broken == {("GPT batch b200", "decode.tpot"), ("GPT batch h100_sxm", "decode.tpot")}
    kept = {v.run for v in found.verdicts if v.kept and v.budget.metric == "forward.time"}
    assert kept == {"Tiny chat h100_sxm", "Tiny batch h100_sxm"}
    assert len(re.findall(r"GPT batch \w+ +decode\.tpot .* broken", result.stdout)) == 2
    assert len(re.findall(r"error: budget: GPT batch \w+: decode\.tpot is", (folder / "concise.txt").read_text())) == 2


def test_the_command_line_wins(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = fxroof(
        *("analyze", "mymodel.py", "--scenario", "batch", "--gpu", "h200", "--batch-size", 2, "-q"),
        *("--budget", "decode.tpot=1 s", "-f", "json=won.json", "--select", "ATT001"),
    )
    assert done.exit_code == 0
    found = read_report(folder / "won.json")
    (run,) = found.runs
    assert (run.gpu.key, run.scenario.name, run.scenario.batch_size, run.scenario.input_len) == (
        "h200_sxm", "batch", 2, 128,
    )  # fmt: skip
    assert [v.budget.metric for v in found.verdicts] == ["decode.tpot"]
    assert {finding.code for finding in run.findings} == {"ATT001"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scenario", "rag"], "There is no scenario 'rag'. Known: chat, batch."),
        (["--isolated"], "Missing argument 'TARGET'"),
        (["--isolated", "--config", "fxroof.toml"], "give one of them"),
        (["--config", "nothing.toml"], "cannot be read"),
        (["mymodel.py", "--budget", "decode.tpot"], "is no budget"),
        (["mymodel.py", "saved.json"], "give it alone"),
        (["saved.json", "--scenario", "chat"], "cannot change saved.json"),
    ],
)
def test_what_cannot_be_is_told(folder, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    (folder / "saved.json").write_text(to_json(report()))
    result = fxroof("analyze", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.stderr


def test_settings_that_are_wrong_stop_every_command_but_help(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fxroof.toml").write_text("\ngpu = ['h100']\n")
    for command in ("analyze", "diff"):
        result = fxroof(command, "a.json", "b.json")
        assert result.exit_code == 2
        assert "fxroof.toml:2: gpu is not known." in result.stderr
        assert "Did you mean gpus?" in result.stderr
        assert fxroof(command, "--help").exit_code == 0


def test_a_saved_report_is_judged_by_the_settings_and_not_priced_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved.json").write_text(to_json(report()))
    (tmp_path / "fxroof.toml").write_text("gpus = ['h100']\nfail-on = 'never'\n[budgets]\ndecode.time = '1 ns'\n")
    result = fxroof("analyze", "saved.json", "-f", "json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert [run["gpu"]["key"] for run in found["runs"]] == [run.gpu.key for run in report().runs]
    assert {verdict["kept"] for verdict in found["verdicts"]} == {False}
    assert fxroof("analyze", "saved.json", "-f", "concise", "--exit-zero").exit_code == 0


def test_init_writes_settings_that_work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.py").write_text(MODEL)
    (tmp_path / "helpers.py").write_text("class Module: ...\n")
    result = fxroof("init", "--gpu", "b200", "--gpu", "a100", "-q")
    assert (result.exit_code, result.stdout) == (0, "")
    found = read(tmp_path / "fxroof.toml")
    assert found.settings.targets == ("model/mine.py",)
    assert found.settings.gpus == ("b200", "a100_sxm_80gb")
    assert {"decode.tpot", "prefill.ttft", "memory.total", "coverage"} == {b.metric for b in found.budgets}
    done = fxroof("analyze", "-q", "-f", "json=report.json", "--fail-on", "never")
    assert done.exit_code == 0
    verdicts = read_report(tmp_path / "report.json").verdicts
    assert {v.budget.text for v in verdicts if v.kept is None} == {"+2%"}  # waiting for a base
    judged = [verdict for verdict in verdicts if verdict.kept is not None]
    assert len(judged) == 8
    for verdict in judged:
        assert verdict.kept
        if verdict.unit == "seconds":
            assert 1.1 <= verdict.limit / verdict.value <= 1.22  # rounded up to two digits
    again = fxroof("init", "model/mine.py")
    assert again.exit_code == 2
    assert "--force" in again.stderr


def test_init_does_not_guess_between_files_and_writes_nothing_where_it_fails(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder)
    assert [file.name for file in model_files(folder)] == ["mymodel.py", "tiny.py"]
    result = fxroof("init", "-o", tmp_path / "new.toml")
    assert result.exit_code == 2
    assert "mymodel.py, tiny.py" in result.stderr
    assert fxroof("init", "nothing.py", "-o", tmp_path / "new.toml").exit_code == 2
    assert not list(tmp_path.iterdir())


def test_a_target_that_fails_stops_the_others(folder, monkeypatch):
    # a report of the rest would let a comparison pass whose head has lost a target
    monkeypatch.chdir(folder)
    (folder / "broken.py").write_text("1 / 0\n")
    done = fxroof("analyze", "tiny.py", "broken.py", "--isolated", "--gpu", "b200", "-o", "out.txt", "-q")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "ZeroDivisionError" in done.stderr
    assert not (folder / "out.txt").exists()
