"""`fxroof measure` and `fxroof calibrate` as commands: files, exit codes, messages."""

import json
import tomllib

import pytest
from click.testing import CliRunner
from fxroof.analyzer import calibrate
from fxroof.analyzer.cli import main
from fxroof.hardware.catalog import load

PART = """
name = "a CPU that never was"
vendor = "cpu"
collected = "2026-11-21"
confidence = "low"
memory_bandwidth_gb_per_s = 5000.0
tensor_fp32_tflops = 100.0
vector_fp32_tflops = 100.0

[sources.guess]
kind = "measured"
title = "a guess"
keys = ["memory_bandwidth_gb_per_s", "tensor_fp32_tflops", "vector_fp32_tflops"]
"""
MODEL = """
from torch import nn

class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 64)

    def forward(self, x):
        return self.layer(x).relu()
"""


def fxroof(*args):
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "tiny.py").write_text(MODEL)
    (tmp_path / "part.toml").write_text(PART)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_model_is_measured_into_a_file(folder):
    done = fxroof(
        *("measure", "tiny.py", "--gpu", "./part.toml", "--device", "cpu", "--input", "x=4x64", "--runs", 3, "-q"),
        *("-f", "json", "-o", "measured.json"),
    )
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    found = json.loads((folder / "measured.json").read_text())
    assert found["gpu"]["name"] == "a CPU that never was"
    (phase,) = found["phases"]
    assert [call["target"] for call in phase["calls"]] == ["aten.linear.default", "aten.relu.default"]


def test_a_scenario_of_the_settings_is_measured(folder):
    (folder / "fxroof.toml").write_text('[[scenarios]]\nname = "a"\n[[scenarios]]\nname = "b"\nbatch-size = 3\n')
    done = fxroof(
        *("measure", "tiny.py", "--gpu", "./part.toml", "--device", "cpu", "--input", "x=4x64", "--runs", 3, "-q"),
        *("--scenario", "b", "--no-kernels", "-f", "json"),
    )
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["scenario"]["batch_size"] == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["measure", "nothing.py"], "nothing.py: no such file"),
        (["measure", "tiny.py", "--scenario", "chat"], "There is no scenario 'chat'"),
        (["measure", "tiny.py", "--gpu", "none.toml"], "none.toml"),
        (["measure", "tiny.py", "--device", "cuda:99"], "cuda:99"),
        (["measure", "tiny.py", "-o", "none/out.json"], "there is no folder"),
        (["calibrate", "--device", "abacus"], "'abacus' is no device"),
        (["calibrate", "-o", "none/out.toml"], "there is no folder"),
    ],
)
def test_what_cannot_be_is_one_message(folder, arguments, said):
    done = fxroof(*arguments, "-q")
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["part.toml", "tiny.py"]


def test_calibrate_writes_a_part_that_gpu_takes(folder, monkeypatch):
    # a hundredth of the time that --quick takes: how exact it is does not matter here
    monkeypatch.setattr(calibrate, "QUICK", calibrate.Depth(seconds=0.005, largest=1 << 22, step=4.0, sides=(64, 128)))
    done = fxroof("calibrate", "--device", "cpu", "--threads", 1, "--quick", "-q", "-o", "mine.toml")
    assert (done.exit_code, done.stdout) == (0, ""), done.stderr
    assert tomllib.loads((folder / "mine.toml").read_text())["memory_bandwidth_gb_per_s"] > 0
    assert load("mine.toml").gpu.memory_bandwidth > 0
