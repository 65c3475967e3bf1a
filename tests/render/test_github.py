"""Workflow commands, read back as GitHub's runner reads them."""

import re
from dataclasses import replace

from fxroof.analyzer.finding import Severity
from fxroof.analyzer.render.registry import Options, render
from render.hostile import TEXT, hostile
from render.sample import partial, report, retraced


def shown(given):
    return render(given, "github", Options())


def commands(text):
    """As the runner does: `::name key=value,...::data`, properties and data each with their own escapes."""
    found = []
    for line in text.splitlines():
        match = re.fullmatch(r"::(\w+) ([^:]*)::(.*)", line)
        assert match, line
        properties = {}
        for part in match[2].split(","):
            key, _, value = part.partition("=")
            properties[key] = unescaped(value, {"%0D": "\r", "%0A": "\n", "%3A": ":", "%2C": ",", "%25": "%"})
        found.append((match[1], properties, unescaped(match[3], {"%0D": "\r", "%0A": "\n", "%25": "%"})))
    return found


def unescaped(text, escapes):
    assert not re.search("%(?!0D|0A|3A|2C|25)", text)
    for known, meant in escapes.items():  # in the order of the runner: the percent sign last
        text = text.replace(known, meant)
    return text


def with_findings(*severities):
    original = report()
    first = original.runs[0].findings[0]
    found = tuple(
        replace(first, severity=severity, line=i + 1, saving_seconds={"decode": i * 1e-6})
        for i, severity in enumerate(severities)
    )
    run = replace(original.runs[0], findings=found, rule_failures=())
    return replace(original, runs=(run,))


def test_one_gpu(golden):
    golden("github.txt", shown(report()))


def test_several_gpus_share_an_annotation(golden):
    text = shown(report(several=True))
    golden("github_several.txt", text)
    assert len(commands(text)) == 3


def test_a_phase_that_failed_comes_first():
    name, properties, text = commands(shown(partial()))[0]
    assert name == "error"
    assert properties["title"] == "fxroof: decode was not analysed"
    assert text.startswith("The model's control flow")


def test_what_is_escaped_reads_back():
    (_, properties, text), *_ = commands(shown(report()))
    assert properties == {
        "file": "models/small_gpt.py",
        "line": "24",
        "title": "KVC001 kv-cache-reallocated-by-cat",
    }
    assert text.splitlines()[0].endswith("(saves decode 17.0 µs, 8.2%)")
    assert text.splitlines()[-1] == "k = cache[:, : pos + 1]"


def test_hostile_text_makes_no_command_of_its_own():
    for text in (TEXT, "a,line=9::b", "%0A::error::x", "x%2Cfile=y"):
        found = commands(shown(hostile(text)))
        # a failed phase, two findings, a failed rule, two comments
        assert [name for name, _, _ in found] == ["error", "warning", "warning", "notice", "notice", "notice"]
        assert all(set(properties) <= {"file", "line", "title"} for _, properties, _ in found)
        assert all(properties["line"].isdecimal() for _, properties, _ in found if "line" in properties)


def test_the_largest_savings_are_kept_and_the_rest_is_counted():
    given = with_findings(*[Severity.ERROR] * 3, *[Severity.WARNING] * 14, *[Severity.INFO] * 20)
    found = commands(shown(given))
    names = [name for name, _, _ in found]
    assert names == ["error"] * 3 + ["warning"] * 10 + ["notice"] * 10
    assert [int(p["line"]) for name, p, _ in found if name == "warning"] == list(range(17, 7, -1))
    assert [int(p["line"]) for name, p, _ in found[:-1] if name == "notice"] == list(range(37, 28, -1))
    assert found[-1][2].startswith("15 more are left out")  # four warnings and eleven notices


def test_ten_of_each_are_all_shown():
    given = with_findings(*(severity for severity in Severity for _ in range(10)))
    assert len(commands(shown(given))) == 30


def test_one_too_many_notices_or_warnings():
    assert commands(shown(with_findings(*[Severity.INFO] * 11)))[-1][2].startswith("2 more")
    full = with_findings(*[Severity.WARNING] * 11, *[Severity.INFO] * 10)
    assert [name for name, _, _ in commands(shown(full))].count("notice") == 10
    assert commands(shown(full))[-1][2].startswith("2 more")


def test_a_model_that_is_no_file_has_annotations_without_a_place():
    original = report()
    nowhere = retraced(original, model=replace(original.model, source="hf:ORG/NAME"))
    (_, properties, _) = commands(shown(nowhere))[-1]
    assert set(properties) == {"title"}
