"""The engine: folding, thresholds, selection, rules that fail, alternatives and the waterfall."""

import dataclasses
from itertools import pairwise

import pytest
from findings.situations import situation
from fxroof.analyzer import finding as registry
from fxroof.analyzer.finding import Match, Remedy, Rule, Severity
from fxroof.analyzer.review import RuleSelectionError, Selection, folded, load_rules, review, selected
from support import traced

REMEDY = Remedy(text="do it well")
pytestmark = pytest.mark.xdist_group("mymodel")  # one worker traces it


def rule(check, code="TST001", severity=Severity.WARNING) -> Rule:
    return Rule(code=code, name=code.lower(), severity=severity, check=check, doc="A page.", origin="tests")


@pytest.fixture(scope="module")
def decode():
    return situation(traced("mymodel").graphs["decode"])


@pytest.fixture(scope="module")
def real(decode):
    return review({"decode": decode}, load_rules()[0], least_saving=0.0)


def linears(situation):
    return [i for i, op in enumerate(situation.graph.ops) if op.target == "aten.linear.default"]


def test_layers_are_folded_into_one_finding_a_line(decode):
    found = review(
        {"decode": decode},
        [
            rule(
                lambda s: (
                    Match(op=i, message="slow", remedy=REMEDY, evidence={"n": 1}, always=True) for i in linears(s)
                )
            )
        ],
    ).findings
    assert len({(f.file, f.line) for f in found}) == len(found)
    assert sum(f.count for f in found) == len(linears(decode))
    assert all(f.evidence["n"] == f.count for f in found)
    assert "blocks.*.attn.q_proj" in {f.module for f in found}


def test_paths_fold_over_the_numbers_that_differ():
    assert folded(["a.0.b.1", "a.1.b.1"]) == "a.*.b.1"
    assert folded(["a.0.up", "a.0.down", "a.1.up"]) == "a.*.up, a.0.down"


def test_what_saves_too_little_is_left_out_unless_it_is_always_reported(decode):
    estimate = decode.analysis.seconds.estimate

    def saves(share, *, always=False):
        match = Match(op=None, message="slow", remedy=REMEDY, saving=(0.0, share * estimate), always=always)
        return review({"decode": decode}, [rule(lambda _: [match])]).findings

    assert not saves(0.009)
    assert saves(0.011)[0].saving_seconds["decode"] == pytest.approx(0.011 * estimate)
    assert saves(0.0, always=True)


def test_a_saving_in_the_bound_alone_counts_unless_the_estimate_gets_noticeably_longer(decode):
    times = decode.analysis.seconds

    def reported(bound, estimate, least=0.01):
        saving = (bound * times.bound, estimate * times.estimate)
        match = Match(op=None, message="slow", remedy=REMEDY, saving=saving)
        return bool(review({"decode": decode}, [rule(lambda _: [match])], least_saving=least).findings)

    assert reported(0.1, 0.0)
    assert reported(0.1, -0.009)
    assert not reported(0.1, -0.07)
    assert not reported(0.009, -0.009)
    assert reported(-0.1, 0.02)  # a remedy may take work off the host and give it to the GPU
    # what is asked of a saving says nothing of what a loss may be
    assert not reported(0.3, -0.07, least=0.2)
    assert reported(0.1, -0.001, least=0.0)
    assert not reported(0.1, -0.07, least=0.0)


def test_a_negative_saving_is_shown_as_it_is(decode):
    match = Match(op=None, message="slow", remedy=REMEDY, saving=(0.0, -1.0), always=True)
    assert review({"decode": decode}, [rule(lambda _: [match])]).findings[0].saving_seconds == {"decode": -1.0}


def test_a_rule_that_raises_is_named_and_the_others_report(decode):
    def broken(_):
        raise KeyError("mask")

    fine = rule(lambda _: [Match(op=None, message="slow", remedy=REMEDY, always=True)], code="TST002")
    found = review({"decode": decode}, [rule(broken), fine])
    assert [f.code for f in found.findings] == ["TST002"]
    assert [(f.code, f.phase) for f in found.failures] == [("TST001", "decode")]
    assert "KeyError: 'mask'" in found.failures[0].message


