"""Rules that installed packages and files of the user's own bring, through the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fxroof.analyzer.review import PLUGINS

MODEL = """
from torch import nn

class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(64, 64)

    def forward(self, x):
        return self.up(x).relu()

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Inner(), Inner()

    def forward(self, x):
        return self.second(self.first(x))
"""

RULE = '''
"""A page of {code}."""

from fxroof.analyzer.finding import Match, Remedy, Severity, rule

@rule("{code}", "{name}", severity=Severity.WARNING)
def check(situation):
    for index, op in enumerate(situation.graph.ops):
        if op.target == "aten.relu.default":
            {body}
'''
FINDS = 'yield Match(op=index, message="a relu", remedy=Remedy(text="none"), always=True)'


def own(code: str, name: str, body: str = FINDS) -> str:
    return RULE.format(code=code, name=name, body=body)


class Place:
    """A folder with a model, installed packages beside it, and files of rules."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.site, self.model = folder, folder / "site", folder / "model.py"
        self.site.mkdir()
        self.model.write_text(MODEL)

    def install(self, package: str, source: str) -> None:
        (self.site / f"{package}.py").write_text(source)
        info = self.site / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{PLUGINS}]\n{package} = {package}\n")

    def file(self, name: str, source: str) -> str:
        path = self.folder / name
        path.write_text(source)
        return str(path)

    def fxroof(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "fxroof.analyzer", *args],
            capture_output=True,
            text=True,
            check=False,
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.site)},
        )

    def run(self, *args: str) -> dict[str, Any]:
        done = self.fxroof("analyze", str(self.model), "--gpu", "h100", "--input", "x=8x64", "-f", "json", *args)
        assert done.returncode == 0, done.stderr
        run: dict[str, Any] = json.loads(done.stdout)["runs"][0]
        return run


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def codes(run: dict[str, Any]) -> set[str]:
    return {finding["code"] for finding in run["findings"]}


def test_rules_of_packages_and_files_report_like_our_own(place: Place) -> None:
    place.install("acme_rules", own("ACM001", "acme-relu"))
    mine = place.file("mine.py", own("OWN001", "my-relu"))
    run = place.run("--rules", mine)
    assert {"ACM001", "OWN001", "LCH001"} <= codes(run)
    (found,) = (f for f in run["findings"] if f["code"] == "OWN001")
    assert (found["module"], found["count"], found["line"]) == ("first, second", 2, 10)
    assert codes(place.run("--rules", mine, "--select", "acme-relu,OWN")) == {"ACM001", "OWN001"}
    assert codes(place.run("--rules", mine, "--select", "OWN", "--per-module-ignore", "first=OWN,LCH001")) == {"OWN001"}
    assert not codes(place.run("--rules", mine, "--select", "OWN", "--per-module-ignore", "*=OWN001"))
    assert "A page of ACM001" in place.fxroof("rule", "ACM001").stdout


def test_what_does_not_import_or_raises_is_named_and_the_others_report(place: Place) -> None:
    place.install("acme_broken", "import nowhere_to_be_found\n")
    place.install("acme_twin", own("LCH001", "launch-bound-too"))
    raises = place.file("raises.py", own("OWN002", "raises", "yield situation.nothing"))
    absent = str(place.folder / "absent.py")
    run = place.run("--rules", raises, "--rules", absent)
    assert "LCH001" in codes(run)
    told = {failure["code"]: failure["message"] for failure in run["rule_failures"]}
    assert "ModuleNotFoundError" in told["acme_broken = acme_broken"]
    assert "two rules are called LCH001" in told["acme_twin = acme_twin"]
    assert "AttributeError" in told["OWN002"]
    assert "line 10" in told["OWN002"]
    assert "FileNotFoundError" in told[absent]
    shown = place.fxroof("analyze", str(place.model), "--gpu", "h100", "--input", "x=8x64", "--rules", raises)
    assert "OWN002 in forward could not be run: AttributeError" in " ".join(shown.stdout.split())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--select", "NOPE"), "NOPE names no rule"),
        (("--select", "ATT001,,"), "names a rule too few"),
        (("--per-module-ignore", "first"), "is not MODULE=RULES"),
        (("--per-module-ignore", "first=NOPE"), "NOPE names no rule"),
    ],
)
def test_rules_that_do_not_exist_are_refused_before_anything_runs(
    place: Place, given: tuple[str, str], said: str
) -> None:
    place.model.write_text("raise RuntimeError('was run')\n")
    done = place.fxroof("analyze", str(place.model), "--gpu", "h100", *given)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert "was run" not in done.stderr
