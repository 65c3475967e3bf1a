"""The command: exit codes, messages, streams, files. Models are tiny; nothing here depends on the machine's speed."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from fxroof.analyzer import pipeline
from fxroof.analyzer.cli import main
from fxroof.analyzer.report import from_json, fxroof_version, to_json
from render.sample import partial, report

pytestmark = [pytest.mark.xdist_group("cli"), pytest.mark.usefixtures("unboxed")]

MODEL = """
import torch
from torch import nn

print("noise from the model's file")


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x
"""


def fxroof(*args, env=None):
    return CliRunner().invoke(main, [str(a) for a in args], env=env)


def process(*args, stdin=None, **env):
    """The command in a process of its own, its streams being pipes."""
    clean = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "FORCE_COLOR", "COLUMNS", "PYTHONIOENCODING"}}
    command = [sys.executable, "-m", "fxroof.analyzer", *map(str, args)]
    return subprocess.run(command, capture_output=True, env=clean | env, timeout=120, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, unboxed):
    path = tmp_path_factory.mktemp("models")
    (path / "tiny.py").write_text(MODEL)
    return path


@pytest.fixture(scope="module")
def saved(folder):
    """A report of the tiny model on a B200, saved by the command."""
    result = fxroof("analyze", folder / "tiny.py", "--gpu", "b200", "-f", "json", "-o", folder / "b200.json", "-q")
    assert (result.exit_code, result.stdout) == (0, "")
    return folder / "b200.json"


@pytest.fixture
def sample_file(tmp_path):
    path = tmp_path / "sample.json"
    path.write_text(to_json(report(several=True)))
    return path


def test_analyze_prints_the_report_and_nothing_of_the_model_s_own(folder):
    result = fxroof("analyze", folder / "tiny.py", "--gpu", "h100", "--batch-size", "8")
    assert result.exit_code == 0
    assert result.stdout.startswith("model      Tiny")
    assert "layers.*" in result.stdout
    assert "tiny.py:15" in result.stdout
    assert "h100 means h100_sxm" in result.stdout
    assert "noise" not in result.stdout
    assert "noise" in result.stderr


def test_one_trace_is_priced_for_every_gpu(folder):
    result = fxroof("analyze", folder / "tiny.py", "--gpu", "b200", "--gpu", "l4", "--gpu", "b200", "-f", "json")
    found = from_json(result.stdout)
    assert [run.gpu.key for run in found.runs] == ["b200", "l4"]
    assert list(found.graphs) == ["forward"]


def test_pricing_a_saved_report_again_equals_a_direct_analysis(folder, saved):
    again = fxroof("analyze", saved, "--gpu", "h200", "-f", "json")
    direct = fxroof("analyze", folder / "tiny.py", "--gpu", "h200", "-f", "json")
    assert (again.exit_code, direct.exit_code) == (0, 0)
    assert again.stdout == direct.stdout


def test_findings_decide_the_exit_code(sample_file):
    # the sample has a warning, an information, and an error that is suppressed
    for given, code in (
        ((), 0), (("--fail-on", "warning"), 1), (("--fail-on", "info"), 1), (("--fail-on", "error"), 0),
        (("--fail-on", "never"), 0), (("--fail-on", "info", "--exit-zero"), 0),
    ):  # fmt: skip
        assert fxroof("analyze", sample_file, *given).exit_code == code, given


def test_rules_can_be_chosen_when_a_saved_report_is_priced_again(saved):
    def codes(*given):
        (run,) = from_json(fxroof("analyze", saved, "-f", "json", "--fail-on", "never", *given).stdout).runs
        return {finding.code for finding in run.findings}

    everything = codes("--min-saving", "0")
    assert "LCH001" in everything
    assert codes("--select", "launch-bound") == {"LCH001"}
    assert codes("--min-saving", "0", "--ignore", "LCH") == everything - {"LCH001"}
    assert codes("--execution", "compiled", "--select", "LCH001") == set()


def test_the_pages_of_rules():
    listed = fxroof("rule").stdout
    assert all(code in listed for code in ("KVC001", "LCH001", "MEM001", "TRC001", "WGT001", "FUS002"))
    page = fxroof("rule", "kv-cache-reallocated-by-cat").stdout
    assert page.startswith("# KVC001 kv-cache-reallocated-by-cat\n")
    assert page == fxroof("rule", "KVC001").stdout
    (found,) = json.loads(fxroof("rule", "KVC001", "-f", "json").stdout)
    assert found["code"] == "KVC001"
    assert fxroof("rule", "--all").stdout.count("**How it is estimated.**") == len(listed.splitlines()) - 1


def test_a_saved_report_is_shown_as_it_is_without_a_gpu(saved, sample_file):
    assert "━━ b200" in fxroof("analyze", saved).stdout
    assert fxroof("analyze", sample_file, "-f", "json").stdout == sample_file.read_text()


def test_lengths_are_marked_as_given_only_when_they_are(monkeypatch):
    seen = []

    def stub(target, *, scenarios, **_):
        (scenario,) = scenarios
        seen.append((scenario.input_len, scenario.output_len, scenario.lengths_given))
        return report()

    monkeypatch.setattr(pipeline, "analyze", stub)
    for extra in ((), ("--input-len", "2048"), ("--output-len", "9"), ("--batch-size", "2")):
        assert fxroof("analyze", "m.py", "--gpu", "b200", *extra).exit_code == 0
    assert seen == [(2048, 256, False), (2048, 256, True), (2048, 9, True), (2048, 256, False)]


def test_options_reach_the_analysis(monkeypatch):
    seen = {}
    monkeypatch.setattr(pipeline, "analyze", lambda target, **options: seen.update(options) or report())
    given = ("--init", "M(3)", "--input", "x=1x3", "--input", "y=2", "--assume", "balanced-routing")
    limits = ("--trust-remote-code", "--timeout", "7", "--memory-limit", "1.5 GiB", "--debug")
    assert fxroof("analyze", "m.py", "--gpu", "b200", *given, *limits).exit_code == 0
    assert seen["init"] == "M(3)"
    assert seen["inputs"] == ("x=1x3", "y=2")
    assert seen["assume"] == ("balanced-routing",)
    assert seen["trust_remote_code"] is True
    assert (seen["timeout"], seen["memory_limit"], seen["debug"]) == (7, 3 << 29, True)
    assert fxroof("analyze", "m.py", "--gpu", "b200").exit_code == 0
    assert (seen["timeout"], seen["memory_limit"], seen["inputs"]) == (600, None, ())


@pytest.mark.parametrize(
    ("text", "size"), [("16GB", 16 * 10**9), ("512MiB", 512 << 20), ("2g", 2 * 10**9), ("100 K", 10**5), ("0", 0)]
)
def test_sizes_of_memory(monkeypatch, text, size):
    seen = []
    monkeypatch.setattr(pipeline, "analyze", lambda _, *, memory_limit, **__: seen.append(memory_limit) or report())
    assert fxroof("analyze", "m.py", "--gpu", "b200", "--memory-limit", text).exit_code == 0
    assert seen == [size]


@pytest.mark.parametrize("saved_first", [False, True])
def test_a_report_without_all_its_phases_is_shown_and_exits_2(monkeypatch, tmp_path, saved_first):
    file = tmp_path / "partial.json"
    file.write_text(to_json(partial()))
    monkeypatch.setattr(pipeline, "analyze", lambda *_, **__: partial())
    result = fxroof("analyze", file) if saved_first else fxroof("analyze", "m.py", "--gpu", "b200")
    assert result.exit_code == 2
    assert "━━ not analysed" in result.stdout
    assert "prefill · " in result.stdout
    assert "error: decode was not analysed: The model's control flow" in result.stderr
    assert json.loads(fxroof("analyze", file, "-f", "json").stdout)["traces"][0]["failures"][0]["phase"] == "decode"


def test_what_stops_the_box_is_one_message(folder, tmp_path):
    (tmp_path / "slow.py").write_text(MODEL.replace("super().__init__()", "super().__init__()\n        while 1: pass"))
    result = process("analyze", tmp_path / "slow.py", "--gpu", "b200", "--timeout", "2", "-q")
    assert result.returncode == 2
    assert result.stdout == b""
    noise, error, hint = result.stderr.decode().splitlines()
    assert noise == "noise from the model's file"
    assert error.startswith("error: ")
    assert "slow.py:11" in error
    assert hint.startswith("hint: ")


def test_debug_shows_the_traceback_of_the_models_code(folder, tmp_path):
    (tmp_path / "bad.py").write_text("def broken():\n    raise RuntimeError('deep down')\n\nbroken()\n")
    shown = fxroof("analyze", tmp_path / "bad.py", "--gpu", "b200", "--debug").stderr
    assert 'bad.py", line 2, in broken' in shown
    assert "deep down" not in fxroof("analyze", folder / "tiny.py", "--gpu", "b200").stderr


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_ctrl_c_exits_130_and_leaves_no_child(tmp_path):
    note = tmp_path / "pid"
    (tmp_path / "slow.py").write_text(f"import os\nopen({str(note)!r}, 'w').write(str(os.getpid()))\nwhile 1: pass\n")
    command = [sys.executable, "-m", "fxroof.analyzer", "analyze", "slow.py", "--gpu", "b200", "-o", "out.txt"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE) as caller:
        while not (note.exists() and note.read_text()):
            assert caller.poll() is None, caller.stderr.read().decode()
            time.sleep(0.05)
        caller.send_signal(signal.SIGINT)
        complaint = caller.stderr.read().decode()
        assert caller.wait(60) == 130
    assert complaint.splitlines()[-1] == "error: interrupted"
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pid", "slow.py"]


@pytest.mark.parametrize("args", [["--version"], ["--help"], ["-h"], ["analyze", "--help"], ["gpus"], ["gpus", "h100"]])
def test_informative_commands_succeed(args):
    result = fxroof(*args)
    assert result.exit_code == 0
    assert result.stderr == ""


def test_version_and_help():
    assert fxroof("--version").stdout == f"fxroof {fxroof_version()}\n"
    text = fxroof("--help").stdout
    assert text.index("Examples:") < text.index("Options:")
    assert "fxroof analyze mymodel.py --gpu b200" in text
    text = fxroof("analyze", "--help").stdout
    assert text.index("Examples:") < text.index("Options:")
    assert "json|" in text
    assert "|terminal]" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["analyze"], "Missing argument 'TARGET'"),
        (["analyze", "m.py"], "Missing option '--gpu'"),
        (["analyse"], "Did you mean 'analyze'?"),
        (["analyze", "m.py", "--gpus", "b200"], "--gpu"),
        (["analyze", "m.py", "--gpu", "b200", "--batch-size", "0"], "1<=x<="),
        (["analyze", "m.py", "--gpu", "b200", "--input-len", "-5"], "1<=x<="),
        (["analyze", "m.py", "--gpu", "b200", "--output-len", "9" * 40], "1<=x<="),
        (["analyze", "m.py", "--gpu", "b200", "--batch-size", "many"], "not a valid integer"),
        (["analyze", "m.py", "--gpu", "b200", "--dtype", "int3"], "'bf16'"),
        (["analyze", "m.py", "--gpu", "b200", "-f", "pdf"], "is not one of concise, csv"),
        (["analyze", "m.py", "--gpu", "b200", "--top", "0"], "1<=x<="),
        (["analyze", "m.py", "--gpu", "b200", "--tp", "0"], "1<=x<="),
        (["analyze", "m.py", "--gpu", "b200", "--min-saving", "much"], "no share"),
        (["analyze", "m.py", "--gpu", "b200", "--select", "KVC01x"], "KVC01x names no rule"),
        (["rule", "nope"], "nope names no rule"),
        (["analyze", "m.py", "--gpu", "b200", "--timeout", "-1"], "0<=x<="),
        (["analyze", "m.py", "--gpu", "b200", "--memory-limit", "16"], "no size"),
        (["analyze", "m.py", "--gpu", "b200", "--memory-limit", "-1GB"], "no size"),
        (["analyze", "m.py", "--gpu", "b200", "--assume", "luck"], "balanced-routing"),
        (["analyze", "m.py", "--gpu", "b200x"], "did you mean b200"),
        (["analyze", "m.py", "--gpu", "nope.toml"], "nope.toml: no such file"),
        (["analyze", "nosuchfile.py", "--gpu", "b200"], "nosuchfile.py: no such file"),
        (["analyze", "m.py", "--gpu", "b200", "-o", "no/such/folder/x"], "there is no folder"),
        (["gpus", "b2000"], "did you mean b200"),
    ],
)
def test_what_stops_the_analysis_exits_2_with_one_message(args, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    result = fxroof(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("error: ") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("def broken(:\n", "SyntaxError"),
        ("import sys\nsys.exit(0)\n", "sys.exit"),
        ("import sys\nsys.exit(1)\n", "sys.exit"),
        ("raise RuntimeError('[red]boom[/red]')\n", "[red]boom[/red]"),
        ("x = 1\n", "no model found"),
    ],
)
def test_a_file_that_gives_no_model_exits_2(content, message, tmp_path):
    (tmp_path / "bad.py").write_text(content)
    result = fxroof("analyze", tmp_path / "bad.py", "--gpu", "b200", "-o", tmp_path / "out.txt")
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out.txt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 99, "runs": []}', "schema version 99"),
        ('{"schema_version": 4, "runs": []}', "damaged report"),
        ('{"schema_version": 1}', "of an older fxroof"),
    ],
)
def test_a_saved_report_that_cannot_be_used_exits_2(content, message, tmp_path):
    (tmp_path / "old.json").write_text(content)
    result = fxroof("analyze", tmp_path / "old.json", "--gpu", "b200")
    assert result.exit_code == 2
    assert message in result.stderr


def test_options_that_need_the_model_are_refused_for_a_saved_report(sample_file):
    result = fxroof("analyze", sample_file, "--gpu", "b200", "--batch-size", "4", "--input", "x=3")
    assert result.exit_code == 2
    assert "--batch-size and --input cannot change" in result.stderr


def test_an_unexpected_failure_exits_2_and_asks_for_a_report(monkeypatch):
    def fail(*_, **__):
        raise KeyError("[bold]surprise[/bold]")

    monkeypatch.setattr(pipeline, "analyze", fail)
    result = fxroof("analyze", "m.py", "--gpu", "b200")
    assert result.exit_code == 2
    assert "internal error: KeyError: '[bold]surprise[/bold]'" in result.stderr
    assert "--debug" in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in fxroof("analyze", "m.py", "--gpu", "b200", "--debug").stderr


def test_interruption_exits_130(monkeypatch, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "analyze", interrupt)
    result = fxroof("analyze", "m.py", "--gpu", "b200", "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_progress_comes_after_a_second_and_on_stderr_only(monkeypatch):
    def slow(*_, progress, **__):
        progress("at once")
        time.sleep(1.3)
        progress("later")
        return report()

    monkeypatch.setattr(pipeline, "analyze", slow)
    result = fxroof("analyze", "m.py", "--gpu", "b200")
    assert result.stderr.splitlines() == ["fxroof: at once", "fxroof: later"]
    assert "fxroof: later" not in result.stdout
    assert fxroof("analyze", "m.py", "--gpu", "b200", "-q").stderr == ""


def test_no_progress_when_it_is_quick(monkeypatch):
    def quick(*_, progress, **__):
        progress("done")
        return report()

    monkeypatch.setattr(pipeline, "analyze", quick)
    assert fxroof("analyze", "m.py", "--gpu", "b200").stderr == ""


def test_output_goes_to_the_file_and_nowhere_else(sample_file, tmp_path):
    target = tmp_path / "out.txt"
    assert fxroof("analyze", sample_file, "-o", target).output == ""
    assert target.read_text() == fxroof("analyze", sample_file).stdout
    assert fxroof("analyze", sample_file, "-o", "-").stdout == target.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "sample.json"]


def test_a_failed_write_leaves_what_was_there(sample_file, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    target = tmp_path / "out.txt"
    target.write_text("before")
    monkeypatch.setattr(os, "fsync", full)
    result = fxroof("analyze", sample_file, "-o", target)
    assert result.exit_code == 2
    assert "No space left on device" in result.stderr
    assert target.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.txt", "sample.json"]


def test_a_folder_as_output_is_refused_before_the_analysis(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "analyze", lambda *_, **__: pytest.fail("the analysis ran"))
    assert fxroof("analyze", "m.py", "--gpu", "b200", "-o", tmp_path).exit_code == 2


def test_links_and_devices_survive_as_outputs(sample_file, tmp_path):
    real, link = tmp_path / "real.txt", tmp_path / "link.txt"
    link.symlink_to(real)
    assert fxroof("analyze", sample_file, "-o", link).exit_code == 0
    assert link.is_symlink()
    assert real.read_text().startswith("model")
    if Path("/dev/null").is_char_device():
        assert fxroof("analyze", sample_file, "-o", "/dev/null").exit_code == 0
        assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_by_top_and_format_apply_to_saved_reports(sample_file):
    assert "5 operators" not in fxroof("analyze", sample_file).stdout
    assert "2 operators" in fxroof("analyze", sample_file, "--by", "module").stdout
    assert " other ops" in fxroof("analyze", sample_file, "--top", "2").stdout
    assert json.loads(fxroof("analyze", sample_file, "-f", "json").stdout)["schema_version"] == 4


def test_several_formats_at_once_each_with_its_file(sample_file, tmp_path):
    page, log = tmp_path / "page.md", tmp_path / "log.sarif"
    shown = fxroof(
        "analyze", sample_file, "-f", f"markdown={page}", "-f", "concise", "-f", f"sarif={log}", "--exit-zero"
    )
    assert shown.exit_code == 0
    assert page.read_text().startswith("<!-- fxroof -->")
    assert json.loads(log.read_text())["version"] == "2.1.0"
    assert shown.stdout.splitlines()[-1].startswith(("no findings", "1 finding", "2 findings"))
    for given, said in (
        (("-f", "sarif="), "names no file"),
        (("-f", "json", "-f", "csv", "-o", tmp_path / "x"), "Two formats for"),
        (("-f", f"json={tmp_path / 'none' / 'x'}"), "there is no folder"),
    ):
        refused = fxroof("analyze", sample_file, *given)
        assert refused.exit_code == 2
        assert said in " ".join(refused.stderr.split())


def test_completion_of_gpu_names():
    result = process(_FXROOF_COMPLETE="bash_complete", COMP_WORDS="fxroof gpus h100", COMP_CWORD="2")
    assert b"h100_sxm" in result.stdout


@pytest.mark.parametrize("args", [["--help"], ["--version"], ["analyze", "--help"], ["gpus"], ["gpus", "b200"]])
def test_no_torch_for_what_traces_nothing(args):
    assert "torch" not in modules_after(args)


def test_no_torch_for_a_saved_report(saved):
    assert "torch" not in modules_after(["analyze", str(saved), "--gpu", "h200"])


def test_importing_the_command_imports_little():
    assert not {"torch", "rich", "msgspec", "networkx"} & modules_after(None)


def modules_after(args):
    code = (
        "import sys\nfrom fxroof.analyzer.cli import main\n"
        f"args = {args!r}\n"
        "try:\n    args is None or main(args)\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print('\\nMODULES', *{name.partition('.')[0] for name in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    return set(done.stdout.rpartition("MODULES")[2].split())


def test_piped_output_is_plain_and_100_columns(sample_file):
    page = process("analyze", sample_file).stdout.decode()
    assert "\x1b" not in page
    assert max(map(len, page.splitlines())) == 100
    assert max(map(len, process("analyze", sample_file, COLUMNS="150").stdout.decode().splitlines())) == 150


def test_colour_follows_the_environment(sample_file):
    assert b"\x1b[" in process("analyze", sample_file, FORCE_COLOR="1").stdout
    assert b"\x1b" not in process("analyze", sample_file, FORCE_COLOR="1", NO_COLOR="1").stdout
    assert b"\x1b" not in process("gpus", "nope", NO_COLOR="1", FORCE_COLOR="1").stderr


def test_ascii_streams_get_ascii(sample_file):
    result = process("analyze", sample_file, PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert result.stdout.isascii()


def test_a_closed_pipe_is_no_error(sample_file):
    command = [sys.executable, "-m", "fxroof.analyzer", "analyze", str(sample_file), "-f", "json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        child.stdout.read(10)
        child.stdout.close()
        complaint = child.stderr.read()
        assert child.wait(timeout=60) == 0
    assert complaint == b""
