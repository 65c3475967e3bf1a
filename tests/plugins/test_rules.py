"""Rules that installed packages and files of the user's own bring, through the command line."""

from pathlib import Path
from typing import Any

import pytest
from fxroof.analyzer.review import PLUGINS
from plugins.installed import Installed

MODEL = """
from torch import empty, nn

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

def example_inputs(phase, batch_size, input_len, context_len):
    return (empty(8, 64),) if phase == "forward" else None
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


@pytest.fixture
def place(tmp_path: Path) -> Installed:
    return Installed(tmp_path, PLUGINS, MODEL)


def file(place: Installed, name: str, source: str) -> str:
    path = place.folder / name
    path.write_text(source)
    return str(path)


def codes(run: dict[str, Any]) -> set[str]:
    return {finding["code"] for finding in run["findings"]}


def test_rules_of_packages_and_files_report_like_our_own(place: Installed) -> None:
    place.add("acme_rules", own("ACM001", "acme-relu"))
    mine = file(place, "mine.py", own("OWN001", "my-relu"))
    run = place.run("--rules", mine)
    assert {"ACM001", "OWN001", "LCH001"} <= codes(run)
    (found,) = (f for f in run["findings"] if f["code"] == "OWN001")
    assert (found["module"], found["count"], found["line"]) == ("first, second", 2, 10)
    elsewhere = ("--per-module-ignore", "first=OWN,LCH001", "--per-module-ignore", "*=ACM001")
    (found,) = place.run("--rules", mine, "--select", "acme-relu,OWN", *elsewhere)["findings"]
    assert (found["code"], found["module"]) == ("OWN001", "second")
    assert "A page of ACM001" in place.fxroof("rule", "ACM001").stdout


def test_what_does_not_import_or_raises_is_named_and_the_others_report(place: Installed) -> None:
    place.add("acme_broken", "import nowhere_to_be_found\n")
    place.add("acme_twin", own("LCH001", "launch-bound-too"))
    raises = file(place, "raises.py", own("OWN002", "raises", "yield situation.nothing"))
    absent = str(place.folder / "absent.py")
    run = place.run("--rules", raises, "--rules", absent, "-f", "terminal=shown.txt")
    assert "LCH001" in codes(run)
    told = {failure["code"]: failure["message"] for failure in run["rule_failures"]}
    assert "ModuleNotFoundError" in told["acme_broken = acme_broken"]
    assert "two rules are called LCH001" in told["acme_twin = acme_twin"]
    assert "AttributeError" in told["OWN002"]
    assert "line 10" in told["OWN002"]
    assert "FileNotFoundError" in told[absent]
    shown = (place.folder / "shown.txt").read_text()
    assert "OWN002 in forward could not be run: AttributeError" in " ".join(shown.split())


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
    place: Installed, given: tuple[str, str], said: str
) -> None:
    place.model.write_text("raise RuntimeError('was run')\n")
    done = place.analyze(*given)
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert "was run" not in done.stderr
