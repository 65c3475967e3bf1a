"""Comments that suppress findings, in files that really are analysed."""

from pathlib import Path

from fxroof.analyzer.pipeline import analyze
from fxroof.analyzer.review import Selection
from fxroof.analyzer.scenario import Scenario
from fxroof.analyzer.suppressions import read_suppressions

SCENARIO = Scenario(input_len=512, output_len=64)


def commented(tmp_path: Path, marks: dict[str, str]) -> str:
    source = Path("examples/mymodel.py").read_text()
    for line, comment in marks.items():
        assert line in source
        source = source.replace(line, f"{line}  # {comment}")
    path = tmp_path / "model.py"
    path.write_text(source)
    return str(path)


def test_a_comment_hides_its_finding_from_count_and_waterfall_and_an_unused_one_is_reported(tmp_path):
    target = commented(
        tmp_path,
        {
            "k = torch.cat((past[0], k), dim=2)": "fxroof: ignore[KVC001] contexts are short",
            "q = apply_rotary(q, cos, sin)": "fxroof: ignore[ATT001]",
        },
    )
    report = analyze(
        target, gpu="b200", phase="decode", scenario=SCENARIO, selection=Selection(select=("KVC",)), in_process=True,
        least_saving=0.0,
    )  # fmt: skip
    (run,) = report.runs
    hidden, counted = (f for f in run.findings if f.suppressed), [f for f in run.findings if not f.suppressed]
    assert [(f.code, f.suppressed) for f in hidden] == [("KVC001", "contexts are short")]
    assert len(counted) == 1
    assert [step.code for step in run.waterfall["decode"]] == ["as-written", "KVC001", "floor"]
    assert len(run.unused_suppressions) == 1
    assert "contexts are short" in str(report)
    assert "suppresses nothing" in str(report)


def test_what_a_comment_may_look_like(tmp_path):
    path = tmp_path / "m.py"
    path.write_text(
        "a = 1  # fxroof: ignore[ATT001]\n"
        "b = 2  #fxroof:ignore[ATT001, kv-cache-reallocated-by-cat] because  # noqa: E501\n"
        "c = 3  # fxroof: ignore\n"
    )
    found = read_suppressions([str(path), str(tmp_path / "missing.py")])
    assert {line: (s.codes, s.reason) for (_, line), s in found.items()} == {
        1: (("ATT001",), ""),
        2: (("ATT001", "kv-cache-reallocated-by-cat"), "because"),
    }
