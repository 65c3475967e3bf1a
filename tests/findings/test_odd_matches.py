"""What rules of others may say: no number, no op, no text. The rest of the report is as it would be without them."""

import math

import pytest
from findings.situations import situation
from fxroof.analyzer.finding import Match, Remedy, Rule, Severity
from fxroof.analyzer.graph import Graph, Op, Role, Storage, Tensor, TensorRef
from fxroof.analyzer.review import folded, review

pytestmark = pytest.mark.xdist_group("odd")

REMEDY = Remedy(text="do it well")


@pytest.fixture(scope="module")
def decode():
    storages = tuple(Storage(nbytes=2048, role=role, name=role.value) for role in (Role.INPUT, Role.OUTPUT))
    tensors = tuple(Tensor(storage=i, dtype="bfloat16", shape=(1024,), stride=(1,)) for i in range(2))
    op = Op(name="relu", target="aten.relu.default", args={"self": TensorRef(tensor=0)}, outputs=(1,))
    return situation(
        Graph(phase="decode", tokens=1, storages=storages, tensors=tensors, ops=(op,), inputs=(0,), outputs=(1,))
    )


def reviewed(decode, **match):
    def rule(code, *matches):
        return Rule(
            code=code, name=code.lower(), severity=Severity.INFO, check=lambda _: matches, doc="A page.", origin="tests"
        )

    odd = Match(**{"op": None, "message": "odd", "remedy": REMEDY, "always": True} | match)
    good = Match(op=0, message="slow", remedy=REMEDY, always=True)
    return review({"decode": decode}, [rule("ODD001", odd), rule("TST001", good)])


@pytest.mark.parametrize(
    "match",
    [
        {"op": 1},
        {"op": -1},
        {"op": 10**30},
        {"saving": (math.nan, 0.0)},
        {"saving": (0.0, math.inf)},
        {"alternatives": {"other": (-math.inf, 0.0)}},
        {"saving": (0.0, 10**400)},
    ],
)
def test_a_match_that_can_be_no_finding_fails_its_rule_alone(decode, match):
    found = reviewed(decode, **match)
    assert [finding.code for finding in found.findings] == ["TST001"]
    assert [failure.code for failure in found.failures] == ["ODD001"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [(math.inf, "inf"), (math.nan, "nan"), (None, "None"), ([1], "[1]"), (10**320, str(10**320)), (7, 7), ("a", "a")],
)
def test_evidence_that_reports_cannot_hold_becomes_text(decode, value, shown):
    found = reviewed(decode, evidence={"n": value})
    assert {finding.code: finding.evidence for finding in found.findings}["ODD001"] == {"n": shown}
    assert not found.failures


def test_paths_with_stars_of_their_own_fold_by_themselves():
    assert folded(["a.*", "a.1", "a.2"]) == "a.*, a.*"
