"""JSON goes out and comes back the same, to the byte."""

import pytest
from fxroof.analyzer.errors import ReportFileError
from fxroof.analyzer.pipeline import analyze, reprice
from fxroof.analyzer.report import SCHEMA_VERSION, Report, from_json, to_json
from fxroof.analyzer.review import Selection
from support import SHORT, TARGETS

pytestmark = [pytest.mark.xdist_group("moe"), pytest.mark.usefixtures("unboxed")]


@pytest.fixture(scope="module")
def report(unboxed: None) -> Report:
    return analyze(TARGETS["moe"], gpus=["h100", "m2_ultra"], scenario=SHORT)


def test_round_trip_is_exact(report: Report) -> None:
    text = to_json(report)
    back = from_json(text)
    assert back == report
    assert to_json(back) == text


def test_pricing_a_saved_report_again_is_pricing_it_at_once(report: Report) -> None:
    # these need the model to be traced once more, which a saved report does not hold
    traced_again = Selection(ignore=("KVC002", "WGT003", "WGT004"))
    direct = analyze(TARGETS["moe"], gpus=["mi300x"], scenario=SHORT, selection=traced_again)
    again = reprice(from_json(to_json(report)), gpus=["mi300x"], selection=traced_again)
    assert again.runs == direct.runs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ("{}", "not an fxroof report"),
        ('{"schema_version": 99, "runs": []}', "schema version 99"),
        (f'{{"schema_version": {SCHEMA_VERSION}, "runs": []}}', "damaged report"),
    ],
)
def test_what_is_no_report_is_refused(text: str, message: str) -> None:
    with pytest.raises(ReportFileError, match=message):
        from_json(text, "x.json")


def test_a_truncated_report_is_refused(report: Report) -> None:
    with pytest.raises(ReportFileError):
        from_json(to_json(report)[:-200])