def test_the_waterfall_goes_down_to_the_floor_and_counts_nothing_twice(real, decode):
    steps = real.waterfall["decode"]
    assert steps[0].bound == decode.analysis.seconds.bound
    assert steps[0].estimate == decode.analysis.seconds.estimate
    bounds = [step.bound for step in steps]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(bounds))
    assert steps[-1].code == "floor"
    assert steps[-1].bound <= decode.analysis.seconds.floor * (1 + 1e-9)
    twice = review({"decode": decode}, [r for r in load_rules()[0] for _ in range(2)], least_saving=0.0)
    assert twice.waterfall["decode"][-2].bound == pytest.approx(steps[-2].bound)


def test_alternatives_are_listed_and_not_added(real):
    weights = [f for f in real.findings if f.code == "WGT001"]
    assert weights
    assert all(f.alternatives for f in weights)
    used = [step for step in real.waterfall["decode"] if step.code == "WGT001"]
    assert len(used) == len(weights)


def test_selection_by_code_beginning_and_name():
    rules = load_rules()[0]
    codes = [r.code for r in rules]
    assert [r.code for r in selected(rules, Selection(select=("KVC001",)))] == ["KVC001"]
    assert {r.code for r in selected(rules, Selection(select=("kvc",), extend=("launch-bound",)))} == {
        "KVC002",
        "KVC003",
        "KVC001",
        "LCH001",
    }
    assert [r.code for r in selected(rules, Selection(ignore=("W", "TRC001")))] == [
        c for c in codes if not c.startswith("W") and c != "TRC001"
    ]
    with pytest.raises(RuleSelectionError, match="KVC01x names no rule") as caught:
        selected(rules, Selection(select=("KVC01x",)))
    assert "KVC001" in caught.value.hint


def test_rules_of_a_file_are_run_and_one_that_does_not_import_is_named(tmp_path, decode):
    good, bad = tmp_path / "mine.py", tmp_path / "broken.py"
    good.write_text(
        '"""A page."""\n'
        "from fxroof.analyzer.finding import Match, Remedy, Severity, rule\n"
        '@rule("OWN001", "my-own-rule", severity=Severity.INFO)\n'
        "def check(situation):\n"
        '    yield Match(op=0, message="mine", remedy=Remedy(text="so"), always=True)\n'
    )
    bad.write_text("import nowhere_to_be_found\n")
    try:
        rules, failures = load_rules((str(good), str(bad)))
        assert "OWN001" in {r.code for r in rules}
        assert [f.code for f in failures] == [str(bad)]
        assert "ModuleNotFoundError" in failures[0].message
        chosen = selected(rules, Selection(select=("OWN",)))
        assert [f.message for f in review({"decode": decode}, chosen).findings] == ["mine"]
    finally:
        registry._rules.pop("OWN001", None)


def test_every_rule_has_a_page_with_its_parts():
    for found in load_rules()[0]:
        if found.origin.startswith("fxroof.rules"):
            for part in (
                "What it checks",
                "Why it costs",
                "How it is estimated",
                "Remedy",
                "When to ignore",
                "References",
            ):
                assert f"**{part}" in found.doc, (found.code, part)
            assert found.origin.rpartition(".")[2].replace("_", "-") == found.name


def test_a_phase_is_compared_in_the_execution_asked_for(decode):
    compiled = situation(decode.graph, execution="compiled")
    found = review({"decode": compiled}, load_rules()[0], least_saving=0.0)
    assert found.waterfall["decode"][0].bound == compiled.analysis.executions.compiled.bound
    assert not [f for f in found.findings if f.code == "LCH001"]
    assert dataclasses.asdict(found.waterfall["decode"][-1])["estimate"] is None
