"""Reports in which every text that comes from a user's model, or from a file, tries to be more than text."""

from dataclasses import fields, is_dataclass, replace
from enum import Enum
from typing import Any

from fxroof.analyzer.limits import Budget, Verdict
from render.sample import partial, renamed, report, retraced

TEXT = (
    "</script><img src=x onerror=alert(1)> \x1b[31m \x00 ::error::owned\n::warning file=a::b\r\n%0A%0D##[error]x"
    " ```` `x` |a|b| [t](http://evil.example/) ![i](//evil.example) @everyone #1 GH-2 www.evil.example &lt; $x$ ]]> "
    "\u202e\u2066abc\u2069\u202c \ufffe \u2028 \"q\" 'q' {0} =cmd|' /C calc'!A0,;\t\\|_a_ *b* ~c~ \\"
)
SURROGATES = "\ud800\udc80"

SHORT = (
    "</script>",
    "\x1b[31m",
    "\x9b31m",
    "\r\n::error::owned",
    "::add-mask::a",
    "##[error]x",
    "%0A::error::",
    "`x`",
    "````",
    "\u202e",
    "=1+1",
    "\t=1",
    "]]>",
    "\x00\x0b\ufffe",
    "[t](http://evil.example)",
    "@everyone",
    "<!-- a --> -->",
    "|a|",
    "&#64;x",
    "{0} {x}",
    "$(x) ${{ x }}",
    "\u2028",
    "**b** ~~c~~ <b>",
    "\\",
    "'\"",
    "",
    " ",
)
"""Each alone and short: what is long is wrapped, and cleaned on the way."""


def hostile(text=TEXT, *, several=False):
    """The sample, one of its phases failed, with the text everywhere; `several` GPUs or one."""
    base = retraced(report(several=several), failures=partial().failures)
    changed = renamed(base, text)
    return replace(changed, runs=tuple(_run(run, text) for run in changed.runs))


def _run(run, text):
    return replace(
        run,
        gpu=replace(run.gpu, key=f"{run.gpu.key}{text}", name=text, note=text),
        findings=tuple(_finding(finding, text) for finding in run.findings),
        rule_failures=tuple(replace(f, code=text, message=text) for f in run.rule_failures),
        unused_suppressions=(f"{text}:3", text),
    )


def _finding(finding, text):
    return replace(
        finding,
        name=text,
        module=text,
        op=text,
        file=f"{text}.py" if finding.file else "",
        library_file=f"/{text}.py" if finding.file else "",
        library_line=7,
        message=text,
        evidence={text: text},
        remedy=replace(finding.remedy, text=text, code=f"{text}\n{text}"),
        suppressed=finding.suppressed and text,
    )


def everywhere(given, text):
    """The report with the text at the end of every text in it that is not empty, phases and keys included; what is one
    of a few known words stays."""
    budget = Budget(metric="decode.tpot", limit=1e-9, text="1 ns", of="bound")
    verdict = Verdict(budget=budget, run="x100", unit="seconds", value=1.0, base=2.0, limit=1e-9, kept=False, why="new")
    unknown = replace(verdict, kept=None, value=None, base=None, limit=None, unit="count")
    whole = replace(given, verdicts=(verdict, replace(verdict, kept=True), unknown))
    return _everywhere(whole, text)


_WORDS = {"execution", "weights_bound_until", "saving_per", "of", "kind", "unit", "metric"}
_OF_CLASSES = {"bound_share", "estimate_share"}


def _everywhere(value: Any, text: str) -> Any:
    if isinstance(value, str) and not isinstance(value, Enum):
        return value and value + text
    if isinstance(value, tuple):
        return tuple(_everywhere(item, text) for item in value)
    if isinstance(value, dict):
        return {key + text: _everywhere(item, text) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        kept = _WORDS | _OF_CLASSES
        changes = {f.name: _everywhere(getattr(value, f.name), text) for f in fields(value) if f.name not in kept}
        return replace(value, **changes)
    return value
